// torch.ops.saferclip_fast.nearest_safe and pack_bank on CPU tensors.
#include "kernels/cpu/nearest_safe.h"
#include "kernels/cpu/packed_bank.h"
#include "ops/cpu_glue.h"

namespace {

using namespace saferclip;

constexpr int64_t kMaxK = 256;

std::tuple<Tensor, Tensor> nearest_safe_cpu(const Tensor& query, const Tensor& bank, int64_t k,
                                            std::optional<Tensor> packed) {
  const Tensor q = dense(query), b = dense(bank);
  const cpu::Rows query_rows = rows_of("query", q), bank_rows = rows_of("bank", b);
  STD_TORCH_CHECK(query_rows.dim == bank_rows.dim, "query has d=", query_rows.dim,
                  " but bank has d=", bank_rows.dim);
  STD_TORCH_CHECK(k >= 1 && k <= kMaxK && k <= bank_rows.count, "k=", k, " must lie between 1 and min(",
                  bank_rows.count, " bank rows, ", kMaxK, ")");
  STD_TORCH_CHECK(bank_rows.count < (int64_t{1} << 31), "bank has too many rows for the cpu backend");
  const uint8_t* blob = nullptr;
  Tensor p;
  if (packed.has_value()) {
    p = dense(*packed);
    blob = static_cast<const uint8_t*>(p.const_data_ptr());
    STD_TORCH_CHECK(p.scalar_type() == ScalarType::Byte &&
                        cpu::packed_matches(blob, p.numel(), bank_rows.count, bank_rows.dim),
                    "packed is not pack_bank(bank) of this bank; pack it again");
  }
  Tensor scores = new_tensor<2>(ScalarType::Float, {query_rows.count, k});
  Tensor indices = new_tensor<2>(ScalarType::Long, {query_rows.count, k});
  cpu::nearest_safe(query_rows, bank_rows, blob, static_cast<int>(k),
                    static_cast<float*>(scores.mutable_data_ptr()),
                    static_cast<int64_t*>(indices.mutable_data_ptr()),
                    threads_for(query_rows.count * bank_rows.count * bank_rows.dim));
  return {scores, indices};
}

Tensor pack_bank_cpu(const Tensor& bank) {
  const Tensor b = dense(bank);
  const cpu::Rows rows = rows_of("bank", b);
  STD_TORCH_CHECK(rows.dim <= cpu::kMaxPackedDim, "bank has d=", rows.dim, "; a packed bank takes d <= ",
                  cpu::kMaxPackedDim);
  Tensor blob = torch::stable::new_empty(bank, {cpu::packed_size(rows.count, rows.dim)}, ScalarType::Byte);
  cpu::pack_bank(rows, static_cast<uint8_t*>(blob.mutable_data_ptr()),
                 threads_for(rows.count * rows.dim));
  return blob;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saferclip_fast, CPU, m) {
  m.impl("nearest_safe", TORCH_BOX(&nearest_safe_cpu));
  m.impl("pack_bank", TORCH_BOX(&pack_bank_cpu));
}
