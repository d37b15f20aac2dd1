// torch.ops.saferclip_fast.info_nce_sums and info_nce_loss on CPU tensors.
#include "kernels/cpu/info_nce.h"

#include <optional>

#include "ops/cpu_glue.h"

namespace {

using namespace saferclip;

// The tensors that both ops read, in the layout of the kernels.
struct Inputs {
  Inputs(const Tensor& x_in, const Tensor& y_in, const std::optional<Tensor>& mask_in, int64_t first,
         double logit_scale)
      : x(dense(x_in)), y(dense(y_in)) {
    const int64_t rows = x.size(0), all = y.size(0);
    check_shape("y", y, all, x.size(1));
    STD_TORCH_CHECK(first >= 0 && first + rows <= all, "rows ", first, " to ", first + rows, " are outside the ",
                    all, " rows of y");
    if (mask_in.has_value()) {
      STD_TORCH_CHECK(mask_in->dim() == 1 && mask_in->size(0) == all, "mask must have shape [", all, "]");
      mask = dense(*mask_in, ScalarType::Bool);
    }
    args = {matrix_of("x", x), matrix_of("y", y), first,
            mask.has_value() ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr,
            static_cast<float>(logit_scale)};
  }

  cpu::Parallel threads() const { return threads_for(args.x.rows * args.y.rows * args.x.dim); }

  Tensor x, y;
  std::optional<Tensor> mask;
  cpu::InfoNceArgs args;
};

float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor> info_nce_sums_cpu(const Tensor& x, const Tensor& y, std::optional<Tensor> mask,
                                                     int64_t first, double logit_scale, bool keep) {
  const Inputs in(x, y, mask, first, logit_scale);
  const int64_t rows = in.args.x.rows, all = in.args.y.rows;
  Tensor row_sums = new_tensor<2>(ScalarType::Float, {3, rows});
  Tensor column_sums = new_tensor<2>(ScalarType::Float, {2, all});
  Tensor logits = new_tensor<2>(ScalarType::Float, {keep ? rows : 0, all});
  const cpu::Parallel threads = in.threads();
  cpu::InfoNce(in.args, threads).log_sums({floats(row_sums), floats(column_sums), keep ? floats(logits) : nullptr});
  return {row_sums, column_sums, logits};
}

std::tuple<Tensor, Tensor> info_nce_loss_cpu(const Tensor& x, const Tensor& y, std::optional<Tensor> mask,
                                             const Tensor& rows, const Tensor& columns, const Tensor& logits,
                                             int64_t first, double logit_scale, bool need_grad) {
  const Inputs in(x, y, mask, first, logit_scale);
  const int64_t count = in.args.x.rows, all = in.args.y.rows;
  const Tensor row_sums = dense(rows, ScalarType::Float), column_sums = dense(columns, ScalarType::Float);
  const Tensor kept = dense(logits, ScalarType::Float);
  check_shape("rows", row_sums, 3, count);
  check_shape("columns", column_sums, 2, all);
  const bool has_logits = kept.size(0) > 0;
  if (has_logits) check_shape("logits", kept, count, all);
  Tensor grad = torch::stable::new_empty(x, {need_grad ? count : 0, x.size(1)});
  const cpu::LogSums sums{floats(row_sums), floats(column_sums), has_logits ? floats(kept) : nullptr};
  const cpu::Parallel threads = in.threads();
  cpu::InfoNce nce(in.args, threads);
  Tensor loss = new_tensor<0>(ScalarType::Float, {});
  *floats(loss) = static_cast<float>(nce.loss(sums));
  if (need_grad) {
    nce.gradient({.sums = sums, .nce_weight = 1, .own = nullptr, .pull = 0, .grad = grad.mutable_data_ptr()});
  }
  return {loss, grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saferclip_fast, CPU, m) {
  m.impl("info_nce_sums", TORCH_BOX(&info_nce_sums_cpu));
  m.impl("info_nce_loss", TORCH_BOX(&info_nce_loss_cpu));
}
