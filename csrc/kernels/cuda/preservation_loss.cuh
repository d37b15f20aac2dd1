// Kernels of preservation_loss. With unit rows x (trainable) and y (frozen), S = logit_scale x y^T:
//   nce = mean_i (lse_j S_ij + lse_j S_ji) / 2 - S_ii
//   d nce / d x_i = logit_scale / (2 B) * sum_j (P + C - 2 I)_ij y_j,
//   P_ij = exp(S_ij - row lse_i), C_ij = exp(S_ij - column lse_j).
// S is never stored: both lse stream it (once as it is, once transposed), and the gradient recomputes
// it for a bounded number of rows at a time. No atomics: every sum has a fixed order.
// Rows enter the products as they are, unnormalized and unrounded; 1/|x| and 1/|y| are applied to S.
#pragma once

#include "matrix.cuh"
#include "preservation_loss.h"
#include "reduce.cuh"
#include "tile.cuh"

namespace saferclip {

constexpr int kRowKernelThreads = 128;  // kernels with a warp a row

// One of the four inputs in the product: tile operand and 1/|row| of every row.
struct UnitRows {
  Operand matrix;
  Global<const float> inverse;
};

struct RowFacts {  // [batch] each
  Global<float> inverse[4];  // 1/|row| of text, image, frozen text, frozen image
  Global<float> cosine[2];   // of text and image with their frozen selves
};

// S_ij from the product of the raw rows. Symmetric in the two inverses, so that both directions and
// the recomputation give the same bits: what must cancel (lse - S_ii, P + C - 2) then does.
__device__ __forceinline__ float logit(float product, float scale, float inverse_x, float inverse_y) {
  return scale * (product * (inverse_x * inverse_y));
}
__device__ __forceinline__ float exponential(float x) { return exp2f(x * 1.4426950408889634f); }  // x <= 0

__global__ void __launch_bounds__(kRowKernelThreads)
    row_facts_kernel(Matrix text, Matrix image, Matrix frozen_text, Matrix frozen_image, int64_t batch, RowFacts facts) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kRowKernelThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (row >= batch) return;
  float tt = 0, vv = 0, ff = 0, gg = 0, tf = 0, vg = 0;
  for (int chunk = lane; chunk * 8 < text.dim; chunk += kWarpSize) {
    float t[8], v[8], f[8], g[8];
    load8(text, row, chunk, t);
    load8(image, row, chunk, v);
    load8(frozen_text, row, chunk, f);
    load8(frozen_image, row, chunk, g);
    tt = dot8(t, t, tt), vv = dot8(v, v, vv), ff = dot8(f, f, ff), gg = dot8(g, g, gg);
    tf = dot8(t, f, tf), vg = dot8(v, g, vg);
  }
  tt = inverse_norm(warp_sum(tt)), vv = inverse_norm(warp_sum(vv));
  ff = inverse_norm(warp_sum(ff)), gg = inverse_norm(warp_sum(gg));
  tf = warp_sum(tf) * tt * ff, vg = warp_sum(vg) * vv * gg;
  if (lane != 0) return;
  facts.inverse[0][row] = tt, facts.inverse[1][row] = vv;
  facts.inverse[2][row] = ff, facts.inverse[3][row] = gg;
  facts.cosine[0][row] = tf, facts.cosine[1][row] = vg;
}

// Copies rows as type E, zero-padded to row_bytes: for rows that 16-byte copies cannot read in place.
template <class E>
__global__ void __launch_bounds__(kRowKernelThreads)
    pad_rows_kernel(Matrix from, int64_t batch, Global<uint8_t> to, int64_t row_bytes) {
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kRowKernelThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (row >= batch) return;
  constexpr int kPerVector = 16 / sizeof(E);
  for (int chunk = threadIdx.x % kWarpSize; chunk * kPerVector * static_cast<int>(sizeof(E)) < row_bytes;
       chunk += kWarpSize) {
    const int first = chunk * kPerVector, half = first % 8;
    float x[8] = {};
    if (first < from.dim) load8(from, row, first / 8, x);
    Vec16 v = {};
#pragma unroll
    for (int i = 0; i < kPerVector; ++i) {
      if constexpr (sizeof(E) == 4) {
        v.word[i] = __float_as_uint(half ? x[4 + i] : x[i]);
      } else {
        v.word[i / 2] |= static_cast<uint32_t>(from_float<E>(x[i]).bits) << 16 * (i % 2);
      }
    }
    as<Vec16>(to + row * row_bytes)[chunk] = v;
  }
}

constexpr int kTransposeTile = 32;
constexpr int kTransposeSharedBytes = kTransposeTile * (kTransposeTile + 1) * 4;

// out[column][row] = unit rows of `from` as type E, [dim, row_bytes of `batch` elements], zero-padded.
// Block: a 32 x 32 tile. Grid: x = groups of 32 rows (padding included), y = groups of 32 columns.
template <class E>
__global__ void __launch_bounds__(kRowKernelThreads)
    transpose_kernel(Matrix from, int64_t batch, Global<const float> inverse, Global<uint8_t> out,
                     int64_t row_bytes) {
  const Shared<float> tile = as<float>(dynamic_shared());
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTransposeTile;
  const int first_column = blockIdx.y * kTransposeTile;
  {
    const int row = threadIdx.x / 4, chunk = threadIdx.x % 4;
    float x[8] = {};
    float scale = 0.0f;
    if (first_row + row < batch && first_column + chunk * 8 < from.dim) {
      load8(from, first_row + row, first_column / 8 + chunk, x);
      scale = inverse[first_row + row];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) tile[row * (kTransposeTile + 1) + chunk * 8 + i] = x[i] * scale;
  }
  __syncthreads();
  constexpr int kPerVector = 16 / sizeof(E), kVectors = kTransposeTile / kPerVector;
  for (int i = threadIdx.x; i < kTransposeTile * kVectors; i += kRowKernelThreads) {
    const int column = i / kVectors, row = i % kVectors * kPerVector;
    if (first_column + column >= from.dim || (first_row + row) * static_cast<int>(sizeof(E)) >= row_bytes) continue;
    Vec16 v = {};
#pragma unroll
    for (int j = 0; j < kPerVector; ++j) {
      const float x = tile[(row + j) * (kTransposeTile + 1) + column];
      if constexpr (sizeof(E) == 4) {
        v.word[j] = __float_as_uint(x);
      } else {
        v.word[j / 2] |= static_cast<uint32_t>(from_float<E>(x).bits) << 16 * (j % 2);
      }
    }
    as<Vec16>(out + (first_column + column) * row_bytes + (first_row + row) * static_cast<int>(sizeof(E)))[0] = v;
  }
}

// A running log-sum-exp: the sum is of exp(x - largest).
struct alignas(8) LogSum {
  float largest, sum;
};
__device__ __forceinline__ LogSum merge(LogSum a, LogSum b) {
  const float largest = fmaxf(a.largest, b.largest);
  if (largest == -INFINITY) return {largest, 0.0f};
  return {largest, a.sum * exponential(a.largest - largest) + b.sum * exponential(b.largest - largest)};
}
constexpr int kLogSumSharedBytes = kTileSharedBytes + 8 * kTileThreads * 8;

// Log-sum-exp over the columns of one split, for 128 rows, and S_ii where `diagonal` is not null.
// Grid: x = row tiles, y = column splits.
template <class E>
__global__ void __launch_bounds__(kTileThreads, 2)
    log_sum_kernel(UnitRows x, UnitRows y, float scale, int64_t columns_per_split, Global<LogSum> partial,
                   Global<float> diagonal) {
  const Shared<uint8_t> shared = dynamic_shared();
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  const int first_column = static_cast<int>(blockIdx.y * columns_per_split);
  const int last_column = static_cast<int>(
      y.matrix.rows - first_column < columns_per_split ? y.matrix.rows : first_column + columns_per_split);
  const int tiles = static_cast<int>(ceil_div(last_column - first_column, kTile));

  // Eight rows a thread, each thread its own column of this array: in registers they would spill.
  const Shared<LogSum> running = as<LogSum>(shared + kTileSharedBytes) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < 8; ++i) running[i * kTileThreads] = LogSum{-INFINITY, 0.0f};
  stream_tiles<E>(shared, x.matrix, first_row, y.matrix, first_column, tiles, [&](int tile, auto& c) {
    const int tile_first = first_column + tile * kTile;
    float column_inverse[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int column = tile_first + tile_column(j / 2, j % 2);
      column_inverse[j] = y.inverse[column < last_column ? column : last_column - 1];
    }
    if (diagonal && tile_first == first_row) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int64_t row = first_row + tile_row(i / 2, i % 2 * 2);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (row != tile_first + tile_column(j / 2, j % 2) || row >= last_column) continue;
          diagonal[row] = logit(c[i / 2][j / 2][i % 2 * 2 + j % 2], scale, x.inverse[row], y.inverse[row]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t row = first_row + tile_row(i / 2, i % 2 * 2);
      const float row_inverse = x.inverse[row < x.matrix.rows ? row : x.matrix.rows - 1];
      const LogSum before = running[i * kTileThreads];
      float largest = before.largest;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int column = tile_first + tile_column(j / 2, j % 2);
        float& s = c[i / 2][j / 2][i % 2 * 2 + j % 2];
        s = column < last_column ? logit(s, scale, row_inverse, column_inverse[j]) : -INFINITY;
        largest = fmaxf(largest, s);
      }
      if (largest == -INFINITY) continue;
      float sum = before.sum * exponential(before.largest - largest);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += exponential(c[i / 2][j / 2][i % 2 * 2 + j % 2] - largest);
      running[i * kTileThreads] = LogSum{largest, sum};
    }
  });

  // The four lanes of a row, then the four warps side by side. The tiles are done with.
  __syncthreads();
  const Shared<LogSum> sums = as<LogSum>(shared);  // [row][warp]
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    LogSum total = running[i * kTileThreads];
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      const float largest = __shfl_xor_sync(kFullMask, total.largest, step);
      const float sum = __shfl_xor_sync(kFullMask, total.sum, step);
      total = merge(total, LogSum{largest, sum});
    }
    if (lane % 4 == 0) sums[tile_row(i / 2, i % 2 * 2) * 4 + warp % 4] = total;
  }
  __syncthreads();
  if (threadIdx.x >= kTile || first_row + threadIdx.x >= x.matrix.rows) return;
  LogSum total = sums[threadIdx.x * 4];
  for (int i = 1; i < 4; ++i) total = merge(total, static_cast<LogSum>(sums[threadIdx.x * 4 + i]));
  partial[blockIdx.y * x.matrix.rows + first_row + threadIdx.x] = total;
}

// Splits in their order. One thread a row.
__global__ void __launch_bounds__(kRowKernelThreads)
    merge_splits_kernel(Global<const LogSum> partial, int64_t batch, int splits, Global<float> lse) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowKernelThreads + threadIdx.x;
  if (row >= batch) return;
  LogSum total = partial[row];
  for (int split = 1; split < splits; ++split) {
    total = merge(total, static_cast<LogSum>(partial[split * batch + row]));
  }
  lse[row] = total.largest + logf(total.sum);
}

// The weights P + C - 2 I of `count` rows from first_row, as E times kWeightScale, padded with zeros to
// row_bytes: the range of fp16 is used to its end, so that no weight that matters is lost.
template <class E>
constexpr float kWeightScale = std::is_same_v<E, fp16> ? 16384.0f : 1.0f;
template <class E>
__global__ void __launch_bounds__(kTileThreads, 2)
    weights_kernel(UnitRows x, UnitRows y, float scale, Global<const float> row_lse, Global<const float> column_lse,
                   int64_t first_row, int64_t count, Global<uint8_t> out, int64_t row_bytes) {
  const int64_t tile_row0 = static_cast<int64_t>(blockIdx.x) * kTile;  // within the `count` rows
  const int tile_column0 = blockIdx.y * kTile;
  const int columns = static_cast<int>(y.matrix.rows), padded = static_cast<int>(row_bytes / sizeof(E));
  stream_tiles<E>(dynamic_shared(), x.matrix, first_row + tile_row0, y.matrix, tile_column0, 1, [&](int, auto& c) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t row = tile_row0 + tile_row(i / 2, i % 2 * 2);
      if (row >= count) continue;
      const float inverse = x.inverse[first_row + row], own = row_lse[first_row + row];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int column = tile_column0 + tile_column(n, 0);
        float w[2] = {};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (column + j >= columns) continue;
          const float s = logit(c[i / 2][n][i % 2 * 2 + j], scale, inverse, y.inverse[column + j]);
          w[j] = exponential(s - own) + exponential(s - column_lse[column + j]);
          // Here, before any rounding to E: near a minimum P_ii + C_ii - 2 is all that is left.
          if (first_row + row == column + j) w[j] -= 2.0f;
          w[j] *= kWeightScale<E>;
        }
        if (column >= padded) continue;
        const Global<uint8_t> at = out + row * row_bytes + column * static_cast<int>(sizeof(E));
        if constexpr (sizeof(E) == 4) {
          as<uint2>(at)[0] = uint2{__float_as_uint(w[0]), __float_as_uint(w[1])};
        } else {
          as<uint32_t>(at)[0] = from_float<E>(w[0]).bits | static_cast<uint32_t>(from_float<E>(w[1]).bits) << 16;
        }
      }
    }
  });
}

// out = weights y / kWeightScale, fp32 [rows of weights, dim]; transposed: y as [dim, batch].
// Grid: x = row tiles, y = tiles of dim.
template <class E>
__global__ void __launch_bounds__(kTileThreads, 2)
    product_kernel(Operand weights, Operand transposed, Global<float> out) {
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  const int first_column = blockIdx.y * kTile;
  const int dim = static_cast<int>(transposed.rows);
  stream_tiles<E>(dynamic_shared(), weights, first_row, transposed, first_column, 1, [&](int, auto& c) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t row = first_row + tile_row(i / 2, i % 2 * 2);
      if (row >= weights.rows) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int column = first_column + tile_column(j / 2, j % 2);
        if (column < dim) out[row * dim + column] = c[i / 2][j / 2][i % 2 * 2 + j % 2] * (1.0f / kWeightScale<E>);
      }
    }
  });
}

// One side's gradient, rows first_row ... first_row + count - 1. One warp a row.
struct FinishArguments {
  Matrix x, own;  // the trained rows and their frozen selves
  Global<const float> x_inverse, own_inverse;
  Global<const float> product;  // [count, dim]: sum_j (P + C - 2 I) y_j; null without InfoNCE
  int64_t first_row, count;
  float cosine_weight;  // w / B
  float nce_weight;     // w logit_scale / (2 B)
  Global<uint8_t> grad;
};

// Eight elements of dL/du.
__device__ __forceinline__ void unit_gradient8(const FinishArguments& a, int64_t row, int chunk, float own_scale,
                                               float (&g)[8]) {
  float r[8];
  load8(a.own, row, chunk, r);
#pragma unroll
  for (int i = 0; i < 8; ++i) g[i] = -a.cosine_weight * own_scale * r[i];
  if (!a.product) return;
  const Matrix product = {as<const uint8_t>(a.product), DType::kFloat32, a.x.dim, a.x.dim % 4 == 0};
  load8(product, row - a.first_row, chunk, r);
#pragma unroll
  for (int i = 0; i < 8; ++i) g[i] = fmaf(a.nce_weight, r[i], g[i]);
}

__global__ void __launch_bounds__(kRowKernelThreads, 6) finish_kernel(FinishArguments a) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t index =
      static_cast<int64_t>(blockIdx.x) * (kRowKernelThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (index >= a.count) return;
  const int64_t row = a.first_row + index;
  const float inverse = a.x_inverse[row], own_scale = a.own_inverse[row];
  float along = 0.0f;  // g . u
  for (int chunk = lane; chunk * 8 < a.x.dim; chunk += kWarpSize) {
    float x[8], g[8];
    load8(a.x, row, chunk, x);
    unit_gradient8(a, row, chunk, own_scale, g);
    along = dot8(g, x, along);
  }
  along = warp_sum(along) * inverse;
  for (int chunk = lane; chunk * 8 < a.x.dim; chunk += kWarpSize) {
    float x[8], g[8];
    load8(a.x, row, chunk, x);
    unit_gradient8(a, row, chunk, own_scale, g);
#pragma unroll
    for (int i = 0; i < 8; ++i) g[i] = (g[i] - along * inverse * x[i]) * inverse;
    store8(a.x, a.grad, row, chunk, g);
  }
}

// Four terms a row, before their 1/B, for reduce_terms_kernel. One thread a row.
struct TermArguments {
  Global<const float> cosine[2];
  Global<const float> row_lse[2], column_lse[2], diagonal[2];  // null where the InfoNCE term is off
  int64_t batch;
  Global<Vec16> row_terms;
};
__global__ void __launch_bounds__(kRowKernelThreads) row_terms_kernel(TermArguments a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowKernelThreads + threadIdx.x;
  if (row >= a.batch) return;
  Vec16 out = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    out.word[i] = __float_as_uint(1.0f - a.cosine[i][row]);
    if (!a.row_lse[i]) continue;
    const float diagonal = a.diagonal[i][row];
    const float excess = (a.row_lse[i][row] - diagonal) + (a.column_lse[i][row] - diagonal);
    out.word[2 + i] = __float_as_uint(0.5f * excess);
  }
  a.row_terms[row] = out;
}

}  // namespace saferclip
