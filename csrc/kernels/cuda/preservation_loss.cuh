// Kernels of preservation_loss. With unit rows x (trainable) and y (frozen), S = logit_scale x y^T:
//   nce = mean_i (lse_j S_ij + lse_j S_ji) / 2 - S_ii
//   d nce / d x_i = logit_scale / (2 B) * sum_j (P + C - 2 I)_ij y_j,
//   P_ij = exp(S_ij - row lse_i), C_ij = exp(S_ij - column lse_j).
// The diagonal is kept apart from the sums: P_ii - 1 is minus what the softmax gives to the others, had without a
// difference of two large numbers, and near a minimum it is all that is left.
// S is never stored: both lse stream it (once as it is, once transposed), and the gradient recomputes
// it for a bounded number of rows at a time. No atomics: every sum has a fixed order.
// Rows enter the products unnormalized and unrounded; 1/|x| and 1/|y| are applied to S. A row whose squares leave the
// range of fp32 enters times a power of two (row_scale), and so its copy does.
#pragma once

#include "matrix.cuh"
#include "preservation_loss.h"
#include "reduce.cuh"
#include "tile.cuh"

namespace saferclip {

constexpr int kRowKernelThreads = 128;  // kernels with a warp a row

// One of the four inputs in the product: rows times `scale`, and 1/|row times scale| of every row.
struct UnitRows {
  Operand matrix;
  Global<const float> inverse, scale;
};

struct RowFacts {  // [batch] each; of text, image, frozen text, frozen image
  Global<float> inverse[4], scale[4];
  Global<uint8_t> copy[4];  // rows times scale, zero-padded to row_bytes
  int64_t row_bytes;
  Global<float> cosine[2];  // of text and image with their frozen selves
};

// S_ij from the product of the raw rows. Symmetric in the two inverses, so that both directions and
// the recomputation give the same bits: what must cancel (lse - S_ii, P + C - 2) then does.
__device__ __forceinline__ float logit(float product, float scale, float inverse_x, float inverse_y) {
  return scale * (product * (inverse_x * inverse_y));
}
__device__ __forceinline__ float exponential(float x) { return exp2f(x * 1.4426950408889634f); }  // x <= 0

// Eight elements as type E at element 8 * chunk of a row of row_bytes, a multiple of 16.
template <class E>
__device__ __forceinline__ void copy8(Global<uint8_t> row, int64_t row_bytes, int chunk, const float (&x)[8]) {
  if constexpr (sizeof(E) == 4) {
    Vec16 low, high;
#pragma unroll
    for (int i = 0; i < 4; ++i) low.word[i] = __float_as_uint(x[i]), high.word[i] = __float_as_uint(x[4 + i]);
    as<Vec16>(row)[chunk * 2] = low;
    if (chunk * 32 + 16 < row_bytes) as<Vec16>(row)[chunk * 2 + 1] = high;
  } else {
    Vec16 v;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v.word[i] = from_float<E>(x[2 * i]).bits | static_cast<uint32_t>(from_float<E>(x[2 * i + 1]).bits) << 16;
    }
    as<Vec16>(row)[chunk] = v;
  }
}

// Facts of a row of one side (0 text, 1 image) and of its frozen self, and copies of type E that the products read.
template <class E>
__device__ __forceinline__ void row_facts(const Matrix& trained, const Matrix& frozen, int64_t row, const RowFacts& facts,
                                          int side) {
  const int lane = threadIdx.x % kWarpSize;
  float xx = 0, ff = 0, xf = 0;
  for (int chunk = lane; chunk * 8 < trained.dim; chunk += kWarpSize) {
    float x[8], f[8];
    load8(trained, row, chunk, x);
    load8(frozen, row, chunk, f);
    xx = dot8(x, x, xx), ff = dot8(f, f, ff);
  }
  const float x_scale = row_scale(trained, row, warp_sum(xx)), f_scale = row_scale(frozen, row, warp_sum(ff));
  xx = 0, ff = 0;
  for (int chunk = lane; chunk * 8 < trained.dim; chunk += kWarpSize) {
    float x[8], f[8];
    load8(trained, row, chunk, x);
    load8(frozen, row, chunk, f);
    scale8(x, x_scale), scale8(f, f_scale);
    xx = dot8(x, x, xx), ff = dot8(f, f, ff), xf = dot8(x, f, xf);
    copy8<E>(facts.copy[side] + row * facts.row_bytes, facts.row_bytes, chunk, x);
    copy8<E>(facts.copy[2 + side] + row * facts.row_bytes, facts.row_bytes, chunk, f);
  }
  xx = inverse_norm(warp_sum(xx)), ff = inverse_norm(warp_sum(ff)), xf = warp_sum(xf);
  if (lane != 0) return;
  facts.inverse[side][row] = xx, facts.inverse[2 + side][row] = ff;
  facts.scale[side][row] = x_scale, facts.scale[2 + side][row] = f_scale;
  facts.cosine[side][row] = xf * xx * ff;
}

// A warp a row.
template <class E>
__global__ void __launch_bounds__(kRowKernelThreads, 8)
    row_facts_kernel(Matrix text, Matrix image, Matrix frozen_text, Matrix frozen_image, int64_t batch, RowFacts facts) {
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kRowKernelThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (row >= batch) return;
  row_facts<E>(text, frozen_text, row, facts, 0);
  row_facts<E>(image, frozen_image, row, facts, 1);
}

constexpr int kTransposeTile = 32;
constexpr int kTransposeSharedBytes = kTransposeTile * (kTransposeTile + 1) * 4;

// out[column][row] = unit rows of `from` as type E, [dim, row_bytes of `batch` elements], zero-padded.
// Block: a 32 x 32 tile. Grid: x = groups of 32 rows (padding included), y = groups of 32 columns.
template <class E>
__global__ void __launch_bounds__(kRowKernelThreads)
    transpose_kernel(Matrix from, int64_t batch, Global<const float> inverse, Global<const float> scales,
                     Global<uint8_t> out, int64_t row_bytes) {
  const Shared<float> tile = as<float>(dynamic_shared());
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTransposeTile;
  const int first_column = blockIdx.y * kTransposeTile;
  {
    const int row = threadIdx.x / 4, chunk = threadIdx.x % 4;
    float x[8] = {};
    if (first_row + row < batch && first_column + chunk * 8 < from.dim) {
      load8(from, first_row + row, first_column / 8 + chunk, x);
      scale8(x, scales[first_row + row]), scale8(x, inverse[first_row + row]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) tile[row * (kTransposeTile + 1) + chunk * 8 + i] = x[i];
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
// The softmax of a row of S: its lse as largest + log (as one number it would be rounded at the size of a logit), and
// what it gives to all but the diagonal.
struct alignas(8) Lse {
  float largest, log;
};
struct Softmax {
  Global<Lse> lse;
  Global<float> others;
};
__device__ __forceinline__ float probability(float logit, Lse lse) {
  return exponential((logit - lse.largest) - lse.log);
}
constexpr int kLogSumSharedBytes = kTileSharedBytes + 8 * kTileThreads * 8;

// Log-sum-exp over the columns of one split but the diagonal, for 128 rows, and S_ii where `diagonal` is not null.
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
      const int own = static_cast<int>(row);
      const LogSum before = running[i * kTileThreads];
      float largest = before.largest;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int column = tile_first + tile_column(j / 2, j % 2);
        float& s = c[i / 2][j / 2][i % 2 * 2 + j % 2];
        s = column < last_column && column != own ? logit(s, scale, row_inverse, column_inverse[j]) : -INFINITY;
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

// Splits in their order, then the diagonal. One thread a row.
__global__ void __launch_bounds__(kRowKernelThreads)
    merge_splits_kernel(Global<const LogSum> partial, int64_t batch, int splits, Global<const float> diagonal,
                        Softmax softmax) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowKernelThreads + threadIdx.x;
  if (row >= batch) return;
  LogSum total = partial[row];
  for (int split = 1; split < splits; ++split) {
    total = merge(total, static_cast<LogSum>(partial[split * batch + row]));
  }
  const float own = diagonal[row], largest = fmaxf(total.largest, own);
  const float others = total.sum * exponential(total.largest - largest);
  const float sum = others + exponential(own - largest);
  softmax.lse[row] = Lse{largest, logf(sum)};
  softmax.others[row] = others / sum;
}

// The weights P + C - 2 I of `count` rows from first_row, as E times kWeightScale, padded with zeros to
// row_bytes: the range of fp16 is used to its end, so that no weight that matters is lost.
template <class E>
constexpr float kWeightScale = std::is_same_v<E, fp16> ? 16384.0f : 1.0f;
template <class E>
__global__ void __launch_bounds__(kTileThreads, 2)
    weights_kernel(UnitRows x, UnitRows y, float scale, Softmax of_row, Softmax of_column, int64_t first_row,
                   int64_t count, Global<uint8_t> out, int64_t row_bytes) {
  const int64_t tile_row0 = static_cast<int64_t>(blockIdx.x) * kTile;  // within the `count` rows
  const int tile_column0 = blockIdx.y * kTile;
  const int columns = static_cast<int>(y.matrix.rows), padded = static_cast<int>(row_bytes / sizeof(E));
  stream_tiles<E>(dynamic_shared(), x.matrix, first_row + tile_row0, y.matrix, tile_column0, 1, [&](int, auto& c) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t row = tile_row0 + tile_row(i / 2, i % 2 * 2);
      if (row >= count) continue;
      const float inverse = x.inverse[first_row + row];
      const Lse own = of_row.lse[first_row + row];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int column = tile_column0 + tile_column(n, 0);
        float w[2] = {};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (column + j >= columns) continue;
          const float s = logit(c[i / 2][n][i % 2 * 2 + j], scale, inverse, y.inverse[column + j]);
          w[j] = probability(s, own) + probability(s, of_column.lse[column + j]);
          if (first_row + row == column + j) w[j] = -(of_row.others[column + j] + of_column.others[column + j]);
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
  Global<const float> x_inverse, x_scale, own_inverse, own_scale;
  Global<const float> product;  // [count, dim]: sum_j (P + C - 2 I) y_j; null without InfoNCE
  int64_t first_row, count;
  float cosine_weight;  // w / B
  float nce_weight;     // w logit_scale / (2 B)
  Global<uint8_t> grad;
};

// Eight elements of dL/du.
__device__ __forceinline__ void unit_gradient8(const FinishArguments& a, int64_t row, int chunk, float own_inverse,
                                               float own_scale, float (&g)[8]) {
  float r[8];
  load8(a.own, row, chunk, r);
#pragma unroll
  for (int i = 0; i < 8; ++i) g[i] = -a.cosine_weight * own_inverse * (r[i] * own_scale);
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
  const float inverse = a.x_inverse[row], scale = a.x_scale[row];
  const float own_inverse = a.own_inverse[row], own_scale = a.own_scale[row];
  float along = 0.0f;  // g . u
  for (int chunk = lane; chunk * 8 < a.x.dim; chunk += kWarpSize) {
    float x[8], g[8];
    load8(a.x, row, chunk, x);
    scale8(x, scale);
    unit_gradient8(a, row, chunk, own_inverse, own_scale, g);
    along = dot8(g, x, along);
  }
  along = warp_sum(along) * inverse;
  for (int chunk = lane; chunk * 8 < a.x.dim; chunk += kWarpSize) {
    float x[8], g[8];
    load8(a.x, row, chunk, x);
    scale8(x, scale);
    unit_gradient8(a, row, chunk, own_inverse, own_scale, g);
#pragma unroll
    for (int i = 0; i < 8; ++i) g[i] = (g[i] - along * inverse * x[i]) * inverse * scale;
    store8(a.x, a.grad, row, chunk, g);
  }
}

// Four terms a row, before their 1/B, for reduce_terms_kernel. One thread a row.
struct TermArguments {
  Global<const float> cosine[2];
  Global<const Lse> row_lse[2], column_lse[2];  // null where the InfoNCE term is off
  Global<const float> diagonal[2];
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
    const Lse of_row = a.row_lse[i][row], of_column = a.column_lse[i][row];
    const float excess = (of_row.largest - diagonal) + of_row.log + (of_column.largest - diagonal) + of_column.log;
    out.word[2 + i] = __float_as_uint(0.5f * excess);
  }
  a.row_terms[row] = out;
}

}  // namespace saferclip
