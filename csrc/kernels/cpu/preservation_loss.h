// Cosine preservation and symmetric InfoNCE against frozen embeddings; see docs/method.md.
#pragma once
#include <cstdint>

#include "matrix.h"
#include "parallel.h"

namespace saferclip::cpu {

struct PreservationArgs {
  Matrix text, image, frozen_text, frozen_image;  // [B,d], any scale
  double weights[4];                            // cos_text, cos_image, nce_text, nce_image
  float logit_scale;
  int64_t kept_bytes;            // logits up to this size are kept for the gradient, else computed twice
  void *grad_text, *grad_image;  // [B,d] in the dtype of text and image, or null
};

// terms in the order of weights; an nce term of weight 0 is not computed and reads 0. The bits do not
// depend on the number of threads.
void preservation_loss(const PreservationArgs& args, double terms[4], const Parallel& parallel);

}  // namespace saferclip::cpu
