// The fused redirection loss of one batch and its gradients; see docs/method.md for the equations.
#pragma once
#include <cstdint>

#include "matrix.h"
#include "parallel.h"

namespace saferclip::cpu {

// Row-major matrices: B rows, width d, k neighbors a row, bank rows of unit length. The four inputs
// and the gradients share `dtype`; the bank has its own.
struct RetargetArgs {
  const void *text, *image;                // [B,d] trainable, any scale
  const void *frozen_text, *frozen_image;  // [B,d] any scale
  DType dtype;
  Matrix bank_text, bank_image;    // [N,d]
  const int64_t* neighbors;      // [B,k], each in [0,N)
  const float* neighbor_weights; // [B,k]
  const float* row_weights;      // [B,4]
  int64_t batch, dim, k;
  float weights[4];  // uni_text, uni_image, cross_text, cross_image
  float beta, margin;
  bool current_negative;
  void *grad_text, *grad_image;  // [B,d], or null when no gradient is wanted
  bool stream;                   // the gradients are too large to stay in cache: write past it
};

// terms[j] = sum_i row_weights[i,j] * term_ij, added in an order that no thread count changes.
void retarget_loss(const RetargetArgs& args, double terms[4], const Parallel& parallel);

}  // namespace saferclip::cpu
