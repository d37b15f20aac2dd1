// Exact top-k cosine search on the GPU (method.md, "Exact search faster than fp32 matrix
// multiplication"). Torch-free: raw device pointers in and out, everything queued on one stream.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/limits.h"

namespace saferclip {

struct NearestProblem {
  const void* query;   // [queries, dim], rows of any scale
  const void* bank;    // [rows, dim]
  const void* packed;  // what pack_bank wrote, or null
  int64_t queries, rows, dim;
  int k;  // 1 ... kMaxNeighbors
  DType query_type, bank_type;
};

constexpr int64_t kMaxSearchDim = 4096;

int64_t packed_bank_bytes(int64_t rows, int64_t dim);
int64_t nearest_safe_workspace_bytes(const NearestProblem& problem);

// Both return a cudaError_t (0: queued). All pointers are device pointers, 16-byte aligned workspace.
int pack_bank(const void* bank, DType bank_type, int64_t rows, int64_t dim, void* packed, void* stream);
int nearest_safe(const NearestProblem& problem, void* workspace, float* scores, int64_t* indices,
                 void* stream);

}  // namespace saferclip
