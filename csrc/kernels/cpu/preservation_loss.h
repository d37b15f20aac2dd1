// Cosine preservation and symmetric InfoNCE against frozen embeddings; see docs/method.md.
#pragma once
#include <cstdint>
#include <functional>

#include "parallel.h"
#include "rows.h"

namespace saferclip::cpu {

// The host's single-precision matrix product, all operands row-major with leading dimensions:
// c = a b^T (transpose_b) or a b, or c += ... (accumulate), for a [m,k], c [m,n].
struct Product {
  const float* a;
  const float* b;
  float* c;
  int64_t m, n, k, lda, ldb, ldc;
  bool transpose_b, accumulate;
};
using Multiply = std::function<void(const Product&)>;

struct PreservationArgs {
  Rows text, image, frozen_text, frozen_image;  // [B,d], any scale
  double weights[4];                            // cos_text, cos_image, nce_text, nce_image
  float logit_scale;
  void *grad_text, *grad_image;  // [B,d] in the dtype of text and image, or null
};

// terms in the order of weights; an nce term of weight 0 is not computed and reads 0.
// `multiply` is called from inside the tasks of `parallel`, so it must not start threads there.
void preservation_loss(const PreservationArgs& args, double terms[4], const Multiply& multiply,
                       const Parallel& parallel);

}  // namespace saferclip::cpu
