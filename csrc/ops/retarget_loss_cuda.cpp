// torch.ops.saferclip_fast.retarget_loss on CUDA tensors.
#include "cuda_glue.h"
#include "kernels/cuda/retarget_loss.h"

namespace {

using namespace saferclip::cuda_glue;

std::tuple<Tensor, Tensor, Tensor, Tensor> retarget_loss_cuda(
    const Tensor& text, const Tensor& image, const Tensor& frozen_text, const Tensor& frozen_image,
    const Tensor& bank_text, const Tensor& bank_image, const Tensor& neighbors, const Tensor& neighbor_weights,
    const Tensor& row_weights, std::vector<double> weights, double beta, double margin, bool current_negative,
    bool need_grad) {
  constexpr const char* kOp = "retarget_loss";
  STD_TORCH_CHECK(weights.size() == 4, kOp, ": weights must have 4 entries");
  STD_TORCH_CHECK(text.dim() == 2 && neighbors.dim() == 2, kOp, ": text must be [B, d], neighbors [B, k]");
  const int64_t batch = text.size(0), k = neighbors.size(1), rows = bank_text.size(0);
  check_matrix(kOp, "image", image, text, batch);
  check_matrix(kOp, "frozen_text", frozen_text, text, batch);
  check_matrix(kOp, "frozen_image", frozen_image, text, batch);
  check_matrix(kOp, "bank_text", bank_text, text, rows);
  check_matrix(kOp, "bank_image", bank_image, text, rows);
  STD_TORCH_CHECK(image.scalar_type() == text.scalar_type(), kOp, ": text and image must have one dtype");
  STD_TORCH_CHECK(neighbors.scalar_type() == ScalarType::Long && neighbors.size(0) == batch, kOp,
                  ": neighbors must be int64 [", batch, ", k]");
  STD_TORCH_CHECK(neighbor_weights.numel() == batch * k && row_weights.numel() == batch * 4, kOp,
                  ": neighbor_weights must be [", batch, ", ", k, "] and row_weights [", batch, ", 4]");
  check_device(kOp, "neighbors", neighbors, text);
  check_device(kOp, "neighbor_weights", neighbor_weights, text);
  check_device(kOp, "row_weights", row_weights, text);
  STD_TORCH_CHECK(text.size(1) > 0 && text.size(1) <= saferclip::kMaxRetargetDim && rows > 0, kOp,
                  ": d must be 1 to ", saferclip::kMaxRetargetDim, " and the bank not empty");
  const torch::stable::accelerator::DeviceGuard guard(text.get_device_index());
  const LossOutputs out(text, need_grad);
  if (batch == 0) return out.zero();
  const Tensor t = torch::stable::contiguous(text), v = torch::stable::contiguous(image);
  const Tensor ft = torch::stable::contiguous(frozen_text), fv = torch::stable::contiguous(frozen_image);
  const Tensor bt = torch::stable::contiguous(bank_text), bv = torch::stable::contiguous(bank_image);
  const Tensor index = torch::stable::contiguous(neighbors);
  const Tensor nw = torch::stable::contiguous(torch::stable::to(neighbor_weights, ScalarType::Float));
  const Tensor rw = aligned(torch::stable::to(row_weights, ScalarType::Float));
  saferclip::RetargetProblem problem = {
      .text = t.data_ptr(),
      .image = v.data_ptr(),
      .frozen_text = ft.data_ptr(),
      .frozen_image = fv.data_ptr(),
      .bank_text = bt.data_ptr(),
      .bank_image = bv.data_ptr(),
      .neighbors = index.const_data_ptr<int64_t>(),
      .neighbor_weights = nw.const_data_ptr<float>(),
      .row_weights = rw.const_data_ptr<float>(),
      .batch = batch,
      .dim = text.size(1),
      .rows = rows,
      .k = static_cast<int>(k),
      .type = kernel_dtype(kOp, t),
      .frozen_text_type = kernel_dtype(kOp, ft),
      .frozen_image_type = kernel_dtype(kOp, fv),
      .bank_text_type = kernel_dtype(kOp, bt),
      .bank_image_type = kernel_dtype(kOp, bv),
      .weights = {},
      .beta = static_cast<float>(beta),
      .margin = static_cast<float>(margin),
      .current_negative = current_negative,
      .need_grad = need_grad,
  };
  for (int i = 0; i < 4; ++i) problem.weights[i] = static_cast<float>(weights[i]);
  Tensor space = workspace(text, saferclip::retarget_loss_workspace_bytes(batch));
  check_queued(kOp, saferclip::retarget_loss(problem, space.data_ptr(), out.loss.mutable_data_ptr<float>(),
                                             out.terms.mutable_data_ptr<float>(), out.grad_text.data_ptr(),
                                             out.grad_image.data_ptr(), current_stream(text.get_device_index())));
  return out.result();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saferclip_fast, CUDA, m) { m.impl("retarget_loss", TORCH_BOX(&retarget_loss_cuda)); }
