// Vectors of the width the including file is compiled for. Only files built once per ISA include
// this; everything is in an unnamed namespace, so that no AVX copy can be linked into generic code.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/cpu/matrix.h"

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

using Floats = float __attribute__((vector_size(kWidth * 4)));
using Ints = int32_t __attribute__((vector_size(kWidth * 4)));
using UInts = uint32_t __attribute__((vector_size(kWidth * 4)));
using Doubles = double __attribute__((vector_size(kWidth * 4)));  // kWidth / 2 lanes
using Halves = uint16_t __attribute__((vector_size(kWidth * 2)));
using Bytes = uint8_t __attribute__((vector_size(kWidth)));

constexpr int kDoubleWidth = kWidth / 2;

// Largest |q8| of a quantized query.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
constexpr int kQueryLimit = 64;  // 2 * 255 * 64 < 2^15: the pairwise 16-bit sums of vpmaddubsw cannot saturate
#else
constexpr int kQueryLimit = 127;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class Vector>
inline Vector load_bits(const void* p) {
  Vector v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class Vector>
inline void store_bits(void* p, Vector v) {
  std::memcpy(p, &v, sizeof(v));
}

inline Floats splat(float x) { return x - Floats{}; }  // x + 0 would cost an addition: it is not x for -0

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float to_float(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  uint32_t bits = magnitude | 0x7f800000;  // infinity and NaN keep their mantissa
  float f;
  if (magnitude < 0x0f800000) {
    std::memcpy(&f, &magnitude, 4);
    f *= 0x1p112f;  // moves the exponent bias from 15 to 127; exact, denormals included
    std::memcpy(&bits, &f, 4);
  }
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}

inline Floats load(const float* p) { return load_bits<Floats>(p); }
inline Floats load(const BFloat16* p) {
  const UInts wide = __builtin_convertvector(load_bits<Halves>(p), UInts) << 16;
  return load_bits<Floats>(&wide);
}
inline Floats load(const Half* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Floats v;
  for (int i = 0; i < kWidth; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// GCC 12 splits __builtin_convertvector of floats in two: with intrinsics exact_dot takes 0.63 of its time (d = 768, Zen 4).
#if defined(__AVX512F__)
inline Doubles to_doubles(__m256 v) { return _mm512_cvtps_pd(v); }
inline Doubles widen_lanes(const float* p) { return to_doubles(_mm256_loadu_ps(p)); }
inline Doubles widen_lanes(const BFloat16* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return to_doubles(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
}
inline Doubles widen_lanes(const Half* p) {
  return to_doubles(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#elif defined(__AVX2__)
inline Doubles to_doubles(__m128 v) { return _mm256_cvtps_pd(v); }
inline Doubles widen_lanes(const float* p) { return to_doubles(_mm_loadu_ps(p)); }
inline Doubles widen_lanes(const BFloat16* p) {
  const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return to_doubles(_mm_castsi128_ps(_mm_slli_epi32(bits, 16)));
}
inline Doubles widen_lanes(const Half* p) {
  return to_doubles(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
#else
template <class T>
inline Doubles widen_lanes(const T* p) {
  Doubles v;
  for (int i = 0; i < kDoubleWidth; ++i) v[i] = static_cast<double>(to_float(p[i]));
  return v;
}
#endif

inline void store(float* p, Floats v) { store_bits(p, v); }

// The first n < kWidth elements, zeros behind them.
#if defined(__AVX512F__)
inline Floats load_part(const float* p, int64_t n) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
#endif
template <class T>
inline Floats load_part(const T* p, int64_t n) {
  alignas(64) float lanes[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
}

inline Floats absolute(Floats v) {
  UInts bits;
  std::memcpy(&bits, &v, sizeof(v));
  bits &= 0x7fffffffu;
  return load_bits<Floats>(&bits);
}

// b where a is NaN.
inline Floats maximum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline float sum(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float lanes[kWidth];
  store(lanes, v);
  for (int step = kWidth / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  }
  return lanes[0];
#endif
}

// out[i] = sum(v[i])
inline void sum4(const Floats (&v)[4], float* out) {
#if defined(__AVX512F__)
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512 c = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  const __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = sum(v[i]);
#endif
}

inline float largest(Floats v) {
  float lanes[kWidth];
  store(lanes, v);
  float best = lanes[0];
  for (int i = 1; i < kWidth; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

// Bit i is set unless a[i] < b[i]: a NaN sets it.
inline uint32_t mask_not_less(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kWidth; ++i) mask |= static_cast<uint32_t>(!(a[i] < b[i])) << i;
  return mask;
#endif
}

// Writes a vector in the storage type, rounded to nearest even; `stream` goes past the cache and needs
// alignment to the vector's size.
inline void write(float* p, Floats v, bool stream) {
#if defined(__AVX512F__)
  if (stream) return _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  if (stream) return _mm256_stream_ps(p, v);
#endif
  (void)stream;
  store(p, v);
}

// What `write` streamed is seen by other threads in order only behind this.
inline void end_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

inline uint16_t round_to(const BFloat16*, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline uint16_t round_to(const Half*, float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;
  if (bits < 0x38800000) {  // denormal in half: adding 0.5 lets the FPU round at the right bit
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000);
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return sign | static_cast<uint16_t>((bits - 0x38000000) >> 13);
#endif
}

template <class T>
inline void write(T* p, Floats v, bool /*stream*/) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2 && __is_same(T, Half)) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return;
  }
#endif
  for (int i = 0; i < kWidth; ++i) p[i].bits = round_to(static_cast<const T*>(nullptr), v[i]);
}

template <class T>
inline void write_one(T* p, float x) {
  p->bits = round_to(static_cast<const T*>(nullptr), x);
}
inline void write_one(float* p, float x) { *p = x; }

// Calls f with a null pointer of the element type that dtype names.
template <class F>
inline void with_element(saferclip::DType dtype, F&& f) {
  using saferclip::DType;
  if (dtype == DType::kFloat32) f(static_cast<const float*>(nullptr));
  else if (dtype == DType::kBFloat16) f(static_cast<const BFloat16*>(nullptr));
  else f(static_cast<const Half*>(nullptr));
}

}  // namespace
