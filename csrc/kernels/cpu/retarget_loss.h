// The fused redirection loss of one batch and its gradients; see docs/method.md for the equations.
#pragma once
#include <cstdint>

namespace saferclip::cpu {

// All matrices are row-major fp32; B rows, width d, k neighbors a row, bank rows of unit length.
struct RetargetArgs {
  const float *text, *image;                // [B,d] trainable, any scale
  const float *frozen_text, *frozen_image;  // [B,d] any scale
  const float *bank_text, *bank_image;      // [N,d]
  const int64_t* neighbors;                 // [B,k]
  const float* neighbor_weights;            // [B,k]
  const float* row_weights;                 // [B,4]
  int64_t batch, width, k;
  float weights[4];  // uni_text, uni_image, cross_text, cross_image
  float beta, margin;
  bool current_negative;
  float *grad_text, *grad_image;  // [B,d], or null when no gradient is wanted
  double* row_terms;              // [B,4] row_weights-weighted terms, summed by the caller in row order
};

void retarget_loss_rows(const RetargetArgs& args, int64_t begin, int64_t end);

}  // namespace saferclip::cpu
