// The last step of both losses: four terms a row become four sums and a weighted total.
#pragma once

#include "device.cuh"

namespace saferclip {

constexpr int kReduceThreads = 512;
constexpr int kReduceSharedBytes = 4 * kReduceThreads * 8;

// Sums the rows' terms, times `factor`, in double, always in the same order. One block.
static __global__ void __launch_bounds__(kReduceThreads)
    reduce_terms_kernel(Global<const Vec16> row_terms, int64_t batch, double factor, Vec16 weights, Global<float> loss,
                        Global<float> terms) {
  const Shared<double> partial = as<double>(dynamic_shared());  // [4][kReduceThreads]
  double sum[4] = {};
#pragma unroll 8
  for (int64_t row = threadIdx.x; row < batch; row += kReduceThreads) {
    const Vec16 v = row_terms[row];
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += __uint_as_float(v.word[i]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) partial[i * kReduceThreads + threadIdx.x] = sum[i];
  for (int step = kReduceThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        partial[i * kReduceThreads + threadIdx.x] += partial[i * kReduceThreads + threadIdx.x + step];
      }
    }
  }
  if (threadIdx.x != 0) return;
  double total = 0.0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const double term = factor * partial[i * kReduceThreads];
    terms[i] = static_cast<float>(term);
    total += __uint_as_float(weights.word[i]) * term;
  }
  loss[0] = static_cast<float>(total);
}

}  // namespace saferclip
