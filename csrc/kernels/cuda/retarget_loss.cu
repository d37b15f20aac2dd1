// Launcher of retarget_loss.
#include "retarget_loss.cuh"

#include <cstring>

namespace saferclip {

int64_t retarget_loss_workspace_bytes(int64_t batch) { return batch * static_cast<int64_t>(sizeof(Vec16)); }

int retarget_loss(const RetargetProblem& p, void* workspace, float* loss, float* terms, void* grad_text,
                  void* grad_image, void* stream) {
  auto matrix = [&](const void* data, DType type) { return HostMatrix{data, type}.on_device(p.dim); };
  Vec16* row_terms = static_cast<Vec16*>(workspace);
  name_buffer(row_terms, retarget_loss_workspace_bytes(p.batch), "row terms");
  RetargetArguments a = {matrix(p.text, p.type),
                         matrix(p.image, p.type),
                         matrix(p.frozen_text, p.frozen_text_type),
                         matrix(p.frozen_image, p.frozen_image_type),
                         matrix(p.bank_text, p.bank_text_type),
                         matrix(p.bank_image, p.bank_image_type),
                         p.neighbors,
                         p.neighbor_weights,
                         p.row_weights,
                         p.batch,
                         p.rows,
                         p.k,
                         {p.weights[0], p.weights[1], p.weights[2], p.weights[3]},
                         p.beta,
                         p.margin,
                         p.current_negative,
                         p.need_grad,
                         static_cast<uint8_t*>(grad_text),
                         static_cast<uint8_t*>(grad_image),
                         row_terms};
  // The gradients are new tensors, so they are aligned whenever their rows are.
  const unsigned blocks = static_cast<unsigned>(ceil_div(p.batch, kRetargetRows));
  if (int error = launch(static_cast<Stream>(stream), retarget_kernel, dim3(blocks), kRetargetThreads,
                         retarget_shared_bytes(p.dim), a)) {
    return error;
  }
  Vec16 weights;
  std::memcpy(&weights, p.weights, sizeof(weights));
  return launch(static_cast<Stream>(stream), reduce_terms_kernel, dim3(1), kReduceThreads,
                kReduceSharedBytes, row_terms, p.batch, 1.0, weights, loss, terms);
}

}  // namespace saferclip
