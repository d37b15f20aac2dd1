#include "preservation_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "buffer.h"
#include "kernels.h"

namespace saferclip::cpu {
namespace {

constexpr int64_t kTileColumns = 1024;
constexpr int64_t kMaxTileRows = 512;  // a tile of logits is 2 MB at most: it stays in L2
constexpr int64_t kStripes = 16;       // at least, where the batch allows: work for that many threads

// Depends on the batch alone, so that no thread count changes the order of additions.
int64_t tile_rows(int64_t batch) {
  const int64_t share = (batch + kStripes - 1) / kStripes;
  return std::clamp<int64_t>((share + 15) / 16 * 16, 16, kMaxTileRows);
}

// Rows of `rows` at length 1, and 1 / length (0 for a zero row).
void make_unit(const Rows& rows, int64_t first, int64_t count, double* wide, float* unit,
               double* inverse) {
  const Kernels& kernel = kernels();
  for (int64_t i = 0; i < count; ++i) {
    kernel.widen(rows.row(first + i), rows.dtype, rows.dim, wide);
    const double square = kernel.exact_dot(wide, rows.row(first + i), rows.dtype, rows.dim);
    const double scale = square > 0 ? 1 / std::sqrt(square) : 0;
    for (int64_t j = 0; j < rows.dim; ++j) {
      unit[i * rows.dim + j] = static_cast<float>(wide[j] * scale);
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
  Side(const Rows& x, const Rows& own, const Rows& other, double cos_weight, double nce_weight,
       float logit_scale, const Multiply& multiply, const Parallel& parallel)
      : x_(x),
        own_(own),
        other_(other),
        cos_weight_(cos_weight),
        nce_weight_(nce_weight),
        logit_scale_(logit_scale),
        multiply_(multiply),
        parallel_(parallel),
        batch_(x.count),
        dim_(x.dim),
        stripe_(tile_rows(x.count)),
        stripes_((x.count + stripe_ - 1) / stripe_) {}

  void run(void* grad, double* cos_term, double* nce_term) {
    *nce_term = 0;
    if (nce_weight_ != 0) {
      y_ = make_buffer<float>(batch_ * dim_);
      parallel_(stripes_, [&](int64_t s) {
        std::vector<double> wide(dim_);
        make_unit(other_, s * stripe_, rows(s), wide.data(), y_.get() + s * stripe_ * dim_, nullptr);
      });
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

  void logits(const float* unit, int64_t count, int64_t column, int64_t columns, float* tile) const {
    multiply_({.a = unit, .b = y_.get() + column * dim_, .c = tile, .m = count, .n = columns,
               .k = dim_, .lda = dim_, .ldb = dim_, .ldc = columns, .transpose_b = true,
               .accumulate = false});
  }

  // Fills row_lse_ and column_lse_; returns the InfoNCE term.
  double log_sums() {
    row_lse_.resize(batch_);
    column_lse_.resize(batch_);
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
      const double lse = largest + std::log(sum);
      column_lse_[j] = static_cast<float>(lse);
      total += lse + row_lse_[j] - 2 * diagonal[j];
    }
    return 0.5 * total / static_cast<double>(batch_);
  }

  void sum_stripe(int64_t s, LogSums& columns, std::vector<double>& diagonal) {
    const int64_t first = s * stripe_, count = rows(s);
    const Buffer<float> unit = make_buffer<float>(count * dim_);
    const Buffer<float> tile = make_buffer<float>(count * std::min(batch_, kTileColumns));
    std::vector<double> wide(dim_);
    make_unit(x_, first, count, wide.data(), unit.get(), nullptr);
    LogSums row_sums(count);
    for (int64_t c = 0; c < batch_; c += kTileColumns) {
      const int64_t width = std::min(kTileColumns, batch_ - c);
      logits(unit.get(), count, c, width, tile.get());
      for (int64_t i = std::max(first, c); i < std::min(first + count, c + width); ++i) {
        diagonal[i] = static_cast<double>(logit_scale_) * tile[(i - first) * width + i - c];
      }
      kernels().log_sum_exp(tile.get(), count, width, logit_scale_, row_sums.largest.data(),
                            row_sums.sum.data(), &columns.largest[c], &columns.sum[c]);
    }
    for (int64_t i = 0; i < count; ++i) {
      row_lse_[first + i] = row_sums.largest[i] + std::log(static_cast<double>(row_sums.sum[i]));
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
      cosines += kernels().preservation_row(
          u, own.data(), nce ? mixed.get() + i * dim_ : nullptr,
          nce ? y_.get() + (first + i) * dim_ : nullptr, pull, push,
          static_cast<float>(inverse[i]), dim_, x_.dtype, out);
    }
    return cosines;
  }

  // mixed = (softmax over rows + softmax over columns) y
  void mix_stripe(int64_t first, int64_t count, const float* unit, float* mixed) {
    const Buffer<float> tile = make_buffer<float>(count * std::min(batch_, kTileColumns));
    const std::vector<float> row_lse(row_lse_.begin() + first, row_lse_.begin() + first + count);
    for (int64_t c = 0; c < batch_; c += kTileColumns) {
      const int64_t width = std::min(kTileColumns, batch_ - c);
      logits(unit, count, c, width, tile.get());
      kernels().softmax_sum(tile.get(), count, width, logit_scale_, row_lse.data(), &column_lse_[c]);
      multiply_({.a = tile.get(), .b = y_.get() + c * dim_, .c = mixed, .m = count, .n = dim_,
                 .k = width, .lda = width, .ldb = dim_, .ldc = dim_, .transpose_b = false,
                 .accumulate = c > 0});
    }
  }

  Rows x_, own_, other_;
  double cos_weight_, nce_weight_;
  float logit_scale_;
  const Multiply& multiply_;
  const Parallel& parallel_;
  int64_t batch_, dim_, stripe_, stripes_;
  Buffer<float> y_;  // aligned like every operand: BLAS rounds by alignment
  std::vector<double> row_lse_;
  std::vector<float> column_lse_;
};

}  // namespace

void preservation_loss(const PreservationArgs& args, double terms[4], const Multiply& multiply,
                       const Parallel& parallel) {
  Side(args.text, args.frozen_text, args.frozen_image, args.weights[0], args.weights[2],
       args.logit_scale, multiply, parallel)
      .run(args.grad_text, &terms[0], &terms[2]);
  Side(args.image, args.frozen_image, args.frozen_text, args.weights[1], args.weights[3],
       args.logit_scale, multiply, parallel)
      .run(args.grad_image, &terms[1], &terms[3]);
}

}  // namespace saferclip::cpu
