// nearest_safe.cu as a host library.
#include "harness.h"
#include "nearest_safe.cu"

EXPORT int64_t run_packed_bank_bytes(int64_t rows, int64_t dim) { return saferclip::packed_bank_bytes(rows, dim); }
EXPORT int64_t run_workspace_bytes(const saferclip::NearestProblem* p) {
  return saferclip::nearest_safe_workspace_bytes(*p);
}
EXPORT int run_pack_bank(const void* bank, saferclip::DType type, int64_t rows, int64_t dim, void* packed, char* message, int size) {
  return report_faults(message, size, [&] { return saferclip::pack_bank(bank, type, rows, dim, packed, nullptr); });
}
EXPORT int run_nearest_safe(const saferclip::NearestProblem* p, void* workspace, float* scores, int64_t* indices,
                            char* message, int size) {
  return report_faults(message, size,
                       [&] { return saferclip::nearest_safe(*p, workspace, scores, indices, nullptr); });
}
