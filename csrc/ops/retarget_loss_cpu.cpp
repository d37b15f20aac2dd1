// torch.ops.saferclip_fast.retarget_loss on CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "kernels/cpu/retarget_loss.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor to_float(const Tensor& x) {
  return torch::stable::contiguous(torch::stable::to(x, ScalarType::Float));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> retarget_loss_cpu(
    const Tensor& text, const Tensor& image, const Tensor& frozen_text, const Tensor& frozen_image,
    const Tensor& bank_text, const Tensor& bank_image, const Tensor& neighbors,
    const Tensor& neighbor_weights, const Tensor& row_weights, std::vector<double> weights,
    double beta, double margin, bool current_negative, bool need_grad) {
  STD_TORCH_CHECK(weights.size() == 4, "retarget_loss: weights must have 4 entries");
  const int64_t batch = text.size(0), width = text.size(1), k = neighbors.size(1);
  const Tensor t = to_float(text), v = to_float(image), ft = to_float(frozen_text);
  const Tensor fv = to_float(frozen_image), bt = to_float(bank_text), bv = to_float(bank_image);
  const Tensor index = torch::stable::contiguous(neighbors);
  const Tensor nw = to_float(neighbor_weights), rw = to_float(row_weights);

  const int64_t bank = bt.size(0);
  const int64_t* rows = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < batch * k; ++i)
    STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < bank, "retarget_loss: neighbor ", rows[i],
                    " is outside the bank of ", bank, " rows");

  Tensor grad_text = torch::stable::new_empty(t, {need_grad ? batch : 0, width});
  Tensor grad_image = torch::stable::new_empty(t, {need_grad ? batch : 0, width});
  std::vector<double> row_terms(4 * batch);
  saferclip::cpu::RetargetArgs args{
      .text = t.const_data_ptr<float>(),
      .image = v.const_data_ptr<float>(),
      .frozen_text = ft.const_data_ptr<float>(),
      .frozen_image = fv.const_data_ptr<float>(),
      .bank_text = bt.const_data_ptr<float>(),
      .bank_image = bv.const_data_ptr<float>(),
      .neighbors = rows,
      .neighbor_weights = nw.const_data_ptr<float>(),
      .row_weights = rw.const_data_ptr<float>(),
      .batch = batch,
      .width = width,
      .k = k,
      .weights = {static_cast<float>(weights[0]), static_cast<float>(weights[1]),
                  static_cast<float>(weights[2]), static_cast<float>(weights[3])},
      .beta = static_cast<float>(beta),
      .margin = static_cast<float>(margin),
      .current_negative = current_negative,
      .grad_text = need_grad ? grad_text.mutable_data_ptr<float>() : nullptr,
      .grad_image = need_grad ? grad_image.mutable_data_ptr<float>() : nullptr,
      .row_terms = row_terms.data(),
  };
  torch::stable::parallel_for(0, batch, 16, [&](int64_t begin, int64_t end) {
    saferclip::cpu::retarget_loss_rows(args, begin, end);
  });

  Tensor terms = torch::stable::new_empty(t, {4}), loss = torch::stable::new_empty(t, {});
  float* out = terms.mutable_data_ptr<float>();
  double total = 0;
  for (int j = 0; j < 4; ++j) {
    double sum = 0;
    for (int64_t i = 0; i < batch; ++i) sum += row_terms[4 * i + j];
    out[j] = static_cast<float>(sum);
    total += weights[j] * sum;
  }
  *loss.mutable_data_ptr<float>() = static_cast<float>(total);
  const ScalarType dtype = text.scalar_type();
  return {loss, terms, torch::stable::to(grad_text, dtype), torch::stable::to(grad_image, dtype)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saferclip_fast, CPU, m) {
  m.impl("retarget_loss", TORCH_BOX(&retarget_loss_cpu));
}
