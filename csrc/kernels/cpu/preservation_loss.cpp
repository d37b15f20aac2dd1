#include "preservation_loss.h"

#include <cmath>

#include "info_nce.h"

namespace saferclip::cpu {
namespace {

// One modality: rows x against the other modality's frozen rows, and their own frozen rows.
struct Side {
  const Matrix &x, &own, &other;
  double cos_weight, nce_weight;
  void* grad;
};

void preserve(const PreservationArgs& args, const Side& side, double* cos_term, double* nce_term,
              const Parallel& parallel) {
  const int64_t batch = side.x.rows;
  InfoNce nce({side.x, side.other, 0, nullptr, args.logit_scale}, parallel);
  Buffer<float> rows, columns, logits;
  *nce_term = 0;
  if (side.nce_weight != 0) {
    rows = make_buffer<float>(3 * batch);
    columns = make_buffer<float>(2 * batch);
    if (side.grad != nullptr && batch * batch * 4 <= args.kept_bytes) logits = make_buffer<float>(batch * batch);
    nce.log_sums({rows.get(), columns.get(), logits.get()});
    for (int64_t j = batch; j < 2 * batch; ++j) columns[j] = static_cast<float>(std::log(double{columns[j]}));
    *nce_term = nce.loss({rows.get(), columns.get(), nullptr});
  }
  const double cosines = nce.gradient({
      .sums = {rows.get(), columns.get(), logits.get()},
      .nce_weight = side.nce_weight,
      .own = &side.own,
      .pull = -side.cos_weight / static_cast<double>(batch),
      .grad = side.grad,
  });
  *cos_term = 1 - cosines / static_cast<double>(batch);
}

}  // namespace

void preservation_loss(const PreservationArgs& args, double terms[4], const Parallel& parallel) {
  const double* w = args.weights;
  preserve(args, {args.text, args.frozen_text, args.frozen_image, w[0], w[2], args.grad_text}, &terms[0],
           &terms[2], parallel);
  preserve(args, {args.image, args.frozen_image, args.frozen_text, w[1], w[3], args.grad_image}, &terms[1],
           &terms[3], parallel);
}

}  // namespace saferclip::cpu
