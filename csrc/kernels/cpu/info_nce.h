// Symmetric InfoNCE of the rows of one process against the counterparts of all; see docs/method.md.
#pragma once
#include <cstdint>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "matrix.h"
#include "parallel.h"

namespace saferclip::cpu {

struct InfoNceArgs {
  Matrix x, y;          // [M,d] and [B,d], any scale; row first + i of y is the counterpart of row i of x
  int64_t first;
  const uint8_t* mask;  // [B] or null: rows of 0 neither count nor act as negatives, on either side
  float logit_scale;
};

// What a pass over the logits S = logit_scale x y^T of unit rows leaves behind.
struct LogSums {
  float* rows;     // [3,M] largest logit, log of the sum of exp(logit - largest), logit of the counterpart
  float* columns;  // [2,B] largest logit and sum of exp(logit - largest); the gradient wants its log
  float* logits;   // [M * B] S itself, or null: then the gradient computes it again
};

struct GradientArgs {
  LogSums sums;        // null where the InfoNCE term has no weight
  double nce_weight;
  const Matrix* own;   // [M,d] any scale, or null: rows that the cosine term pulls to
  double pull;         // d loss / d cosine
  void* grad;          // [M,d] in the dtype of x, or null
};

// No result depends on the number of threads.
class InfoNce {
 public:
  InfoNce(const InfoNceArgs& args, const Parallel& parallel);

  // Fills `sums`: columns over the rows of this process, zeros (a sum of 1) where the mask is 0.
  void log_sums(const LogSums& sums);
  // This process's part of the loss: over its rows, divided by the count of all chosen rows. columns
  // hold logarithms, of sums over the rows of all processes.
  double loss(const LogSums& sums) const;
  // Writes the gradient and returns the sum of the cosines with `own`.
  double gradient(const GradientArgs& args);

 private:
  int64_t stripes() const { return (static_cast<int64_t>(rows_.size()) + stripe_ - 1) / stripe_; }
  int64_t stripe_rows(int64_t s) const;
  int64_t columns() const { return static_cast<int64_t>(columns_.size()); }
  void make_columns(bool with_panels);
  void scale_rows(const Matrix& x, const int64_t* rows, int64_t count, double length, float* out,
                  double* inverse) const;
  void transpose_panel(int64_t p);
  void multiply_transposed(const float* scaled, int64_t count, int64_t column, int64_t width, float* tile) const;
  void multiply_add(const float* tile, int64_t count, int64_t row, int64_t depth, bool accumulate,
                    float* panel, float* mixed) const;
  void sum_stripe(int64_t s, const LogSums& sums, float* column_largest, float* column_sum) const;
  double finish_stripe(int64_t s, const GradientArgs& args, const float* column_largest,
                       const float* column_log) const;
  void mix_stripe(int64_t s, const LogSums& sums, const float* column_largest, const float* column_log,
                  float* mixed) const;

  InfoNceArgs args_;
  const Parallel& parallel_;
  const Kernels& kernel_ = kernels();
  const int64_t dim_;
  const double root_;                    // of |logit_scale|: the length of both sides' rows, so that x and y
                                         // may change roles and every logit keeps its bits
  std::vector<int64_t> rows_, columns_;  // those that the mask chooses, of x and of y
  int64_t diagonal_ = 0;                 // columns_[diagonal_ + r] is the counterpart of rows_[r]
  int64_t stripe_ = 0;
  Buffer<float> y_;                      // chosen rows of y at length root_, negated where logit_scale is
  Buffer<float> panels_;                 // the same, transposed in panels of 32 rows
};

}  // namespace saferclip::cpu
