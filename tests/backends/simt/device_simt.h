// The emulated body of csrc/kernels/cuda/device.cuh: the same names as device_cuda.cuh, run by simt.h.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <string_view>

#include "mma_layout.h"
#include "numeric.h"
#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (::simt::self->index)
#define blockIdx (::simt::block->index)
#define blockDim (::simt::block_dim)
#define gridDim (::simt::grid_dim)

inline void __syncthreads(std::source_location site = std::source_location::current()) {
  simt::barrier(site);
}
inline void __syncwarp(unsigned mask = ~0u) {
  int nothing = 0;
  simt::rendezvous("__syncwarp", mask, nothing, [&](int**) {
    if (mask == ~0u) ++simt::warp().epoch;
  });
}
template <class T>
T exchange_lanes(const char* op, unsigned mask, T value, int source) {
  struct Data {
    T value;
    int source;
    T result;
  } mine{value, source, {}};
  simt::rendezvous(op, mask, mine, [&](Data** lanes) {
    for (int i = 0; i < simt::kWarp; ++i) {
      if (!lanes[i]) continue;
      const int from = lanes[i]->source & (simt::kWarp - 1);
      if (!lanes[from]) simt::fault(std::string(op) + ": reads a lane outside the mask");
      lanes[i]->result = lanes[from]->value;
    }
  });
  return mine.result;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return exchange_lanes("__shfl_xor_sync", mask, value, simt::lane_id() ^ lane_mask);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return exchange_lanes("__shfl_sync", mask, value, source);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  struct Data {
    bool vote;
    unsigned result;
  } mine{vote, 0};
  simt::rendezvous("__ballot_sync", mask, mine, [](Data** lanes) {
    unsigned result = 0;
    for (int i = 0; i < simt::kWarp; ++i) {
      if (lanes[i] && lanes[i]->vote) result |= 1u << i;
    }
    for (int i = 0; i < simt::kWarp; ++i) {
      if (lanes[i]) lanes[i]->result = result;
    }
  });
  return mine.result;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(unsigned x) { return x ? std::countr_zero(x) + 1 : 0; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }

inline int atomicAdd(simt::Ptr<int> p, int value) {
  simt::note_atomic(*p.region(), reinterpret_cast<std::byte*>(p.raw()), 4);
  const int before = *p.raw();
  *p.raw() += value;
  return before;
}

struct uint2 {
  unsigned x, y;
};

namespace saferclip {

template <class T>
using Global = simt::Ptr<T>;
template <class T>
using Shared = simt::Ptr<T>;
using Stream = void*;

inline Shared<uint8_t> dynamic_shared() {
  return {reinterpret_cast<uint8_t*>(simt::block->shared.base), &simt::block->shared};
}
template <class U, class T>
simt::Ptr<U> as(simt::Ptr<T> p) {
  return p.template as<U>();
}

template <class... P, class... A>
int launch(Stream, void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes, A... args) {
  simt::launch(kernel, grid, dim3(threads), shared_bytes, args...);
  return 0;
}
inline int simulated_multiprocessors = 2;
inline int multiprocessor_count() { return simulated_multiprocessors; }
// Gives a part of a workspace bounds of its own.
inline void name_buffer(void* p, size_t bytes, const char* name) {
  simt::guard(p, bytes, true, false, name);
}

// CUDA's libm is not the host's: each result is moved by as much as the CUDA C++ Programming Guide allows; the
// exponential of 0, which the hardware gives exactly, is 1.
inline float rsqrtf(float x) { return simt::off_by(2, 1.0 / std::sqrt(double(x))); }
inline float expf(float x) { return x == 0.0f ? 1.0f : simt::off_by(1, std::exp(double(x))); }
inline float exp2f(float x) { return x == 0.0f ? 1.0f : simt::off_by(2, std::exp2(double(x))); }
inline float logf(float x) { return simt::off_by(1, std::log(double(x))); }
inline float log1pf(float x) { return simt::off_by(1, std::log1p(double(x))); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return simt::bf16_to_float(x.bits); }
inline float to_float(fp16 x) { return simt::fp16_to_float(x.bits); }
template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) return bf16{simt::float_to_bf16(x)};
  if constexpr (std::is_same_v<T, fp16>) return fp16{simt::float_to_fp16(x)};
  if constexpr (std::is_same_v<T, float>) return x;
}
inline void multiply_add(float& sum, float a, float b) {
  ++simt::counters.fma;
  sum = std::fma(a, b, sum);
}

inline void cp_async16(Shared<uint8_t> to, Global<const uint8_t> from, bool valid) {
  simt::copy_async(as<std::byte>(to), as<const std::byte>(from), 16, valid ? 16 : 0);
}
inline void cp_async_commit() { simt::commit_copies(); }
template <int kAllowed>
void cp_async_wait() {
  simt::wait_copies(kAllowed);
}

inline void ldmatrix_x4(uint32_t (&out)[4], Shared<uint8_t> row) {
  struct Data {
    const uint8_t* row;
    uint32_t* out;
  } mine{row.raw(), out};
  simt::note_read(*row.region(), reinterpret_cast<const std::byte*>(row.raw()), 16);
  simt::rendezvous("ldmatrix", ~0u, mine, [](Data** lanes) {
    for (int lane = 0; lane < simt::kWarp; ++lane) {
      for (int reg = 0; reg < 4; ++reg) {
        const uint8_t* from = lanes[simt::ldmatrix_source_lane(lane, reg)]->row;
        std::memcpy(&lanes[lane]->out[reg], from + simt::ldmatrix_source_byte(lane), 4);
      }
    }
  });
}

template <class E>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Data {
    const uint32_t* a;
    uint32_t b[2];
    float* c;
  } mine{a, {b0, b1}, c};
  simt::rendezvous("mma", ~0u, mine, [](Data** lanes) {
    constexpr int kDepth = 16;
    float a_tile[16][kDepth], b_tile[8][kDepth];
    auto element = [](uint32_t word, int i) { return to_float(E{uint16_t(word >> 16 * i)}); };
    for (int lane = 0; lane < simt::kWarp; ++lane) {
      for (int i = 0; i < 8; ++i) {
        const auto to = simt::a_element(lane, i / 2, i % 2);
        a_tile[to.row][to.column] = element(lanes[lane]->a[i / 2], i % 2);
      }
      for (int i = 0; i < 4; ++i) {
        const auto to = simt::b_element(lane, i / 2, i % 2);
        b_tile[to.row][to.column] = element(lanes[lane]->b[i / 2], i % 2);
      }
    }
    for (int lane = 0; lane < simt::kWarp; ++lane) {
      for (int reg = 0; reg < 4; ++reg) {
        const auto at = simt::c_element(lane, reg);
        float& c = lanes[lane]->c[reg];
        double sum = c;
        for (int k = 0; k < kDepth; ++k) sum += double(a_tile[at.row][k]) * b_tile[at.column][k];
        c = simt::toward_zero(sum);
      }
    }
    simt::counters.mma += 16 * 8 * kDepth;
  });
}

}  // namespace saferclip
