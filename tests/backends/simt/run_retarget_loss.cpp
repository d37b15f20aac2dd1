// retarget_loss.cu as a host library.
#include "harness.h"
#include "retarget_loss.cu"

EXPORT int64_t run_workspace_bytes(int64_t batch) { return saferclip::retarget_loss_workspace_bytes(batch); }
EXPORT int run_retarget_loss(const saferclip::RetargetProblem* p, void* workspace, float* loss, float* terms,
                             void* grad_text, void* grad_image, char* message, int size) {
  return report_faults(message, size, [&] {
    return saferclip::retarget_loss(*p, workspace, loss, terms, grad_text, grad_image, nullptr);
  });
}
