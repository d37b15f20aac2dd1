// torch.ops.saferclip_fast.nearest_safe and pack_bank on CUDA tensors.
#include "cuda_glue.h"
#include "kernels/cuda/nearest_safe.h"

namespace {

using namespace saferclip::cuda_glue;

constexpr int64_t kMaxBankRows = (int64_t{1} << 31) - 4096;  // rows are numbered by int32 in the kernels

void check_bank(const char* op, const Tensor& bank) {
  STD_TORCH_CHECK(bank.dim() == 2 && bank.size(0) > 0 && bank.size(0) <= kMaxBankRows, op,
                  ": bank must be [rows, d] with 1 to ", kMaxBankRows, " rows");
  STD_TORCH_CHECK(bank.size(1) > 0 && bank.size(1) <= saferclip::kMaxSearchDim, op, ": d must be 1 to ",
                  saferclip::kMaxSearchDim, "; use backend=\"reference\"");
}

Tensor pack_bank_cuda(const Tensor& bank) {
  check_bank("pack_bank", bank);
  const torch::stable::accelerator::DeviceGuard guard(bank.get_device_index());
  const Tensor dense = torch::stable::contiguous(bank);
  Tensor packed =
      torch::stable::new_empty(dense, {saferclip::packed_bank_bytes(dense.size(0), dense.size(1))}, ScalarType::Byte);
  check_queued("pack_bank",
               saferclip::pack_bank(dense.data_ptr(), kernel_dtype("pack_bank", dense), dense.size(0), dense.size(1),
                                    packed.data_ptr(), current_stream(bank.get_device_index())));
  return packed;
}

std::tuple<Tensor, Tensor> nearest_safe_cuda(const Tensor& query, const Tensor& bank, int64_t k,
                                             std::optional<Tensor> packed) {
  constexpr const char* kOp = "nearest_safe";
  check_bank(kOp, bank);
  check_matrix(kOp, "query", query, bank, query.dim() == 2 ? query.size(0) : -1);
  STD_TORCH_CHECK(k >= 1 && k <= bank.size(0) && k <= saferclip::kMaxNeighbors, kOp, ": k must be 1 to min(rows, ",
                  saferclip::kMaxNeighbors, "), got ", k, "; use backend=\"reference\" for more");
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Tensor q = torch::stable::contiguous(query), s = torch::stable::contiguous(bank);
  Tensor blob;
  if (packed) {
    blob = aligned(*packed);
    check_device(kOp, "packed", blob, query);
    STD_TORCH_CHECK(blob.scalar_type() == ScalarType::Byte &&
                        blob.numel() == saferclip::packed_bank_bytes(s.size(0), s.size(1)),
                    kOp, ": packed must be what pack_bank(bank) gave for this bank on this device");
  }
  Tensor scores = torch::stable::new_empty(q, {q.size(0), k}, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(q, {q.size(0), k}, ScalarType::Long);
  if (q.size(0) == 0) return {scores, indices};
  const saferclip::NearestProblem problem = {q.data_ptr(),
                                             s.data_ptr(),
                                             packed ? blob.data_ptr() : nullptr,
                                             q.size(0),
                                             s.size(0),
                                             s.size(1),
                                             static_cast<int>(k),
                                             kernel_dtype(kOp, q),
                                             kernel_dtype(kOp, s)};
  Tensor space = workspace(q, saferclip::nearest_safe_workspace_bytes(problem));
  check_queued(kOp, saferclip::nearest_safe(problem, space.data_ptr(), scores.mutable_data_ptr<float>(),
                                            indices.mutable_data_ptr<int64_t>(),
                                            current_stream(query.get_device_index())));
  return {scores, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saferclip_fast, CUDA, m) {
  m.impl("nearest_safe", TORCH_BOX(&nearest_safe_cuda));
  m.impl("pack_bank", TORCH_BOX(&pack_bank_cuda));
}
