// What the kernels may use of the machine. Two bodies: device_cuda.cuh (CUDA and PTX) and
// tests/backends/simt/device_simt.h (the same names on the CPU executor). Nothing else in this folder differs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/dtype.h"

namespace saferclip {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

struct alignas(16) Vec16 {  // one 16-byte access
  uint32_t word[4];
};

struct alignas(8) Vec8 {
  uint32_t word[2];
};

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

}  // namespace saferclip

#ifdef SAFERCLIP_SIMT
#include "device_simt.h"
#else
#include "device_cuda.cuh"
#endif

namespace saferclip {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace saferclip
