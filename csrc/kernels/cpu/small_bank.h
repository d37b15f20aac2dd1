// nearest_safe for banks so small, or k so close to their size, that screening in int8 cannot pay.
#pragma once
#include <cstdint>

#include "parallel.h"
#include "rows.h"

namespace saferclip::cpu {

bool is_small_bank(const Rows& bank, int k);

// As nearest_safe in nearest_safe.h.
void search_small_bank(const Rows& query, const Rows& bank, int k, float* scores, int64_t* indices,
                       const Parallel& parallel);

}  // namespace saferclip::cpu
