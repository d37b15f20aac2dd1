// torch.ops.saferclip_fast.preservation_loss on CUDA tensors.
#include "cuda_glue.h"
#include "kernels/cuda/preservation_loss.h"

namespace {

using namespace saferclip::cuda_glue;

std::tuple<Tensor, Tensor, Tensor, Tensor> preservation_loss_cuda(const Tensor& text, const Tensor& image,
                                                                  const Tensor& frozen_text,
                                                                  const Tensor& frozen_image,
                                                                  std::vector<double> weights, double logit_scale,
                                                                  bool need_grad, double /*logits_mib*/) {
  constexpr const char* kOp = "preservation_loss";
  STD_TORCH_CHECK(weights.size() == 4, kOp, ": weights must have 4 entries");
  STD_TORCH_CHECK(text.dim() == 2, kOp, ": text must be [B, d]");
  const int64_t batch = text.size(0);
  check_matrix(kOp, "image", image, text, batch);
  check_matrix(kOp, "frozen_text", frozen_text, text, batch);
  check_matrix(kOp, "frozen_image", frozen_image, text, batch);
  STD_TORCH_CHECK(image.scalar_type() == text.scalar_type(), kOp, ": text and image must have one dtype");
  STD_TORCH_CHECK(text.size(1) > 0 && text.size(1) <= saferclip::kMaxPreservationDim, kOp, ": d must be 1 to ",
                  saferclip::kMaxPreservationDim);
  STD_TORCH_CHECK(batch <= saferclip::kMaxPreservationBatch, kOp, ": B must be at most ",
                  saferclip::kMaxPreservationBatch);
  const torch::stable::accelerator::DeviceGuard guard(text.get_device_index());
  const LossOutputs out(text, need_grad);
  if (batch == 0) return out.zero();
  const Tensor t = torch::stable::contiguous(text), v = torch::stable::contiguous(image);
  const Tensor ft = torch::stable::contiguous(frozen_text), fv = torch::stable::contiguous(frozen_image);
  saferclip::PreservationProblem problem = {
      .text = t.data_ptr(),
      .image = v.data_ptr(),
      .frozen_text = ft.data_ptr(),
      .frozen_image = fv.data_ptr(),
      .batch = batch,
      .dim = text.size(1),
      .type = kernel_dtype(kOp, t),
      .frozen_text_type = kernel_dtype(kOp, ft),
      .frozen_image_type = kernel_dtype(kOp, fv),
      .weights = {},
      .logit_scale = static_cast<float>(logit_scale),
      .need_grad = need_grad,
      .slice_bytes = saferclip::kSliceOfWeights,
  };
  for (int i = 0; i < 4; ++i) problem.weights[i] = static_cast<float>(weights[i]);
  Tensor space = workspace(text, saferclip::preservation_loss_workspace_bytes(problem));
  check_queued(kOp, saferclip::preservation_loss(problem, space.data_ptr(), out.loss.mutable_data_ptr<float>(),
                                                 out.terms.mutable_data_ptr<float>(), out.grad_text.data_ptr(),
                                                 out.grad_image.data_ptr(),
                                                 current_stream(text.get_device_index())));
  return out.result();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saferclip_fast, CUDA, m) {
  m.impl("preservation_loss", TORCH_BOX(&preservation_loss_cuda));
}
