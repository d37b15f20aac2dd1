// The hinge over the rows that a search found, of the rank guard; see docs/method.md.
#pragma once
#include <cstdint>

#include "matrix.h"
#include "parallel.h"

namespace saferclip::cpu {

struct HingeArgs {
  Matrix x;                  // [B,d] any scale
  Matrix rows;               // [N,d+2]: (q, -limit, ...) / sqrt(2)
  const int64_t* indices;    // [B,found], each in [0,N)
  const float* scores;       // [B,found]: half of what a row is above its limit
  const float* row_weights;  // [B]
  int64_t found;
  double margin;
  int64_t k;                 // what the sum is divided by
  float* values;             // [B]
  void* grad;                // [B,d] in the dtype of x, or null
};

// Returns the sum of row_weights times values, added in an order that no thread count changes.
double neighbor_hinge(const HingeArgs& args, const Parallel& parallel);

}  // namespace saferclip::cpu
