// Exact nearest neighbors by inner product: int8 screening with a proven bound, exact re-scoring.
#pragma once
#include <cstdint>

#include "matrix.h"
#include "parallel.h"

namespace saferclip::cpu {

// Writes for each query the k rows of the bank with the largest fp32(<query, row> / |query|), best
// first, ties to the lower row: scores [query.rows, k], indices [query.rows, k].
// `packed` is what pack_bank made of this bank, or null. 1 <= k <= bank.rows < 2^31.
void nearest_safe(const Matrix& query, const Matrix& bank, const uint8_t* packed, int k, float* scores,
                  int64_t* indices, const Parallel& parallel);

}  // namespace saferclip::cpu
