// 16-bit floats and the rounding of the tensor cores, in plain integer code; test_numeric.cpp checks
// the conversions against the host functions of cuda_fp16.h and cuda_bf16.h.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace simt {

inline float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }

inline uint16_t float_to_bf16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if (x != x) return 0x7fff;
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

inline float fp16_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float x;
  if (exponent == 31) {
    x = mantissa ? NAN : INFINITY;
  } else {
    x = exponent ? std::ldexp(float(1024 + mantissa), exponent - 25) : std::ldexp(float(mantissa), -24);
  }
  return bits >> 15 ? -x : x;
}

inline uint16_t float_to_fp16(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float a = std::fabs(x);
  if (x != x) return 0x7fff;
  if (a >= 65520.0f) return sign | 0x7c00;
  const int exponent = a < 0x1p-14f ? -14 : std::ilogb(a);
  const float unit = std::ldexp(1.0f, exponent - 10);             // spacing of fp16 numbers near a
  const int steps = int(std::nearbyint(a / unit));                // exact division by a power of two
  return sign | uint16_t(((exponent + 14) << 10) + steps);  // the leading bit adds 1 to the exponent
}

// Tensor cores cut the sum of an mma off instead of rounding it; the emulation does the same.
inline float toward_zero(double x) {
  float y = float(x);
  if (std::fabs(double(y)) > std::fabs(x)) y = std::nextafter(y, 0.0f);
  return y;
}

// x in fp32, up or down by `ulps`, as its bits say; zeros, infinities and NaN stay.
inline float off_by(uint32_t ulps, double x) {
  const float y = float(x);
  if (!(std::fabs(y) >= 0x1p-126f && std::fabs(y) < 0x1p127f)) return y;
  const uint32_t bits = std::bit_cast<uint32_t>(y);
  return std::bit_cast<float>(bits * 0x9e3779b9u >> 31 ? bits + ulps : bits - ulps);
}

}  // namespace simt
