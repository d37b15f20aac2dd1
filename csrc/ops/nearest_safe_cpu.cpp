// torch.ops.saferclip_fast.nearest_safe and pack_bank on CPU tensors.
#include "kernels/cpu/nearest_safe.h"
#include "kernels/cpu/packed_bank.h"
#include "kernels/limits.h"
#include "ops/cpu_glue.h"

namespace {

using namespace saferclip;

std::tuple<Tensor, Tensor> nearest_safe_cpu(const Tensor& query, const Tensor& bank, int64_t k,
                                            std::optional<Tensor> packed) {
  const Tensor q = dense(query), b = dense(bank);
  const cpu::Matrix query_matrix = matrix_of("query", q), bank_matrix = matrix_of("bank", b);
  STD_TORCH_CHECK(query_matrix.dim == bank_matrix.dim, "query has d=", query_matrix.dim,
                  " but bank has d=", bank_matrix.dim);
  STD_TORCH_CHECK(k >= 1 && k <= kMaxNeighbors && k <= bank_matrix.rows, "k=", k, " must lie between 1 and min(",
                  bank_matrix.rows, " bank rows, ", kMaxNeighbors, ")");
  STD_TORCH_CHECK(bank_matrix.rows < (int64_t{1} << 31), "bank has too many rows for the cpu backend");
  const uint8_t* blob = nullptr;
  Tensor p;
  if (packed.has_value()) {
    p = dense(*packed);
    blob = static_cast<const uint8_t*>(p.const_data_ptr());
    STD_TORCH_CHECK(p.scalar_type() == ScalarType::Byte &&
                        cpu::packed_matches(blob, p.numel(), bank_matrix.rows, bank_matrix.dim),
                    "packed is not pack_bank(bank) of this bank; pack it again");
  }
  Tensor scores = new_tensor<2>(ScalarType::Float, {query_matrix.rows, k});
  Tensor indices = new_tensor<2>(ScalarType::Long, {query_matrix.rows, k});
  cpu::nearest_safe(query_matrix, bank_matrix, blob, static_cast<int>(k),
                    static_cast<float*>(scores.mutable_data_ptr()),
                    static_cast<int64_t*>(indices.mutable_data_ptr()),
                    threads_for(query_matrix.rows * bank_matrix.rows * bank_matrix.dim));
  return {scores, indices};
}

Tensor pack_bank_cpu(const Tensor& bank) {
  const Tensor b = dense(bank);
  const cpu::Matrix matrix = matrix_of("bank", b);
  STD_TORCH_CHECK(matrix.dim <= cpu::kMaxPackedDim, "bank has d=", matrix.dim, "; a packed bank takes d <= ",
                  cpu::kMaxPackedDim);
  Tensor blob = torch::stable::new_empty(bank, {cpu::packed_size(matrix.rows, matrix.dim)}, ScalarType::Byte);
  cpu::pack_bank(matrix, static_cast<uint8_t*>(blob.mutable_data_ptr()),
                 threads_for(matrix.rows * matrix.dim));
  return blob;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saferclip_fast, CPU, m) {
  m.impl("nearest_safe", TORCH_BOX(&nearest_safe_cpu));
  m.impl("pack_bank", TORCH_BOX(&pack_bank_cpu));
}
