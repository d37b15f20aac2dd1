// The packed bank: int8 rows in panels, with the numbers that bound what the quantization lost.
//
//   header (64 bytes) | mean float[dim], padded to 64 bytes | panels of 32 rows
//   panel: PanelTerms (512 bytes) | bytes [dim/4 rounded up][32][4]
//
// Nothing in it depends on the ISA, and it may lie at any address, in read-only memory too.
#pragma once
#include <cstdint>

#include "kernels.h"
#include "matrix.h"
#include "parallel.h"
#include "rounding.h"

namespace saferclip::cpu {

// Largest dim whose int8 dot products (255 * 127 * dim) fit in 32 bits.
constexpr int64_t kMaxPackedDim = 65536;

int64_t packed_size(int64_t count, int64_t dim);

// Writes packed_size(bank.rows, bank.dim) bytes.
void pack_bank(const Matrix& bank, uint8_t* blob, const Parallel& parallel);

// Whether blob, of `size` bytes, has the layout of a packed bank of this shape.
bool packed_matches(const uint8_t* blob, int64_t size, int64_t count, int64_t dim);

inline int64_t panel_bytes(int64_t dim) {
  return static_cast<int64_t>(sizeof(PanelTerms)) + (dim + 3) / 4 * (kPanelRows * 4);
}

const uint8_t* packed_mean(const uint8_t* blob);
const uint8_t* packed_panels(const uint8_t* blob, int64_t dim);

// A vector near the middle of the bank; any vector is correct, a good one leaves shorter rows.
void sample_mean(const Matrix& bank, float* mean);

// Relative error of an fp32 sum of dim products, whatever the vector width.
inline float sum_slack(int64_t dim) { return (static_cast<float>(dim) / 4 + 64) * static_cast<float>(kUnitRoundoff); }

}  // namespace saferclip::cpu
