// Pass 1 of nearest_safe: tensor cores score every (query, bank row) pair approximately, and a pair is
// kept only if it may belong to the top k.
//
// With q the unit query and q', s' what the tensor cores multiply (rows in fp16 or bf16, times a scale):
//   |<q, s> - <q', s'>| <= |q - q'| |s| + |q'| |s - s'|  (+ rounding, see kRoundingSlack),
// from norms measured per row. The k-th largest lower bound so far is a threshold that no member of
// the top k can have its upper bound under, so what is dropped is never missed. Per (query, split of
// the bank) the survivors go to a list of fixed capacity; a list that fills up is marked closed, and
// pass 2 (rescore.cuh) then scores all rows of that split.
#pragma once

#include "matrix.cuh"
#include "tile.cuh"

namespace saferclip {

// Per-row facts, one 16-byte load: row' = scale * stored row; norm >= |row|; error >= |row - row'|. convert_row also gives
// stored_norm >= |row'|, which becomes the norm on the query side; in memory it is 0.
struct alignas(16) RowBound {
  float scale, norm, error, stored_norm;
};

// fp32 roundings of scale, product, bounds and unit query, and the one fp32 rounding within which
// scores tie: fewer than 16 of 2^-24 each.
constexpr float kRoundingSlack = 0x1p-20f;
constexpr float kTiny = 1e-30f;  // floor of norm and error: keeps the slack meaningful for denormals
constexpr float kInflate = 1.0f + 0x1p-20f;
constexpr int kRowThreads = 128;  // kernels with a warp a row

// mma adds 17 terms, each cut off at 2^-23 of the largest (Fasi et al. 2021), a step of 16 deep.
__device__ __forceinline__ float accumulation_error(int dim) {
  return 1.25f * 0x1p-23f * static_cast<float>(dim + 16);
}

// First word of a packed bank; a blob without it is not used and every row is scored exactly instead.
constexpr uint64_t kPackedMagic = 0x31'44'55'43'46'53ull;  // "SFCUD1", the version last

struct RowSize {
  float largest;
  double norm;
};
__device__ __forceinline__ RowSize measure_row(const Matrix& matrix, int64_t row) {
  const int lane = threadIdx.x % kWarpSize;
  float largest = 0.0f;
  double square = 0.0;
  for (int chunk = lane; chunk * 8 < matrix.dim; chunk += kWarpSize) {
    float x[8];
    load8(matrix, row, chunk, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      largest = fmaxf(largest, fabsf(x[i]));
      square += static_cast<double>(x[i]) * x[i];
    }
  }
  return {warp_max(largest), sqrt(warp_sum(square))};
}

// Writes row * multiplier in the screening type S to `out`, zero-padded to row_bytes; returns its bounds.
// Stored relative to the largest element, so rows of any scale use the range of fp16 alike.
template <class S>
__device__ __forceinline__ RowBound convert_row(const Matrix& matrix, int64_t row, RowSize size, double multiplier,
                                                Global<uint8_t> out, int64_t row_bytes) {
  const float scale = static_cast<float>(size.largest * multiplier);
  double lost = 0.0, kept = 0.0;
  for (int chunk = threadIdx.x % kWarpSize; chunk * 16 < row_bytes; chunk += kWarpSize) {
    float x[8] = {};
    if (chunk * 8 < matrix.dim) load8(matrix, row, chunk, x);
    Vec16 packed = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const double exact = x[i] * multiplier;
      const S rounded = from_float<S>(scale > 0.0f ? static_cast<float>(exact) / scale : 0.0f);
      packed.word[i / 2] |= static_cast<uint32_t>(rounded.bits) << 16 * (i % 2);
      const double value = static_cast<double>(scale) * to_float(rounded);
      lost += (exact - value) * (exact - value);
      kept += value * value;
    }
    as<Vec16>(out)[chunk] = packed;
  }
  return {scale, static_cast<float>(size.norm * multiplier) * kInflate,
          static_cast<float>(sqrt(warp_sum(lost))) * kInflate,
          static_cast<float>(sqrt(warp_sum(kept))) * kInflate};
}

// Bank rows: fp16 copy and bounds. One warp a row.
__global__ void __launch_bounds__(kRowThreads)
    pack_rows_kernel(Matrix bank, int64_t count, Global<uint8_t> out, int64_t row_bytes, Global<RowBound> bounds,
                     Global<uint64_t> header) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kRowThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (row == 0 && threadIdx.x == 0) header[0] = kPackedMagic, header[1] = static_cast<uint64_t>(count);
  if (row >= count) return;
  const RowSize size = measure_row(bank, row);
  const RowBound b = convert_row<fp16>(bank, row, size, 1.0, out + row * row_bytes, row_bytes);
  if (threadIdx.x % kWarpSize == 0) {
    bounds[row] = RowBound{b.scale, fmaxf(b.norm, kTiny), fmaxf(b.error, kTiny), 0.0f};
  }
}

// Bank rows that the tensor cores read as they are: bounds alone. One warp a row.
__global__ void __launch_bounds__(kRowThreads)
    bound_rows_kernel(Matrix bank, int64_t count, Global<RowBound> bounds) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kRowThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (row >= count) return;
  const RowSize size = measure_row(bank, row);
  if (threadIdx.x % kWarpSize == 0) {
    bounds[row] = RowBound{1.0f, fmaxf(static_cast<float>(size.norm) * kInflate, kTiny), 0.0f, 0.0f};
  }
}

// Unit queries in the screening type. Bounds are in units of the query's own scale: with them,
// margin(query, row) = norm * row.error + error * row.norm. A zero query gets scale 0. One warp a row.
template <class S>
__global__ void __launch_bounds__(kRowThreads, 8)
    prepare_query_kernel(Matrix query, int64_t count, Global<uint8_t> out, int64_t row_bytes,
                         Global<RowBound> bounds, Global<double> norms) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kRowThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (row >= count) return;
  const RowSize size = measure_row(query, row);
  const double inverse = size.norm > 0.0 ? 1.0 / size.norm : 0.0;
  const RowBound b = convert_row<S>(query, row, size, inverse, out + row * row_bytes, row_bytes);
  if (threadIdx.x % kWarpSize == 0) {
    const float unit = b.scale > 0.0f ? 1.0f / b.scale : 0.0f;
    const float error = b.error + accumulation_error(query.dim) + kRoundingSlack;
    bounds[row] = RowBound{size.norm == 0.0 ? 0.0f : b.scale, b.stored_norm * unit, error * unit, 0.0f};
    norms[row] = size.norm;
  }
}

struct alignas(16) Survivor {
  float upper, lower;  // bounds of the score, in units of the query's scale
  int index;           // of the bank row
  int unused;
};

// List (query, split) is entries [list * capacity, list * capacity + count), list = query * splits + split.
struct Survivors {
  Global<Survivor> entry;
  Global<int> count;        // of a list; above capacity: rows did not fit, it is closed and all are scored again
  Global<float> threshold;  // of a list: k of its lower bounds reach it
  int capacity, splits;
};

struct ScreenProblem {
  Operand query, bank;
  Global<const uint64_t> header;  // of the packed bank; null where the bank is read as it is
  Global<const RowBound> query_bound, bank_bound;
  int64_t rows_per_split;  // a multiple of kTile
  int k;
};

// Reads the 4 bytes of an entry's lower bound alone.
__device__ __forceinline__ float lower_bound(Global<Survivor> entries, int64_t i) {
  return as<const float>(entries)[i * 4 + 1];
}

// A t that at least k of the values counted by count_at_least reach, and close to the largest such t:
// bisection between lo, which k values reach, and hi.
template <class Count>
__device__ __forceinline__ float kth_largest(float lo, float hi, int k, Count count_at_least) {
  for (int step = 0; step < 16 && lo < hi; ++step) {
    const float middle = step == 0 && k == 1 ? hi : lo + (hi - lo) * 0.5f;
    if (middle <= lo) break;
    const int count = count_at_least(middle);
    if (count >= k) {
      lo = middle;
      if (count == k) break;
    } else {
      hi = middle;
    }
  }
  return lo;
}

// What a block of the screen keeps in shared memory next to the tiles, per query of its tile.
struct ScreenState {
  Shared<float> threshold, norm, error;
  Shared<int> count;
};
constexpr int kScreenSharedBytes = kTileSharedBytes + kTile * 16;

// Raises the threshold of one query and drops what falls under it. Called by a whole warp.
__device__ __forceinline__ void compact_list(const Survivors& lists, int64_t list, ScreenState state, int row,
                                             int k, bool last) {
  const int lane = threadIdx.x % kWarpSize;
  const int count = state.count[row];
  if (count > lists.capacity) {  // closed: nothing that follows can be kept
    if (lane == 0) state.threshold[row] = INFINITY;
    return;
  }
  const Global<Survivor> entries = lists.entry + list * lists.capacity;
  float threshold = state.threshold[row];
  if (count >= k) {
    float smallest = INFINITY, largest = -INFINITY;
    for (int i = lane; i < count; i += kWarpSize) {
      const float x = lower_bound(entries, i);
      smallest = fminf(smallest, x), largest = fmaxf(largest, x);
    }
    threshold = kth_largest(-warp_max(-smallest), warp_max(largest), k, [&](float t) {
      int n = 0;
      for (int i = lane; i < count; i += kWarpSize) n += lower_bound(entries, i) >= t;
      return warp_sum(n);
    });
  }
  int kept = 0;
  for (int first = 0; first < count; first += kWarpSize) {
    const int i = first + lane;
    Survivor entry = {};
    if (i < count) entry = entries[i];
    const bool keep = i < count && !(entry.upper < threshold);
    const unsigned votes = __ballot_sync(kFullMask, keep);
    __syncwarp();  // all have read these 32 entries before any is overwritten
    if (keep) entries[kept + __popc(votes & ((1u << lane) - 1))] = entry;
    kept += __popc(votes);
    __syncwarp();
  }
  if (lane == 0) {
    state.count[row] = kept;
    state.threshold[row] = threshold;
    if (last) lists.threshold[list] = threshold;
  }
}

// Grid: x = tiles of 128 queries, y = splits of the bank; neighbors in x read the same bank rows at
// about the same time, so the bank comes from L2.
template <class S>
__global__ void __launch_bounds__(kTileThreads, 2) screen_kernel(ScreenProblem problem, Survivors lists) {
  const Shared<uint8_t> shared = dynamic_shared();
  const Shared<float> floats = as<float>(shared + kTileSharedBytes);
  const ScreenState state = {floats, floats + kTile, floats + 2 * kTile, as<int>(floats + 3 * kTile)};
  const int64_t first_query = static_cast<int64_t>(blockIdx.x) * kTile;
  const int first_row = static_cast<int>(blockIdx.y * problem.rows_per_split);  // rows are numbered by int
  const int last_row = static_cast<int>(problem.bank.rows - first_row < problem.rows_per_split
                                            ? problem.bank.rows
                                            : first_row + problem.rows_per_split);
  const int tiles = static_cast<int>(ceil_div(last_row - first_row, kTile));
  const Global<Survivor> entries = lists.entry + (first_query * lists.splits + blockIdx.y) * lists.capacity;
  const int list_stride = lists.splits * lists.capacity;  // from a query's list of this split to the next query's

  if (threadIdx.x < kTile) {
    const int64_t query = first_query + threadIdx.x;
    RowBound bound = {};
    if (query < problem.query.rows) bound = problem.query_bound[query];
    const bool trusted = !problem.header || problem.header[0] == kPackedMagic;
    const bool wanted = trusted && !(bound.scale == 0.0f);  // not a zero query, not padding
    state.threshold[threadIdx.x] = wanted ? -INFINITY : INFINITY;
    state.norm[threadIdx.x] = bound.norm;
    state.error[threadIdx.x] = bound.error;
    state.count[threadIdx.x] = wanted ? 0 : lists.capacity + 1;
  }

  stream_tiles<S>(shared, problem.query, first_query, problem.bank, first_row, tiles, [&](int tile, auto& c) {
    const int tile_first = first_row + tile * kTile;
    const int rows = last_row - tile_first < kTile ? last_row - tile_first : kTile;
#pragma unroll
    for (int n = 0; n < 4; ++n) {  // two columns at a time: all eight bounds at once would spill
      const int column = tile_column(n, 0);
      const RowBound bank[2] = {problem.bank_bound[tile_first + (column < rows ? column : rows - 1)],
                                problem.bank_bound[tile_first + (column + 1 < rows ? column + 1 : rows - 1)]};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int query = tile_row(i / 2, i % 2 * 2);
        const float threshold = state.threshold[query], norm = state.norm[query], error = state.error[query];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float value = bank[j].scale * c[i / 2][n][i % 2 * 2 + j];
          const float margin = fmaf(norm, bank[j].error, error * bank[j].norm);
          if (value + margin < threshold || column + j >= rows) continue;  // a NaN goes on
          const int slot = atomicAdd(state.count + query, 1);
          if (slot >= lists.capacity) continue;  // closed
          entries[query * list_stride + slot] =
              Survivor{value + margin, value - margin, tile_first + column + j, 0};
        }
      }
    }
    __syncthreads();
    // Compact after tiles 0, 1, 3, 7, ...: the threshold then keeps up with what has been seen.
    const bool last = tile == tiles - 1, due = last || (tile & (tile + 1)) == 0;
    for (int query = threadIdx.x / kWarpSize; query < kTile; query += kTileThreads / kWarpSize) {
      const int count = state.count[query];
      if (!due && count <= lists.capacity - kTile) continue;
      const int64_t list = (first_query + query) * lists.splits + blockIdx.y;
      compact_list(lists, list, state, query, problem.k, last);
      __syncwarp();
      if (last && threadIdx.x % kWarpSize == 0 && first_query + query < problem.query.rows) {
        lists.count[list] = state.count[query];
      }
    }
  });
}

}  // namespace saferclip
