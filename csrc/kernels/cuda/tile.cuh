// The matrix-product core that nearest_safe and preservation_loss share: C = A B^T for row-major A
// and B, in tiles of 128 x 128, streamed through shared memory as 64-byte slices of 128 rows.
//
// Layout is counted in bytes, so one code path serves bf16/fp16 (tensor cores) and fp32 (plain FFMA: see
// docs/gpu-kernels.md for why not tf32); only `multiply_slice` knows the element type.
// 8 warps stand 2 x 4 over the tile, 64 x 32 each. Every element type uses the accumulator layout of
// mma.sync, so an epilogue is written once.
#pragma once

#include "device.cuh"

namespace saferclip {

constexpr int kTile = 128;                          // rows of A and of B in a tile
constexpr int kSliceBytes = 64;                     // bytes along K in a pipeline stage
constexpr int kStages = 4;                          // three slices in flight while one is multiplied
constexpr int kTileThreads = 256;                   // 8 warps
constexpr int kOperandBytes = kTile * kSliceBytes;  // one operand of one stage
constexpr int kStageBytes = 2 * kOperandBytes;
constexpr int kTileSharedBytes = kStages * kStageBytes;  // 64 KiB: two blocks fit an A100's 164 KiB

// Rows of a matrix as bytes. row_bytes and the address of every row are multiples of 16.
struct Operand {
  Global<const uint8_t> data;
  int64_t rows;
  int64_t row_bytes;
};

using Tile = float[4][4][4];  // [16-row group][8-column group][mma register]

// Row and column, within the tile, of accumulator [m][n][r] of the calling thread.
__device__ __forceinline__ int tile_row(int m, int r) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  return warp / 4 * 64 + m * 16 + r / 2 * 8 + lane / 4;
}
__device__ __forceinline__ int tile_column(int n, int r) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  return warp % 4 * 32 + n * 8 + lane % 4 * 2 + r % 2;
}

// Where 16-byte chunk `chunk` of row `row` lies in a stage. The XOR spreads any 8 consecutive rows
// (or 4 even ones) over all banks, so neither ldmatrix nor the fp32 reads conflict. Rows 8 apart (and
// columns 2 n, 2 n + 1) share their XOR: the offset of row + 8 n is the offset of row plus 8 n kSliceBytes.
__device__ __forceinline__ int slice_offset(int row, int chunk) {
  return row * kSliceBytes + ((chunk ^ (row >> 1 & 3)) * 16);
}

// Starts the copy of one 64-byte slice of 128 rows; what lies outside the matrix becomes zeros.
__device__ __forceinline__ void load_operand(Shared<uint8_t> to, const Operand& from, int64_t first_row,
                                             int first_byte) {
  const int chunk = threadIdx.x % 4, row_bytes = static_cast<int>(from.row_bytes);
  const int64_t left = from.rows - first_row;
  const int rows = left < kTile ? static_cast<int>(left) : kTile;
  const Global<const uint8_t> corner = from.data + (first_row * from.row_bytes + first_byte);
  const bool inside = first_byte + chunk * 16 < row_bytes;
#pragma unroll
  for (int row = threadIdx.x / 4; row < kTile; row += kTileThreads / 4) {
    const bool valid = inside && row < rows;
    cp_async16(to + slice_offset(row, chunk), corner + (valid ? row * row_bytes + chunk * 16 : 0), valid);
  }
}

// Adds the product of the two slices of a stage to the tile.
template <class E>
__device__ __forceinline__ void multiply_slice(Tile& c, Shared<uint8_t> a, Shared<uint8_t> b) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if constexpr (sizeof(E) == 4) {
#pragma unroll 1
    for (int pair = 0; pair < 8; ++pair) {  // two elements of depth at a time: four would spill
      const int a_offset = slice_offset(tile_row(0, 0), pair / 2) + pair % 2 * 8;
      const int b_offset = slice_offset(tile_column(0, 0), pair / 2) + pair % 2 * 8;
      Vec8 row[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        row[i] = as<const Vec8>(a + a_offset + i * 8 * kSliceBytes)[0];
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const Vec8 column = as<const Vec8>(b + b_offset + (j / 2 * 8 + j % 2) * kSliceBytes)[0];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& sum = c[i / 2][j / 2][i % 2 * 2 + j % 2];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            multiply_add(sum, __uint_as_float(row[i].word[k]), __uint_as_float(column.word[k]));
          }
        }
      }
    }
  } else {
    const int a_row = warp / 4 * 64 + lane % 16, a_half = lane / 16;
    const int b_row = warp % 4 * 32 + lane / 16 * 8 + lane % 8, b_half = lane / 8 % 2;
#pragma unroll
    for (int step = 0; step < 2; ++step) {  // 32 bytes of depth an mma
      const int a_offset = slice_offset(a_row, step * 2 + a_half), b_offset = slice_offset(b_row, step * 2 + b_half);
      uint32_t rows[4][4], columns[2][4];
#pragma unroll
      for (int m = 0; m < 4; ++m) ldmatrix_x4(rows[m], a + a_offset + m * 16 * kSliceBytes);
#pragma unroll
      for (int n = 0; n < 2; ++n) ldmatrix_x4(columns[n], b + b_offset + n * 16 * kSliceBytes);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          mma<E>(c[m][n], rows[m], columns[n / 2][n % 2 * 2], columns[n / 2][n % 2 * 2 + 1]);
        }
      }
    }
  }
}

// Multiplies 128 rows of A from a_row with `tiles` successive groups of 128 rows of B from b_row, and
// calls epilogue(tile number, accumulators) for each. The copies run ahead across tile borders.
// The block passes at least one barrier between two epilogues.
template <class E, class Epilogue>
__device__ __forceinline__ void stream_tiles(Shared<uint8_t> shared, const Operand& a, int64_t a_row,
                                             const Operand& b, int64_t b_row, int tiles, Epilogue epilogue) {
  const int slices = static_cast<int>(ceil_div(a.row_bytes, kSliceBytes));
  int next_tile = 0, next_slice = 0;
  auto load_next = [&](unsigned stage) {
    if (next_tile < tiles) {
      const Shared<uint8_t> to = shared + stage % kStages * kStageBytes;
      const int byte = next_slice * kSliceBytes;
      load_operand(to, a, a_row, byte);
      load_operand(to + kOperandBytes, b, b_row + static_cast<int64_t>(next_tile) * kTile, byte);
      if (++next_slice == slices) next_slice = 0, ++next_tile;
    }
    cp_async_commit();  // an empty group at the end keeps the count of groups uniform
  };
  for (int i = 0; i < kStages - 1; ++i) load_next(i);
  unsigned step = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    Tile c = {};
    for (int slice = 0; slice < slices; ++slice, ++step) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // the slice is there for all, and all are done with the stage loaded next
      load_next(step + kStages - 1);
      const Shared<uint8_t> stage = shared + step % kStages * kStageBytes;
      multiply_slice<E>(c, stage, stage + kOperandBytes);
    }
    epilogue(tile, c);
  }
  cp_async_wait<0>();
}

}  // namespace saferclip
