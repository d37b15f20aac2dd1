// The four redirection terms and both gradients (method.md, "The fused redirection op"), given the
// neighbors. Torch-free: raw device pointers, everything queued on one stream.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace saferclip {

struct RetargetProblem {
  const void *text, *image;                // [batch, dim], one type, any scale
  const void *frozen_text, *frozen_image;  // [batch, dim], any scale
  const void *bank_text, *bank_image;      // [rows, dim]
  const int64_t* neighbors;                // [batch, k]; one outside 0 ... rows - 1 makes its row NaN
  const float* neighbor_weights;           // [batch, k]
  const float* row_weights;                // [batch, 4]
  int64_t batch, dim, rows;
  int k;
  DType type, frozen_text_type, frozen_image_type, bank_text_type, bank_image_type;
  float weights[4];
  float beta, margin;
  int current_negative, need_grad;
};

constexpr int64_t kMaxRetargetDim = 4096;

int64_t retarget_loss_workspace_bytes(int64_t batch);

// loss: 1 float; terms: 4 floats; gradients [batch, dim] of `type`, untouched without need_grad.
// Returns a cudaError_t (0: queued).
int retarget_loss(const RetargetProblem& problem, void* workspace, float* loss, float* terms,
                  void* grad_text, void* grad_image, void* stream);

}  // namespace saferclip
