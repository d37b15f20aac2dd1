// Rounding constants that the bounds of nearest_safe share (docs/cpu-kernels.md, "The bound"). Each lies a little
// above what its comment says, kOverflow below.
#pragma once

namespace saferclip::cpu {

constexpr double kUnitRoundoff = 6e-8;    // 2^-24: relative error of one fp32 operation
constexpr double kSpacing = 1.2e-7;       // 2^-23: relative distance of neighboring fp32 numbers
constexpr double kHalfDenormal = 1e-45;   // 2^-150: half the distance of neighboring denormals
constexpr double kDenormal = 1.5e-45;     // 2^-149: the distance itself
constexpr double kOverflow = 1e38;        // where a sum may pass the end of fp32: beyond it there is no bound
constexpr double kInflate = 1.000001;     // covers the roundings of a bound's own computation
constexpr float kLostLength = 1.2e-19f;   // 2^-63: times sqrt(dim), what a length loses where squares underflow

}  // namespace saferclip::cpu
