// A matrix of any float type, its rows read eight elements at a time as fp32, and warp reductions.
#pragma once

#include "device.cuh"

namespace saferclip {

// Row-major [rows, dim]. `wide`: every row starts at a multiple of 16 bytes, so 16-byte loads work.
struct Matrix {
  Global<const uint8_t> data;
  DType type;
  int dim;
  bool wide;
};

// The same before it reaches a kernel: a plain pointer.
struct HostMatrix {
  const void* data;
  DType type;
  bool is_wide(int64_t dim) const {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && dim * element_size(type) % 16 == 0;
  }
  Matrix on_device(int64_t dim) const {
    return {static_cast<const uint8_t*>(data), type, static_cast<int>(dim), is_wide(dim)};
  }
};

__device__ __forceinline__ void unpack8(const Vec16& v, DType type, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint16_t bits = static_cast<uint16_t>(v.word[i / 2] >> 16 * (i % 2));
    x[i] = type == DType::kBFloat16 ? to_float(bf16{bits}) : to_float(fp16{bits});
  }
}

// Elements 8 * chunk ... 8 * chunk + 7 of a row; zeros past the end of the row.
__device__ __forceinline__ void load8(const Matrix& m, int64_t row, int chunk, float (&x)[8]) {
  const int first = chunk * 8;
  const Global<const uint8_t> at =
      m.data + (row * m.dim + first) * (m.type == DType::kFloat32 ? 4 : 2);
  if (m.wide && m.type == DType::kFloat32) {
    const Vec16 low = as<const Vec16>(at)[0];
    Vec16 high = {};
    if (first + 4 < m.dim) high = as<const Vec16>(at)[1];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(low.word[i]), x[i + 4] = __uint_as_float(high.word[i]);
  } else if (m.wide) {
    const Vec16 v = as<const Vec16>(at)[0];
    unpack8(v, m.type, x);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      x[i] = 0.0f;
      if (first + i >= m.dim) continue;
      if (m.type == DType::kFloat32) x[i] = as<const float>(at)[i];
      if (m.type == DType::kBFloat16) x[i] = to_float(static_cast<bf16>(as<const bf16>(at)[i]));
      if (m.type == DType::kFloat16) x[i] = to_float(static_cast<fp16>(as<const fp16>(at)[i]));
    }
  }
}

// Writes eight elements as `like` has them: same type, width and alignment.
__device__ __forceinline__ void store8(const Matrix& like, Global<uint8_t> out, int64_t row, int chunk,
                                       const float (&x)[8]) {
  const int first = chunk * 8;
  const Global<uint8_t> at = out + (row * like.dim + first) * (like.type == DType::kFloat32 ? 4 : 2);
  auto bits = [&](int i) -> uint32_t {
    return like.type == DType::kBFloat16 ? from_float<bf16>(x[i]).bits : from_float<fp16>(x[i]).bits;
  };
  if (like.wide && like.type == DType::kFloat32) {
    Vec16 low, high;
#pragma unroll
    for (int i = 0; i < 4; ++i) low.word[i] = __float_as_uint(x[i]), high.word[i] = __float_as_uint(x[i + 4]);
    as<Vec16>(at)[0] = low;
    if (first + 4 < like.dim) as<Vec16>(at)[1] = high;
  } else if (like.wide) {
    Vec16 v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.word[i] = bits(2 * i) | bits(2 * i + 1) << 16;
    as<Vec16>(at)[0] = v;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (first + i >= like.dim) continue;
      if (like.type == DType::kFloat32) {
        as<float>(at)[i] = x[i];
      } else {
        as<uint16_t>(at)[i] = static_cast<uint16_t>(bits(i));
      }
    }
  }
}

__device__ __forceinline__ float dot8(const float (&a)[8], const float (&b)[8], float sum) {
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = fmaf(a[i], b[i], sum);
  return sum;
}
// 1 / sqrt(x) to within about one rounding: rsqrtf may be two off, one Newton step mends that. A zero
// squared norm gives 0, so that a zero row stays zero.
__device__ __forceinline__ float inverse_norm(float square) {
  if (square == 0.0f) return 0.0f;
  const float y = rsqrtf(square);
  return fmaf(0.5f * y, fmaf(-square * y, y, 1.0f), y);
}

// A butterfly: every lane ends with the same bits, in an order that does not depend on timing.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullMask, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, step));
  return x;
}

// Whether products of two rows of such squared norms stay in the range of fp32, and precise.
__device__ __forceinline__ bool in_range(float square) { return square >= 0x1p-80f && square <= 0x1p80f; }
// The power of two that a row is multiplied by before its elements are: 1 for a row in range, else what brings its
// largest element near 1. Called by a whole warp.
__device__ __forceinline__ float row_scale(const Matrix& m, int64_t row, float square) {
  if (in_range(square)) return 1.0f;
  float largest = 0.0f;
  for (int chunk = threadIdx.x % kWarpSize; chunk * 8 < m.dim; chunk += kWarpSize) {
    float x[8];
    load8(m, row, chunk, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(x[i]));
  }
  largest = warp_max(largest);
  if (!(largest > 0.0f && largest < INFINITY)) return 1.0f;
  const int exponent = 254 - static_cast<int>(__float_as_uint(largest) >> 23);
  return __uint_as_float(static_cast<uint32_t>(exponent < 1 ? 1 : exponent) << 23);
}
__device__ __forceinline__ void scale8(float (&x)[8], float scale) {
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] *= scale;
}

}  // namespace saferclip
