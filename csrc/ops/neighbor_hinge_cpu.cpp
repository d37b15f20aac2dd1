// torch.ops.saferclip_fast.neighbor_hinge on CPU tensors.
#include "kernels/cpu/neighbor_hinge.h"

#include "ops/cpu_glue.h"

namespace {

using namespace saferclip;

std::tuple<Tensor, Tensor, Tensor> neighbor_hinge_cpu(const Tensor& x, const Tensor& rows, const Tensor& indices,
                                                      const Tensor& scores, const Tensor& row_weights, double margin,
                                                      int64_t k, bool need_grad) {
  const Tensor rows_of_x = dense(x), bank = dense(rows);
  const Tensor index = dense(indices, ScalarType::Long), score = dense(scores, ScalarType::Float);
  const Tensor weight = dense(row_weights, ScalarType::Float);
  const cpu::Matrix x_matrix = matrix_of("x", rows_of_x), bank_matrix = matrix_of("rows", bank);
  const int64_t batch = x_matrix.rows, width = x_matrix.dim;
  STD_TORCH_CHECK(index.dim() == 2, "indices must have shape [", batch, ", found]");
  const int64_t found = index.size(1);
  check_shape("rows", bank, bank_matrix.rows, width + 2);
  check_shape("indices", index, batch, found);
  check_shape("scores", score, batch, found);
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == batch, "row_weights must have shape [", batch, "]");
  STD_TORCH_CHECK(k > 0, "k must be positive");
  const int64_t* neighbors = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t i = 0; i < batch * found; ++i) {
    STD_TORCH_CHECK(neighbors[i] >= 0 && neighbors[i] < bank_matrix.rows, "neighbor ", neighbors[i],
                    " is outside the bank of ", bank_matrix.rows, " rows");
  }
  Tensor loss = new_tensor<0>(ScalarType::Float, {});
  Tensor values = new_tensor<1>(ScalarType::Float, {batch});
  Tensor grad = torch::stable::new_empty(x, {need_grad ? batch : 0, width});
  const cpu::HingeArgs args{
      .x = x_matrix,
      .rows = bank_matrix,
      .indices = neighbors,
      .scores = static_cast<const float*>(score.const_data_ptr()),
      .row_weights = static_cast<const float*>(weight.const_data_ptr()),
      .found = found,
      .margin = margin,
      .k = k,
      .values = static_cast<float*>(values.mutable_data_ptr()),
      .grad = need_grad ? grad.mutable_data_ptr() : nullptr,
  };
  const double total = cpu::neighbor_hinge(args, threads_for(batch * width * (found + 4)));
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(total);
  return {loss, values, grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saferclip_fast, CPU, m) {
  m.impl("neighbor_hinge", TORCH_BOX(&neighbor_hinge_cpu));
}
