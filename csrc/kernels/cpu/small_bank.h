// nearest_safe for banks so small, or k so close to their size, that screening in int8 cannot pay.
#pragma once
#include <cstdint>

#include "matrix.h"
#include "parallel.h"

namespace saferclip::cpu {

bool is_small_bank(const Matrix& bank, int k);

// As nearest_safe in nearest_safe.h.
void search_small_bank(const Matrix& query, const Matrix& bank, int k, float* scores, int64_t* indices,
                       const Parallel& parallel);

}  // namespace saferclip::cpu
