// torch.ops.saferclip_fast.retarget_loss on CPU tensors.
#include "kernels/cpu/retarget_loss.h"

#include <cstdint>
#include <vector>

#include "ops/cpu_glue.h"

namespace {

using namespace saferclip;

// Gradients above this size leave the caches anyway, so they are written past them.
constexpr int64_t kStreamBytes = 8 << 20;

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

std::tuple<Tensor, Tensor, Tensor, Tensor> retarget_loss_cpu(
    const Tensor& text, const Tensor& image, const Tensor& frozen_text, const Tensor& frozen_image,
    const Tensor& bank_text, const Tensor& bank_image, const Tensor& neighbors,
    const Tensor& neighbor_weights, const Tensor& row_weights, std::vector<double> weights,
    double beta, double margin, bool current_negative, bool need_grad) {
  STD_TORCH_CHECK(weights.size() == 4, "weights must have 4 entries");
  const int64_t batch = text.size(0), width = text.size(1), k = neighbors.size(1);
  // One storage type for the four inputs; mixed ones meet in float32.
  ScalarType dtype = text.scalar_type();
  for (const Tensor* x : {&image, &frozen_text, &frozen_image}) {
    check_shape("image, frozen_text and frozen_image", *x, batch, width);
    if (x->scalar_type() != dtype) dtype = ScalarType::Float;
  }
  const Tensor t = dense(text, dtype), v = dense(image, dtype);
  const Tensor ft = dense(frozen_text, dtype), fv = dense(frozen_image, dtype);
  const Tensor bt = dense(bank_text), bv = dense(bank_image);
  const Tensor index = dense(neighbors, ScalarType::Long);
  const Tensor nw = dense(neighbor_weights, ScalarType::Float);
  const Tensor rw = dense(row_weights, ScalarType::Float);
  const cpu::Matrix bank = matrix_of("bank_text", bt);
  check_shape("bank_image", bv, bank.rows, width);
  check_shape("bank_text", bt, bank.rows, width);
  check_shape("neighbors", index, batch, k);
  check_shape("neighbor_weights", nw, batch, k);
  check_shape("row_weights", rw, batch, 4);
  const int64_t* neighbor_rows = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t i = 0; i < batch * k; ++i) {
    STD_TORCH_CHECK(neighbor_rows[i] >= 0 && neighbor_rows[i] < bank.rows, "neighbor ", neighbor_rows[i],
                    " is outside the bank of ", bank.rows, " rows");
  }

  Tensor grad_text = torch::stable::new_empty(text, {need_grad ? batch : 0, width}, dtype);
  Tensor grad_image = torch::stable::new_empty(text, {need_grad ? batch : 0, width}, dtype);
  void* grads[2] = {grad_text.mutable_data_ptr(), grad_image.mutable_data_ptr()};
  const int64_t grad_bytes = batch * width * element_size(kernel_dtype("text", t));
  const cpu::RetargetArgs args{
      .text = t.const_data_ptr(),
      .image = v.const_data_ptr(),
      .frozen_text = ft.const_data_ptr(),
      .frozen_image = fv.const_data_ptr(),
      .dtype = kernel_dtype("text", t),
      .bank_text = bank,
      .bank_image = matrix_of("bank_image", bv),
      .neighbors = neighbor_rows,
      .neighbor_weights = static_cast<const float*>(nw.const_data_ptr()),
      .row_weights = static_cast<const float*>(rw.const_data_ptr()),
      .batch = batch,
      .dim = width,
      .k = k,
      .weights = {static_cast<float>(weights[0]), static_cast<float>(weights[1]),
                  static_cast<float>(weights[2]), static_cast<float>(weights[3])},
      .beta = static_cast<float>(beta),
      .margin = static_cast<float>(margin),
      .current_negative = current_negative,
      .grad_text = need_grad ? grads[0] : nullptr,
      .grad_image = need_grad ? grads[1] : nullptr,
      .stream = grad_bytes > kStreamBytes && width % 16 == 0 && aligned(grads[0]) && aligned(grads[1]),
  };
  double sums[4];
  cpu::retarget_loss(args, sums, threads_for(batch * width * (20 + 2 * k)));

  Tensor terms = torch::stable::new_empty(text, {4}, ScalarType::Float);
  Tensor loss = torch::stable::new_empty(text, {}, ScalarType::Float);
  double total = 0;
  for (int j = 0; j < 4; ++j) {
    static_cast<float*>(terms.mutable_data_ptr())[j] = static_cast<float>(sums[j]);
    total += weights[j] * sums[j];
  }
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(total);
  return {loss, terms, dense(grad_text, text.scalar_type()),
          dense(grad_image, text.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saferclip_fast, CPU, m) {
  m.impl("retarget_loss", TORCH_BOX(&retarget_loss_cpu));
}
