#include "preservation_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "buffer.h"
#include "kernels.h"

namespace saferclip::cpu {
namespace {

constexpr int64_t kTileColumns = 256;  // with kMaxTileRows, a tile of logits takes 512 KB of L2
constexpr int64_t kMaxTileRows = 504;
constexpr int64_t kStripes = 16;       // at least, where the batch allows: work for that many threads
constexpr int64_t kDepth = 256;        // rows of a matrix panel used at a time: 32 KB, fits L1
constexpr int64_t kKeptBytes = 16 << 20;  // logits of a whole batch up to this size are kept for the gradient

// Depends on the batch alone, so that no thread count changes the order of additions.
int64_t tile_rows(int64_t batch) {
  const int64_t even = (batch + kStripes - 1) / kStripes;
  return std::clamp<int64_t>((even + 23) / 24 * 24, 24, kMaxTileRows);  // 12 rows are multiplied together
}

// Rows of x at length 1, and 1 / length (0 for a zero row).
void make_unit(const Matrix& x, int64_t first, int64_t count, double* wide, float* unit,
               double* inverse) {
  const Kernels& kernel = kernels();
  for (int64_t i = 0; i < count; ++i) {
    const double square = kernel.widen(x.row(first + i), x.dtype, x.dim, wide);
    const double scale = square > 0 ? 1 / std::sqrt(square) : 0;
    for (int64_t j = 0; j < x.dim; ++j) {
      unit[i * x.dim + j] = static_cast<float>(wide[j] * scale);
    }
    if (inverse != nullptr) inverse[i] = scale;
  }
}

// Log-sum-exp kept as largest + log(sum of exp(x - largest)).
struct LogSums {
  std::vector<float> largest, sum;
  explicit LogSums(int64_t n) : largest(n, -std::numeric_limits<float>::infinity()), sum(n, 0.0f) {}
};

// One modality: rows x against the other modality's frozen rows y, and its own frozen rows.
class Side {
 public:
  Side(const Matrix& x, const Matrix& own, const Matrix& other, double cos_weight, double nce_weight,
       float logit_scale, const Parallel& parallel)
      : x_(x),
        own_(own),
        other_(other),
        cos_weight_(cos_weight),
        nce_weight_(nce_weight),
        logit_scale_(logit_scale),
        parallel_(parallel),
        batch_(x.rows),
        dim_(x.dim),
        stripe_(tile_rows(x.rows)),
        stripes_((x.rows + stripe_ - 1) / stripe_) {}

  void run(void* grad, double* cos_term, double* nce_term) {
    *nce_term = 0;
    if (nce_weight_ != 0) {
      y_ = make_buffer<float>(batch_ * dim_);
      y_columns_ = make_buffer<float>(panels(batch_) * kPanelRows * dim_);
      parallel_(stripes_, [&](int64_t s) {
        std::vector<double> wide(dim_);
        make_unit(other_, s * stripe_, rows(s), wide.data(), y_.get() + s * stripe_ * dim_, nullptr);
      });
      parallel_(panels(batch_), [&](int64_t p) { transpose_panel(p); });
      if (grad != nullptr && batch_ * batch_ * 4 <= kKeptBytes) kept_ = make_buffer<float>(batch_ * batch_);
      *nce_term = log_sums();
    }
    std::vector<double> cosines(stripes_);
    parallel_(stripes_, [&](int64_t s) { cosines[s] = finish_stripe(s, grad); });
    double total = 0;
    for (const double c : cosines) total += c;
    *cos_term = 1 - total / static_cast<double>(batch_);
  }

 private:
  int64_t rows(int64_t stripe) const { return std::min(stripe_, batch_ - stripe * stripe_); }

  static int64_t panels(int64_t columns) { return (columns + kPanelRows - 1) / kPanelRows; }

  // y_columns_ panel p: [dim][32] of logit_scale * y, rows 32 p and on, zeros behind the last.
  void transpose_panel(int64_t p) {
    const int64_t row = p * kPanelRows;
    const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, batch_ - row));
    kernel_.transpose_panel(y_.get() + row * dim_, DType::kFloat32, rows, dim_, logit_scale_,
                            y_columns_.get() + row * dim_);
  }

  // The logits: tile [count, columns] = unit [count, dim] times rows [column, column + columns) of
  // logit_scale * y, transposed.
  void multiply_transposed(const float* unit, int64_t count, int64_t column, int64_t columns,
                           float* tile) const {
    for (int64_t k = 0; k < dim_; k += kDepth) {
      for (int64_t p = 0; p < panels(columns); ++p) {
        const float* panel = y_columns_.get() + (column + p * kPanelRows) * dim_ + k * kPanelRows;
        const int64_t width = std::min<int64_t>(kPanelRows, columns - p * kPanelRows);
        kernel_.multiply_panel(unit + k, count, dim_, panel, std::min(kDepth, dim_ - k),
                               tile + p * kPanelRows, columns, static_cast<int>(width), k > 0);
      }
    }
  }

  // mixed [count, dim] (+)= tile [count, depth] times rows [row, row + depth) of y.
  void multiply_add(const float* tile, int64_t count, int64_t row, int64_t depth, bool accumulate,
                    float* panel, float* mixed) const {
    for (int64_t j = 0; j < dim_; j += kPanelRows) {
      const int64_t width = std::min<int64_t>(kPanelRows, dim_ - j);
      if (width < kPanelRows) std::fill_n(panel, depth * kPanelRows, 0.0f);
      for (int64_t k = 0; k < depth; ++k) {
        std::copy_n(y_.get() + (row + k) * dim_ + j, width, panel + k * kPanelRows);
      }
      kernel_.multiply_panel(tile, count, depth, panel, depth, mixed + j, dim_,
                             static_cast<int>(width), accumulate);
    }
  }

  // Room for a tile of `count` rows, unless all tiles are kept.
  Buffer<float> tile_buffer(int64_t count) const {
    return make_buffer<float>(kept_ ? 0 : count * std::min(batch_, kTileColumns));
  }
  float* tile_at(int64_t first, int64_t count, int64_t column, const Buffer<float>& own) const {
    return kept_ ? kept_.get() + first * batch_ + count * column : own.get();
  }

  // Fills row_sums_ and column_sums_; returns the InfoNCE term.
  double log_sums() {
    row_sums_ = LogSums(batch_);
    column_sums_ = LogSums(batch_);
    std::vector<LogSums> columns(stripes_, LogSums(batch_));
    std::vector<double> diagonal(batch_);
    parallel_(stripes_, [&](int64_t s) { sum_stripe(s, columns[s], diagonal); });
    double total = 0;
    for (int64_t j = 0; j < batch_; ++j) {
      float largest = columns[0].largest[j];
      for (const LogSums& c : columns) largest = std::max(largest, c.largest[j]);
      double sum = 0;
      for (const LogSums& c : columns) {
        sum += c.sum[j] * std::exp(static_cast<double>(c.largest[j]) - largest);
      }
      column_sums_.largest[j] = largest;
      const double column_log = std::log(sum), row_log = std::log(row_sums_.sum[j]);
      column_sums_.sum[j] = static_cast<float>(column_log);
      row_sums_.sum[j] = static_cast<float>(row_log);
      total += (largest - diagonal[j]) + column_log + (row_sums_.largest[j] - diagonal[j]) + row_log;
    }
    return 0.5 * total / static_cast<double>(batch_);
  }

  void sum_stripe(int64_t s, LogSums& columns, std::vector<double>& diagonal) {
    const int64_t first = s * stripe_, count = rows(s);
    const Buffer<float> unit = make_buffer<float>(count * dim_);
    const Buffer<float> own = tile_buffer(count);
    std::vector<double> wide(dim_);
    make_unit(x_, first, count, wide.data(), unit.get(), nullptr);
    for (int64_t c = 0; c < batch_; c += kTileColumns) {
      const int64_t width = std::min(kTileColumns, batch_ - c);
      float* tile = tile_at(first, count, c, own);
      multiply_transposed(unit.get(), count, c, width, tile);
      for (int64_t i = std::max(first, c); i < std::min(first + count, c + width); ++i) {
        diagonal[i] = tile[(i - first) * width + i - c];
      }
      kernel_.log_sum_exp(tile, count, width, &row_sums_.largest[first],
                          &row_sums_.sum[first], &columns.largest[c], &columns.sum[c]);
    }
  }

  // Gradient of a stripe, and the sum of its cosines with its own frozen rows.
  double finish_stripe(int64_t s, void* grad) {
    const int64_t first = s * stripe_, count = rows(s);
    const bool nce = nce_weight_ != 0 && grad != nullptr;
    const Buffer<float> unit = make_buffer<float>(count * dim_);
    const Buffer<float> mixed = make_buffer<float>(nce ? count * dim_ : 0);
    std::vector<double> wide(dim_), inverse(count);
    make_unit(x_, first, count, wide.data(), unit.get(), inverse.data());
    if (nce) mix_stripe(first, count, unit.get(), mixed.get());
    std::vector<float> own(dim_);
    const double batch = static_cast<double>(batch_);
    const float pull = static_cast<float>(-cos_weight_ / batch);
    const float push = static_cast<float>(0.5 * nce_weight_ * logit_scale_ / batch);
    double cosines = 0;
    for (int64_t i = 0; i < count; ++i) {
      make_unit(own_, first + i, 1, wide.data(), own.data(), nullptr);
      char* out = grad == nullptr ? nullptr
                                  : static_cast<char*>(grad) + (first + i) * dim_ * element_size(x_.dtype);
      const float* u = unit.get() + i * dim_;
      cosines += kernel_.preservation_row(
          u, own.data(), nce ? mixed.get() + i * dim_ : nullptr,
          nce ? y_.get() + (first + i) * dim_ : nullptr, pull, push,
          static_cast<float>(inverse[i]), dim_, x_.dtype, out);
    }
    return cosines;
  }

  // mixed = (softmax over rows + softmax over columns) y
  void mix_stripe(int64_t first, int64_t count, const float* unit, float* mixed) {
    const Buffer<float> own = tile_buffer(count);
    const Buffer<float> panel = make_buffer<float>(kTileColumns * kPanelRows);
    for (int64_t c = 0; c < batch_; c += kTileColumns) {
      const int64_t width = std::min(kTileColumns, batch_ - c);
      float* tile = tile_at(first, count, c, own);
      if (!kept_) multiply_transposed(unit, count, c, width, tile);
      kernel_.softmax_sum(tile, count, width, &row_sums_.largest[first],
                          &row_sums_.sum[first], &column_sums_.largest[c], &column_sums_.sum[c]);
      multiply_add(tile, count, c, width, c > 0, panel.get(), mixed);
    }
  }

  Matrix x_, own_, other_;
  double cos_weight_, nce_weight_;
  float logit_scale_;
  const Parallel& parallel_;
  int64_t batch_, dim_, stripe_, stripes_;
  const Kernels& kernel_ = kernels();
  Buffer<float> y_;          // unit rows of other_
  Buffer<float> y_columns_;  // logit_scale times the same, transposed in panels of 32 rows
  Buffer<float> kept_;       // logits, tile by tile, of a small batch
  LogSums row_sums_{0}, column_sums_{0};  // once complete, `sum` holds its logarithm
};

}  // namespace

void preservation_loss(const PreservationArgs& args, double terms[4], const Parallel& parallel) {
  Side(args.text, args.frozen_text, args.frozen_image, args.weights[0], args.weights[2],
       args.logit_scale, parallel)
      .run(args.grad_text, &terms[0], &terms[2]);
  Side(args.image, args.frozen_image, args.frozen_text, args.weights[1], args.weights[3],
       args.logit_scale, parallel)
      .run(args.grad_image, &terms[1], &terms[3]);
}

}  // namespace saferclip::cpu
