// preservation_loss.cu as a host library.
#include "harness.h"
#include "preservation_loss.cu"

EXPORT int64_t run_workspace_bytes(const saferclip::PreservationProblem* p) {
  return saferclip::preservation_loss_workspace_bytes(*p);
}
EXPORT int run_preservation_loss(const saferclip::PreservationProblem* p, void* workspace, float* loss,
                                 float* terms, void* grad_text, void* grad_image, char* message, int size) {
  return report_faults(message, size, [&] {
    return saferclip::preservation_loss(*p, workspace, loss, terms, grad_text, grad_image, nullptr);
  });
}
