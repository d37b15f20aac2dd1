// Pass 2 of nearest_safe: scores the survivors of the screen exactly and orders them.
// A score is fp32(<q, s> / |q|) with products and sums in double (products of fp32 are exact there).
// One block a query; the result depends only on the set of rows scored, not on their order.
#pragma once

#include "matrix.cuh"
#include "screen.cuh"

namespace saferclip {

constexpr int kRescoreThreads = 128;
constexpr int kPending = 512;  // rows gathered before they are scored
constexpr int kKeys = 1024;    // a power of two, at least kMaxNeighbors + kPending

struct RescoreProblem {
  Matrix query, bank;
  int64_t bank_rows, rows_per_split;
  Global<const double> norms;
  int k;
  Global<float> scores;     // [queries, k]
  Global<int64_t> indices;  // [queries, k]
};

// Larger key = better: score first, then the lower index. NaN sorts under everything.
__device__ __forceinline__ uint64_t make_key(float score, int index) {
  const uint32_t bits = __float_as_uint(score + 0.0f);  // -0 becomes +0
  const uint32_t ordered = score != score ? 0u : (bits >> 31 ? ~bits : bits | 0x80000000u);
  return static_cast<uint64_t>(ordered) << 32 | static_cast<uint32_t>(~index);
}
__device__ __forceinline__ float key_score(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  return __uint_as_float(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}
__device__ __forceinline__ int key_index(uint64_t key) { return static_cast<int>(~static_cast<uint32_t>(key)); }

__device__ __forceinline__ float exact_score(const Matrix& bank, int64_t row, Shared<const float> query,
                                             double norm) {
  double sum = 0.0;
  for (int chunk = threadIdx.x % kWarpSize; chunk * 8 < bank.dim; chunk += kWarpSize) {
    float s[8];
    load8(bank, row, chunk, s);
    const Vec16 low = as<const Vec16>(query)[chunk * 2], high = as<const Vec16>(query)[chunk * 2 + 1];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float q = __uint_as_float(i < 4 ? low.word[i % 4] : high.word[i % 4]);
      sum = fma(static_cast<double>(q), static_cast<double>(s[i]), sum);
    }
  }
  return static_cast<float>(warp_sum(sum) / norm);
}

// Sorts keys[0, count) descending by the block; count <= kKeys. Bitonic, over a power of two.
__device__ __forceinline__ void sort_keys(Shared<uint64_t> keys, int count) {
  int size = 2;
  while (size < count) size *= 2;
  for (int i = count + threadIdx.x; i < size; i += kRescoreThreads) keys[i] = 0;
  __syncthreads();
  for (int width = 2; width <= size; width *= 2) {
    for (int step = width / 2; step > 0; step /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += kRescoreThreads) {
        const int low = i / step * step * 2 + i % step, high = low + step;
        const uint64_t a = keys[low], b = keys[high];
        const bool descending = (low & width) == 0;
        if (descending ? a < b : a > b) keys[low] = b, keys[high] = a;
      }
      __syncthreads();
    }
  }
}

struct RescoreState {
  Shared<uint64_t> keys;  // [kKeys]
  Shared<int> pending;    // [kPending]
  Shared<int> counts;     // [0]: entries of pending; [1 + warp]: scratch of block_sum
  Shared<float> query;    // [dim rounded up to 8]
};
__device__ __forceinline__ RescoreState rescore_state(Shared<uint8_t> shared) {
  const Shared<uint8_t> pending = shared + kKeys * 8, counts = pending + kPending * 4;
  return {as<uint64_t>(shared), as<int>(pending), as<int>(counts), as<float>(counts + 32)};
}
constexpr int64_t rescore_shared_bytes(int64_t dim) {
  return kKeys * 8 + kPending * 4 + 32 + round_up(dim, 8) * 4;
}

template <class T, class Combine>
__device__ __forceinline__ T block_reduce(T x, Shared<T> scratch, Combine combine) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(kFullMask, x, step));
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  x = scratch[0];
  for (int warp = 1; warp < kRescoreThreads / kWarpSize; ++warp) {
    x = combine(x, static_cast<T>(scratch[warp]));
  }
  return x;
}

// Scores the pending rows, merges them into the sorted best k; returns how many keys there are now.
__device__ __forceinline__ int score_pending(const RescoreProblem& problem, RescoreState state, double norm,
                                             int filled) {
  const int count = state.counts[0];
  for (int i = threadIdx.x / kWarpSize; i < count; i += kRescoreThreads / kWarpSize) {
    const int row = state.pending[i];
    const float score = exact_score(problem.bank, row, state.query, norm);
    if (threadIdx.x % kWarpSize == 0) state.keys[filled + i] = make_key(score, row);
  }
  __syncthreads();
  if (threadIdx.x == 0) state.counts[0] = 0;
  sort_keys(state.keys, filled + count);
  return filled + count < problem.k ? filled + count : problem.k;
}

// The best threshold the lists of one query give together; -inf where they can't give one.
// `all_rows` is set if the lists cannot be trusted to hold k rows (NaN or Inf in the input).
__device__ __forceinline__ float joint_threshold(const Survivors& lists, int64_t query, int k,
                                                 RescoreState state, bool& all_rows) {
  float lo = -INFINITY, hi = -INFINITY;
  int total = 0;
  bool closed = false;
  for (int split = 0; split < lists.splits; ++split) {
    const int64_t list = query * lists.splits + split;
    const int count = lists.count[list];
    if (count > lists.capacity) {
      closed = true;
      continue;
    }
    total += count;
    lo = fmaxf(lo, lists.threshold[list]);
    for (int i = threadIdx.x; i < count; i += kRescoreThreads) {
      hi = fmaxf(hi, lower_bound(lists.entry, list * lists.capacity + i));
    }
  }
  all_rows = total < k && !closed;
  if (total < k || lists.splits == 1) return lo;
  hi = block_reduce(hi, as<float>(state.counts + 1), [](float a, float b) { return fmaxf(a, b); });
  if (lo == -INFINITY) return lo;  // no list alone has k rows: few rows in all, keep them
  return kth_largest(lo, hi, k, [&](float t) {
    int n = 0;
    for (int split = 0; split < lists.splits; ++split) {
      const int64_t list = query * lists.splits + split;
      const int count = lists.count[list];
      if (count > lists.capacity) continue;
      for (int i = threadIdx.x; i < count; i += kRescoreThreads) {
        n += lower_bound(lists.entry, list * lists.capacity + i) >= t;
      }
    }
    return block_reduce(n, state.counts + 1, [](int a, int b) { return a + b; });
  });
}

__global__ void __launch_bounds__(kRescoreThreads) rescore_kernel(RescoreProblem problem, Survivors lists) {
  const RescoreState state = rescore_state(dynamic_shared());
  const int64_t query = blockIdx.x;
  const double norm = problem.norms[query];
  const int k = problem.k;
  if (norm == 0.0) {  // scores 0 with every row: the lowest indices win
    for (int i = threadIdx.x; i < k; i += kRescoreThreads) {
      problem.scores[query * k + i] = 0.0f;
      problem.indices[query * k + i] = i;
    }
    return;
  }
  for (int chunk = threadIdx.x; chunk * 8 < problem.query.dim; chunk += kRescoreThreads) {
    float x[8];
    load8(problem.query, query, chunk, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) state.query[chunk * 8 + i] = x[i];
  }
  if (threadIdx.x == 0) state.counts[0] = 0;
  bool all_rows = false;
  const float threshold = joint_threshold(lists, query, k, state, all_rows);
  __syncthreads();

  int filled = 0;
  for (int split = 0; split < lists.splits; ++split) {
    const int64_t list = query * lists.splits + split, first = split * problem.rows_per_split;
    const int count = lists.count[list];
    const bool closed = count > lists.capacity || all_rows;
    const int64_t rows = problem.bank_rows - first < problem.rows_per_split ? problem.bank_rows - first
                                                                            : problem.rows_per_split;
    const int64_t length = closed ? rows : count;
    for (int64_t i = threadIdx.x; i < round_up(length, kRescoreThreads); i += kRescoreThreads) {
      Survivor entry = {INFINITY, INFINITY, static_cast<int>(first + i), 0};
      if (!closed && i < length) entry = lists.entry[list * lists.capacity + i];
      if (i < length && !(entry.upper < threshold)) {
        const int slot = atomicAdd(state.counts, 1);
        state.pending[slot] = entry.index;
      }
      __syncthreads();
      if (state.counts[0] > kPending - kRescoreThreads) filled = score_pending(problem, state, norm, filled);
      __syncthreads();
    }
  }
  filled = score_pending(problem, state, norm, filled);
  for (int i = threadIdx.x; i < k; i += kRescoreThreads) {
    const uint64_t key = state.keys[i];
    problem.scores[query * k + i] = key_score(key);
    problem.indices[query * k + i] = key_index(key);
  }
}

}  // namespace saferclip
