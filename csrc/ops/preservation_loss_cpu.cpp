// torch.ops.saferclip_fast.preservation_loss on CPU tensors.
#include "kernels/cpu/preservation_loss.h"

#include <vector>

#include "ops/cpu_glue.h"

namespace {

using namespace saferclip;

std::tuple<Tensor, Tensor, Tensor, Tensor> preservation_loss_cpu(
    const Tensor& text, const Tensor& image, const Tensor& frozen_text, const Tensor& frozen_image,
    std::vector<double> weights, double logit_scale, bool need_grad, double logits_mib) {
  STD_TORCH_CHECK(weights.size() == 4, "weights must have 4 entries");
  const Tensor t = dense(text), v = dense(image);
  const Tensor ft = dense(frozen_text), fv = dense(frozen_image);
  const int64_t batch = text.size(0), width = text.size(1);
  for (const Tensor* x : {&v, &ft, &fv}) {
    check_shape("image, frozen_text and frozen_image", *x, batch, width);
  }
  Tensor grad_text = torch::stable::new_empty(text, {need_grad ? batch : 0, width});
  Tensor grad_image = torch::stable::new_empty(image, {need_grad ? batch : 0, width});
  const cpu::PreservationArgs args{
      .text = matrix_of("text", t),
      .image = matrix_of("image", v),
      .frozen_text = matrix_of("frozen_text", ft),
      .frozen_image = matrix_of("frozen_image", fv),
      .weights = {weights[0], weights[1], weights[2], weights[3]},
      .logit_scale = static_cast<float>(logit_scale),
      .kept_bytes = logits_mib < 1e9 ? static_cast<int64_t>(logits_mib * (1 << 20)) : INT64_MAX,
      .grad_text = need_grad ? grad_text.mutable_data_ptr() : nullptr,
      .grad_image = need_grad ? grad_image.mutable_data_ptr() : nullptr,
  };
  double sums[4];
  cpu::preservation_loss(args, sums, threads_for(batch * width * (batch + 8)));

  Tensor terms = torch::stable::new_empty(text, {4}, ScalarType::Float);
  Tensor loss = torch::stable::new_empty(text, {}, ScalarType::Float);
  double total = 0;
  for (int j = 0; j < 4; ++j) {
    static_cast<float*>(terms.mutable_data_ptr())[j] = static_cast<float>(sums[j]);
    total += weights[j] * sums[j];
  }
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(total);
  return {loss, terms, grad_text, grad_image};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saferclip_fast, CPU, m) {
  m.impl("preservation_loss", TORCH_BOX(&preservation_loss_cpu));
}
