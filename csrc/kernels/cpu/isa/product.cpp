// Single-precision products of rows. Compiled once per instruction set.
#include "isa.h"
#include "simd.h"

namespace {

using saferclip::DType;
using saferclip::cpu::kPanelRows;

// ---- rows as they are --------------------------------------------------------------------------

// A tile of kRowTile rows and kQueryTile queries keeps its sums in registers.
constexpr int kRowTile = 4;
#if defined(__AVX512F__)
constexpr int kQueryTile = 6, kSquareTile = 4;  // with squared lengths of the rows as well
#elif defined(__AVX2__)
constexpr int kQueryTile = 3, kSquareTile = 2;
#else
constexpr int kQueryTile = 2, kSquareTile = 1;
#endif

template <int Queries, bool Squares, class T>
inline void dot_tile(const T* const* rows, const float* queries, int64_t query_stride, int64_t dim,
                     float* dots, int64_t dots_stride, float* squares) {
  Floats sums[kRowTile][Queries] = {};
  Floats square[kRowTile] = {};
  const auto step = [&](int64_t i, auto&& get_row, auto&& get_query) {
    Floats row[kRowTile];
#pragma GCC unroll 4
    for (int r = 0; r < kRowTile; ++r) {
      row[r] = get_row(rows[r] + i);
      if constexpr (Squares) square[r] += row[r] * row[r];
    }
#pragma GCC unroll 6
    for (int m = 0; m < Queries; ++m) {
      const Floats query = get_query(queries + m * query_stride + i);
#pragma GCC unroll 4
      for (int r = 0; r < kRowTile; ++r) sums[r][m] += row[r] * query;
    }
  };
  int64_t i = 0;
  for (; i + kWidth <= dim; i += kWidth) {
    step(i, [](const T* p) { return load(p); }, [](const float* p) { return load(p); });
  }
  if (i < dim) {
    const int64_t rest = dim - i;
    step(i, [rest](const T* p) { return load_part(p, rest); }, [rest](const float* p) { return load_part(p, rest); });
  }
  for (int m = 0; m < Queries; ++m) {
    const Floats row_sums[kRowTile] = {sums[0][m], sums[1][m], sums[2][m], sums[3][m]};
    sum4(row_sums, dots + m * dots_stride);
  }
  if constexpr (Squares) sum4(square, squares);
}

// ---- rows against a transposed panel -----------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kTileRows = 12;  // 12 x 2 accumulators of the 32 registers
#elif defined(__AVX2__)
constexpr int kTileRows = 6;   // 6 x 2 of 16
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVectors = 2;

// c [Rows, 2 vectors] (+)= a [Rows, depth] times panel [depth][32]
template <int Rows>
inline void multiply_tile(const float* a, int64_t a_stride, const float* panel, int64_t depth, float* c,
                          int64_t c_stride, bool accumulate) {
  Floats sums[Rows][kTileVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Floats left = load(panel + k * kPanelRows), right = load(panel + k * kPanelRows + kWidth);
#pragma GCC unroll 12
    for (int m = 0; m < Rows; ++m) {
      const Floats x = splat(a[m * a_stride + k]);
      sums[m][0] += x * left;
      sums[m][1] += x * right;
    }
  }
  for (int m = 0; m < Rows; ++m) {
    for (int v = 0; v < kTileVectors; ++v) {
      float* to = c + m * c_stride + v * kWidth;
      store(to, accumulate ? load(to) + sums[m][v] : sums[m][v]);
    }
  }
}

template <int Rows>
inline void multiply_rows(const float* a, int64_t a_stride, const float* panel, int64_t depth, float* c,
                          int64_t c_stride, bool accumulate) {
  for (int j = 0; j < kPanelRows; j += kTileVectors * kWidth) {
    multiply_tile<Rows>(a, a_stride, panel + j, depth, c + j, c_stride, accumulate);
  }
}

#if defined(__x86_64__)
// out[j * kPanelRows + r] = scale * rows[r][j] for four rows and columns.
inline void transpose_four(const float* const* rows, int64_t column, float scale, float* out) {
  const __m128 factor = _mm_set1_ps(scale);
  __m128 a = _mm_mul_ps(_mm_loadu_ps(rows[0] + column), factor);
  __m128 b = _mm_mul_ps(_mm_loadu_ps(rows[1] + column), factor);
  __m128 c = _mm_mul_ps(_mm_loadu_ps(rows[2] + column), factor);
  __m128 d = _mm_mul_ps(_mm_loadu_ps(rows[3] + column), factor);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(out, a);
  _mm_storeu_ps(out + kPanelRows, b);
  _mm_storeu_ps(out + 2 * kPanelRows, c);
  _mm_storeu_ps(out + 3 * kPanelRows, d);
}
#endif
template <class T>
inline void transpose_four(const T* const* rows, int64_t column, float scale, float* out) {
  for (int j = 0; j < 4; ++j) {
    for (int r = 0; r < 4; ++r) out[j * kPanelRows + r] = scale * to_float(rows[r][column + j]);
  }
}

}  // namespace

namespace saferclip::cpu::SAFERCLIP_NAMESPACE {

// A tile of queries stays in L1 while the rows pass by.
void dot_rows(const void* data, DType dtype, int count, int64_t dim, const float* queries,
              int64_t query_stride, int queries_count, float* dots, int64_t dots_stride,
              float* squares) {
  with_element(dtype, [&]<class T>(const T*) {
    const T* first = static_cast<const T*>(data);
    const auto tiles = [&]<int Queries, bool Squares>(int m) {
      for (int r = 0; r < count; r += kRowTile) {
        const auto at = [&](int i) { return first + dim * (i < count ? i : count - 1); };
        const T* rows[kRowTile] = {at(r), at(r + 1), at(r + 2), at(r + 3)};
        dot_tile<Queries, Squares>(rows, queries + m * query_stride, query_stride, dim,
                                   dots + m * dots_stride + r, dots_stride, squares + (Squares ? r : 0));
      }
    };
    int m = 0;
    const auto step = [&]<int Queries, bool Squares>(int most) {
      for (; most > 0 && m + Queries <= queries_count; m += Queries, --most) {
        tiles.template operator()<Queries, Squares>(m);
      }
    };
    if (squares != nullptr) step.template operator()<kSquareTile, true>(1);
    if (squares != nullptr && m == 0) step.template operator()<1, true>(1);
    step.template operator()<kQueryTile, false>(queries_count);
    step.template operator()<2, false>(queries_count);
    step.template operator()<1, false>(queries_count);
  });
}

void transpose_panel(const void* data, DType dtype, int count, int64_t dim, float scale, float* panel) {
  with_element(dtype, [&]<class T>(const T*) {
    const T* first = static_cast<const T*>(data);
    if (count < kPanelRows) std::memset(panel, 0, dim * kPanelRows * sizeof(float));
    int r = 0;
    for (; r + 4 <= count; r += 4) {
      const T* rows[4] = {first + r * dim, first + (r + 1) * dim, first + (r + 2) * dim,
                          first + (r + 3) * dim};
      int64_t j = 0;
      for (; j + 4 <= dim; j += 4) transpose_four(rows, j, scale, panel + j * kPanelRows + r);
      for (; j < dim; ++j) {
        for (int i = 0; i < 4; ++i) panel[j * kPanelRows + r + i] = scale * to_float(rows[i][j]);
      }
    }
    for (; r < count; ++r) {
      for (int64_t j = 0; j < dim; ++j) panel[j * kPanelRows + r] = scale * to_float(first[r * dim + j]);
    }
  });
}

void multiply_panel(const float* a, int64_t rows, int64_t a_stride, const float* panel, int64_t depth,
                    float* c, int64_t c_stride, int columns, bool accumulate) {
  if (columns < kPanelRows) {  // the tile writes whole panels: let it do so elsewhere
    alignas(64) float whole[kPanelRows];
    for (int64_t r = 0; r < rows; ++r) {
      multiply_rows<1>(a + r * a_stride, a_stride, panel, depth, whole, kPanelRows, false);
      float* to = c + r * c_stride;
      for (int j = 0; j < columns; ++j) to[j] = accumulate ? to[j] + whole[j] : whole[j];
    }
    return;
  }
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) {
    multiply_rows<kTileRows>(a + r * a_stride, a_stride, panel, depth, c + r * c_stride, c_stride,
                             accumulate);
  }
  for (; r + 4 <= rows; r += 4) {
    multiply_rows<4>(a + r * a_stride, a_stride, panel, depth, c + r * c_stride, c_stride, accumulate);
  }
  for (; r < rows; ++r) {
    multiply_rows<1>(a + r * a_stride, a_stride, panel, depth, c + r * c_stride, c_stride, accumulate);
  }
}

}  // namespace saferclip::cpu::SAFERCLIP_NAMESPACE
