// Cosine preservation and symmetric InfoNCE against the frozen encoders, with gradients (method.md,
// "Preservation"). Torch-free: raw device pointers, everything queued on one stream.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace saferclip {

struct PreservationProblem {
  const void *text, *image;                // [batch, dim], one type, any scale
  const void *frozen_text, *frozen_image;  // [batch, dim], any scale
  int64_t batch, dim;
  DType type, frozen_text_type, frozen_image_type;
  float weights[4];  // cos_text, cos_image, nce_text, nce_image
  float logit_scale;
  int need_grad;
  int64_t slice_bytes;  // of P + C - 2 I stored at a time
};

constexpr int64_t kSliceOfWeights = 256 << 20;  // a good slice_bytes

constexpr int64_t kMaxPreservationDim = 8192;
constexpr int64_t kMaxPreservationBatch = 1 << 21;  // tiles of columns are a grid dimension of 65,535 at most

int64_t preservation_loss_workspace_bytes(const PreservationProblem& problem);

// loss: 1 float; terms: 4 floats; gradients [batch, dim] of `type`, untouched without need_grad.
// Returns a cudaError_t (0: queued).
int preservation_loss(const PreservationProblem& problem, void* workspace, float* loss, float* terms,
                      void* grad_text, void* grad_image, void* stream);

}  // namespace saferclip
