#include "info_nce.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace saferclip::cpu {
namespace {

constexpr int64_t kTileColumns = 256;  // with kMaxTileRows, a tile of logits takes 512 KB of L2
constexpr int64_t kMaxTileRows = 504;
constexpr int64_t kStripes = 16;  // at least, where the batch allows: work for that many threads
constexpr int64_t kDepth = 256;   // rows of a matrix panel used at a time: 32 KB, fits L1
constexpr float kLowest = -std::numeric_limits<float>::max();  // finite: of no row, where one is subtracted

// Depends on the rows alone, so that no thread count changes the order of additions.
int64_t tile_rows(int64_t rows) {
  const int64_t even = (rows + kStripes - 1) / kStripes;
  return std::clamp<int64_t>((even + 23) / 24 * 24, 24, kMaxTileRows);  // 12 rows are multiplied together
}

int64_t panel_count(int64_t columns) { return (columns + kPanelRows - 1) / kPanelRows; }

}  // namespace

InfoNce::InfoNce(const InfoNceArgs& args, const Parallel& parallel)
    : args_(args),
      parallel_(parallel),
      dim_(args.x.dim),
      root_(std::sqrt(std::abs(double{args.logit_scale}))) {
  for (int64_t j = 0; j < args.y.rows; ++j) {
    if (args.mask != nullptr && args.mask[j] == 0) continue;
    if (j < args.first) ++diagonal_;
    if (j >= args.first && j < args.first + args.x.rows) rows_.push_back(j - args.first);
    columns_.push_back(j);
  }
  stripe_ = tile_rows(static_cast<int64_t>(rows_.size()));
}

int64_t InfoNce::stripe_rows(int64_t s) const {
  return std::min(stripe_, static_cast<int64_t>(rows_.size()) - s * stripe_);
}

// The rows of x that `rows` names, at length 1 and then times `length`, and 1 / their own length (0 for a
// zero row) unless inverse is null.
void InfoNce::scale_rows(const Matrix& x, const int64_t* rows, int64_t count, double length, float* out,
                         double* inverse) const {
  std::vector<double> wide(dim_);
  for (int64_t i = 0; i < count; ++i) {
    const double square = kernel_.widen(x.row(rows[i]), x.dtype, dim_, wide.data());
    const double scale = square > 0 ? 1 / std::sqrt(square) : 0;
    for (int64_t j = 0; j < dim_; ++j) {
      out[i * dim_ + j] = static_cast<float>(wide[j] * scale) * static_cast<float>(length);
    }
    if (inverse != nullptr) inverse[i] = scale;
  }
}

void InfoNce::make_columns(bool with_panels) {
  const int64_t panels = panel_count(columns());
  if (!y_) {
    y_ = make_buffer<float>(columns() * dim_);
    parallel_(panels, [&](int64_t p) {
      const int64_t row = p * kPanelRows;
      scale_rows(args_.y, columns_.data() + row, std::min<int64_t>(kPanelRows, columns() - row),
                 std::copysign(root_, args_.logit_scale), y_.get() + row * dim_, nullptr);
    });
  }
  if (!with_panels || panels_) return;
  panels_ = make_buffer<float>(panels * kPanelRows * dim_);
  parallel_(panels, [&](int64_t p) { transpose_panel(p); });
}

// panels_ panel p: [dim][32] of y_, rows 32 p and on, zeros behind the last.
void InfoNce::transpose_panel(int64_t p) {
  const int64_t row = p * kPanelRows;
  const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, columns() - row));
  kernel_.transpose_panel(y_.get() + row * dim_, DType::kFloat32, rows, dim_, 1,
                          panels_.get() + row * dim_);
}

// The logits: tile [count, width] = scaled [count, dim] times rows [column, column + width) of y_, transposed.
void InfoNce::multiply_transposed(const float* scaled, int64_t count, int64_t column, int64_t width,
                                  float* tile) const {
  for (int64_t k = 0; k < dim_; k += kDepth) {
    for (int64_t p = 0; p < panel_count(width); ++p) {
      const float* panel = panels_.get() + (column + p * kPanelRows) * dim_ + k * kPanelRows;
      const int64_t lanes = std::min<int64_t>(kPanelRows, width - p * kPanelRows);
      kernel_.multiply_panel(scaled + k, count, dim_, panel, std::min(kDepth, dim_ - k),
                             tile + p * kPanelRows, width, static_cast<int>(lanes), k > 0);
    }
  }
}

// mixed [count, dim] (+)= tile [count, depth] times rows [row, row + depth) of y_.
void InfoNce::multiply_add(const float* tile, int64_t count, int64_t row, int64_t depth, bool accumulate,
                           float* panel, float* mixed) const {
  for (int64_t j = 0; j < dim_; j += kPanelRows) {
    const int64_t width = std::min<int64_t>(kPanelRows, dim_ - j);
    if (width < kPanelRows) std::fill_n(panel, depth * kPanelRows, 0.0f);
    for (int64_t k = 0; k < depth; ++k) {
      std::copy_n(y_.get() + (row + k) * dim_ + j, width, panel + k * kPanelRows);
    }
    kernel_.multiply_panel(tile, count, depth, panel, depth, mixed + j, dim_, static_cast<int>(width),
                           accumulate);
  }
}

void InfoNce::log_sums(const LogSums& sums) {
  make_columns(true);
  const int64_t all = args_.y.rows, n = columns();
  std::fill_n(sums.rows, 3 * args_.x.rows, 0.0f);
  std::fill_n(sums.columns, all, 0.0f);
  std::fill_n(sums.columns + all, all, 1.0f);
  std::vector<float> largest(stripes() * n), sum(stripes() * n);
  parallel_(stripes(), [&](int64_t s) { sum_stripe(s, sums, &largest[s * n], &sum[s * n]); });
  for (int64_t j = 0; j < n; ++j) {
    float top = kLowest;
    for (int64_t s = 0; s < stripes(); ++s) top = std::max(top, largest[s * n + j]);
    double total = 0;
    for (int64_t s = 0; s < stripes(); ++s) {
      total += sum[s * n + j] * std::exp(static_cast<double>(largest[s * n + j]) - top);
    }
    sums.columns[columns_[j]] = top;
    sums.columns[all + columns_[j]] = static_cast<float>(total);
  }
}

void InfoNce::sum_stripe(int64_t s, const LogSums& sums, float* column_largest, float* column_sum) const {
  const int64_t first = s * stripe_, count = stripe_rows(s), n = columns(), batch = args_.x.rows;
  const Buffer<float> scaled = make_buffer<float>(count * dim_);
  const Buffer<float> own = make_buffer<float>(sums.logits == nullptr ? count * std::min(n, kTileColumns) : 0);
  scale_rows(args_.x, &rows_[first], count, root_, scaled.get(), nullptr);
  std::vector<float> largest(count, -std::numeric_limits<float>::infinity()), sum(count, 0.0f);
  for (int64_t c = 0; c < n; c += kTileColumns) {
    const int64_t width = std::min(kTileColumns, n - c);
    float* tile = sums.logits == nullptr ? own.get() : sums.logits + first * n + count * c;
    multiply_transposed(scaled.get(), count, c, width, tile);
    const int64_t begin = diagonal_ + first;
    for (int64_t j = std::max(begin, c); j < std::min(begin + count, c + width); ++j) {
      sums.rows[2 * batch + rows_[j - diagonal_]] = tile[(j - begin) * width + j - c];
    }
    kernel_.log_sum_exp(tile, count, width, largest.data(), sum.data(), column_largest + c, column_sum + c);
  }
  for (int64_t i = 0; i < count; ++i) {
    sums.rows[rows_[first + i]] = largest[i];
    sums.rows[batch + rows_[first + i]] = static_cast<float>(std::log(double{sum[i]}));
  }
}

double InfoNce::loss(const LogSums& sums) const {
  const int64_t batch = args_.x.rows, all = args_.y.rows;
  double total = 0;
  for (const int64_t i : rows_) {
    const double diagonal = sums.rows[2 * batch + i];
    const int64_t j = args_.first + i;
    total += (sums.rows[i] - diagonal) + sums.rows[batch + i];
    total += (sums.columns[j] - diagonal) + sums.columns[all + j];
  }
  return 0.5 * total / static_cast<double>(std::max<int64_t>(columns(), 1));
}

double InfoNce::gradient(const GradientArgs& args) {
  const int64_t all = args_.y.rows, n = columns();
  std::vector<float> largest, log;
  if (args.grad != nullptr && args.sums.rows != nullptr) {
    make_columns(args.sums.logits == nullptr);
    for (const int64_t j : columns_) {
      largest.push_back(args.sums.columns[j]);
      log.push_back(args.sums.columns[all + j]);
    }
  }
  if (args.grad != nullptr && n < all) {  // what the mask leaves out has no gradient
    std::memset(args.grad, 0, args_.x.rows * dim_ * element_size(args_.x.dtype));
  }
  std::vector<double> cosines(stripes());
  parallel_(stripes(), [&](int64_t s) { cosines[s] = finish_stripe(s, args, largest.data(), log.data()); });
  double total = 0;
  for (const double c : cosines) total += c;
  return total;
}

// Gradient of a stripe, and the sum of its cosines with its own frozen rows.
double InfoNce::finish_stripe(int64_t s, const GradientArgs& args, const float* column_largest,
                              const float* column_log) const {
  const int64_t first = s * stripe_, count = stripe_rows(s);
  const bool nce = args.sums.rows != nullptr && args.grad != nullptr;
  const Buffer<float> unit = make_buffer<float>(count * dim_);
  const Buffer<float> mixed = make_buffer<float>(nce ? count * dim_ : 0);
  std::vector<double> inverse(count);
  scale_rows(args_.x, &rows_[first], count, 1, unit.get(), inverse.data());
  if (nce) mix_stripe(s, args.sums, column_largest, column_log, mixed.get());
  std::vector<float> own(dim_);
  const float pull = static_cast<float>(args.pull);
  const float push = static_cast<float>(0.5 * args.nce_weight * root_ / columns());  // y_ has the other root
  double cosines = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = rows_[first + i];
    if (args.own != nullptr) scale_rows(*args.own, &row, 1, 1, own.data(), nullptr);
    char* out = args.grad == nullptr ? nullptr
                                     : static_cast<char*>(args.grad) + row * dim_ * element_size(args_.x.dtype);
    cosines += kernel_.preservation_row(
        unit.get() + i * dim_, own.data(), nce ? mixed.get() + i * dim_ : nullptr,
        nce ? y_.get() + (diagonal_ + first + i) * dim_ : nullptr, pull, push,
        static_cast<float>(inverse[i]), dim_, args_.x.dtype, out);
  }
  return cosines;
}

// mixed = (softmax over rows + softmax over columns) y_
void InfoNce::mix_stripe(int64_t s, const LogSums& sums, const float* column_largest, const float* column_log,
                         float* mixed) const {
  const int64_t first = s * stripe_, count = stripe_rows(s), n = columns();
  const Buffer<float> tile = make_buffer<float>(count * std::min(n, kTileColumns));
  const Buffer<float> panel = make_buffer<float>(kTileColumns * kPanelRows);
  const Buffer<float> scaled = make_buffer<float>(sums.logits == nullptr ? count * dim_ : 0);
  if (sums.logits == nullptr) scale_rows(args_.x, &rows_[first], count, root_, scaled.get(), nullptr);
  std::vector<float> largest(count), log(count);
  for (int64_t i = 0; i < count; ++i) {
    largest[i] = sums.rows[rows_[first + i]];
    log[i] = sums.rows[args_.x.rows + rows_[first + i]];
  }
  for (int64_t c = 0; c < n; c += kTileColumns) {
    const int64_t width = std::min(kTileColumns, n - c);
    const float* logits = sums.logits == nullptr ? tile.get() : sums.logits + first * n + count * c;
    if (sums.logits == nullptr) multiply_transposed(scaled.get(), count, c, width, tile.get());
    kernel_.softmax_sum(logits, count, width, largest.data(), log.data(), column_largest + c, column_log + c,
                        tile.get());
    multiply_add(tile.get(), count, c, width, c > 0, panel.get(), mixed);
  }
}

}  // namespace saferclip::cpu
