// One fp32 product of queries and bank, in cache; per query a threshold from its bound, and exact
// scores for the rows that reach it.
#include "small_bank.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "buffer.h"
#include "kernels.h"

namespace saferclip::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kRowsPerK = 32;            // up to 32 k rows, the product costs less than what int8 lets through
constexpr int64_t kAlwaysSmall = 256;        // rows that are not worth quantising
constexpr int64_t kPanelBytes = 16 << 20;    // of the transposed bank
constexpr int64_t kDirectQueries = 12;       // fewer do not pay for transposing the bank
constexpr int64_t kTileBytes = 256 << 10;    // products of a block of queries, half of a small L2
constexpr int64_t kMaxBlock = 96;            // queries of a block: 300 KB at d = 768

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

class SmallBank {
 public:
  SmallBank(const Rows& query, const Rows& bank, int k, float* scores, int64_t* indices)
      : query_(query),
        bank_(bank),
        k_(k),
        scores_(scores),
        indices_(indices),
        panels_((bank.count + kPanelRows - 1) / kPanelRows),
        squares_(panels_),
        // Sixteen more than the width: rows 4 KB apart would compete for the same cache lines.
        query_stride_(round_up(bank.dim, 16) + 16),
        // More than three quarters of the rows wanted: scoring all exactly costs less than the product.
        all_exact_(bank.count * 3 <= int64_t{k} * 4) {}

  void run(const Parallel& parallel) {
    if (query_.count < kDirectQueries || all_exact_ || panels_ * kPanelRows * bank_.dim * 4 > kPanelBytes) {
      for (int64_t first = 0; first < query_.count; first += kMaxBlock) {
        run_direct(first, std::min(kMaxBlock, query_.count - first), parallel);
      }
      return;
    }
    transposed_ = make_buffer<float>(panels_ * kPanelRows * bank_.dim);
    parallel(panels_, [&](int64_t p) {
      squares_[p] = kernel_.transpose_panel(bank_.row(p * kPanelRows), bank_.dtype, panel_rows(p), bank_.dim,
                                            1, transposed(p));
    });
    set_longest();
    const int64_t most = std::clamp<int64_t>(kTileBytes / (dots_stride() * 4), kDirectQueries, kMaxBlock);
    const int64_t rounds = (query_.count + most * parallel.threads - 1) / (most * parallel.threads);
    const int64_t blocks = std::min(query_.count, rounds * parallel.threads);
    parallel(blocks, [&](int64_t b) {
      const int64_t first = b * query_.count / blocks;
      run_block(first, (b + 1) * query_.count / blocks - first);
    });
  }

 private:
  int panel_rows(int64_t panel) const {
    return static_cast<int>(std::min<int64_t>(kPanelRows, bank_.count - panel * kPanelRows));
  }
  float* transposed(int64_t panel) { return transposed_.get() + panel * kPanelRows * bank_.dim; }
  int64_t dots_stride() const { return panels_ * kPanelRows; }

  // Few queries: rows as they are, threads share the bank.
  void run_direct(int64_t first, int64_t count, const Parallel& parallel) {
    const Buffer<float> dots = make_buffer<float>(count * dots_stride());
    if (!all_exact_) {
      const Buffer<float> floats = to_floats(first, count);
      parallel(panels_, [&](int64_t p) {
        float squares[kPanelRows] = {};
        kernel_.dot_rows(bank_.row(p * kPanelRows), bank_.dtype, panel_rows(p), bank_.dim, floats.get(),
                         query_stride_, static_cast<int>(count), dots.get() + p * kPanelRows, dots_stride(), squares);
        float top = 0;
        for (const float square : squares) top = square > top || std::isnan(square) ? square : top;
        squares_[p] = top;
      });
      set_longest();
    }
    parallel(count, [&](int64_t i) {
      Choice choice(bank_);
      choose(first + i, dots.get() + i * dots_stride(), choice);
    });
  }

  void run_block(int64_t first, int64_t count) {
    const Buffer<float> floats = to_floats(first, count);
    const Buffer<float> dots = make_buffer<float>(count * dots_stride());
    for (int64_t p = 0; p < panels_; ++p) {
      kernel_.multiply_panel(floats.get(), count, query_stride_, transposed(p), bank_.dim,
                             dots.get() + p * kPanelRows, dots_stride(), kPanelRows, false);
    }
    Choice choice(bank_);
    for (int64_t i = 0; i < count; ++i) choose(first + i, dots.get() + i * dots_stride(), choice);
  }

  Buffer<float> to_floats(int64_t first, int64_t count) const {
    Buffer<float> floats = make_buffer<float>(count * query_stride_);
    std::vector<double> wide(query_.dtype == DType::kFloat ? 0 : query_.dim);
    for (int64_t i = 0; i < count; ++i) {
      float* to = floats.get() + i * query_stride_;
      if (query_.dtype == DType::kFloat) {
        std::memcpy(to, query_.row(first + i), query_.dim * sizeof(float));
        continue;
      }
      kernel_.widen(query_.row(first + i), query_.dtype, query_.dim, wide.data());
      for (int64_t j = 0; j < query_.dim; ++j) to[j] = static_cast<float>(wide[j]);
    }
    return floats;
  }

  // The longest row of the bank, from above; NaN or infinity where fp32 cannot tell.
  void set_longest() {
    float top = 0;
    for (const float square : squares_) top = square > top || std::isnan(square) ? square : top;
    longest_ = std::sqrt(double{top}) * (1 + slack()) + 1.6e-19 * std::sqrt(static_cast<double>(bank_.dim));
  }

  // Relative error of an fp32 sum of dim products in any order, and of the double one.
  double slack() const { return (static_cast<double>(bank_.dim) + 8) * 6e-8; }

  // How far an fp32 product may be from <query, row>, whatever the row: gamma |q||s|, and what
  // underflows (also where denormals are flushed). Infinite where a sum may overflow, or slack is no bound.
  double error(double norm) const {
    const double reach = norm * longest_;
    if (all_exact_ || !(reach < 1e38) || bank_.dim > 100'000) return kInfinity;
    return slack() * reach + 2.4e-38 * static_cast<double>(bank_.dim);
  }

  // What a thread needs to choose the rows of a query.
  struct Choice {
    std::vector<double> query;
    std::vector<int32_t> rows;
    std::vector<uint64_t> keys;
    explicit Choice(const Rows& bank) : query(bank.dim), rows(bank.count), keys(bank.count) {}
  };

  // Sorts like (score, lower row first); score is not -0.
  static uint64_t key(float score, int32_t row) {
    uint32_t bits;
    std::memcpy(&bits, &score, sizeof(bits));
    bits ^= bits >> 31 != 0 ? 0xffffffffu : 0x80000000u;
    return uint64_t{bits} << 32 | ~static_cast<uint32_t>(row);
  }
  static float score_of(uint64_t key) {
    uint32_t bits = static_cast<uint32_t>(key >> 32);
    bits ^= bits >> 31 != 0 ? 0x80000000u : 0xffffffffu;
    float score;
    std::memcpy(&score, &bits, sizeof(score));
    return score;
  }

  void choose(int64_t i, float* dots, Choice& choice) const {
    float* scores = scores_ + i * k_;
    int64_t* indices = indices_ + i * k_;
    kernel_.widen(query_.row(i), query_.dtype, query_.dim, choice.query.data());
    const double norm =
        std::sqrt(kernel_.exact_dot(choice.query.data(), query_.row(i), query_.dtype, query_.dim));
    if (norm == 0) {
      for (int j = 0; j < k_; ++j) scores[j] = 0, indices[j] = j;
      return;
    }
    const int64_t found =
        kernel_.top_rows(dots, bank_.count, k_, error(norm), norm, choice.rows.data());
    for (int64_t c = 0; c < found; ++c) {
      const int32_t row = choice.rows[c];
      const double dot = kernel_.exact_dot(choice.query.data(), bank_.row(row), bank_.dtype, bank_.dim);
      const float score = static_cast<float>(dot / norm) + 0.0f;
      choice.keys[c] = key(std::isnan(score) ? -kInfinity : score, row);
    }
    const auto best = choice.keys.begin(), last = best + found;
    if (found > k_) std::nth_element(best, best + k_ - 1, last, std::greater<>());
    std::sort(best, best + k_, std::greater<>());
    for (int j = 0; j < k_; ++j) {
      scores[j] = score_of(best[j]);
      indices[j] = static_cast<int64_t>(~static_cast<uint32_t>(best[j]));
    }
  }

  const Kernels& kernel_ = kernels();
  Rows query_, bank_;
  int k_;
  float* scores_;
  int64_t* indices_;
  int64_t panels_;
  std::vector<float> squares_;  // per panel, of its longest row
  int64_t query_stride_;
  bool all_exact_;
  Buffer<float> transposed_;  // [panels][dim][32]
  double longest_ = 0;
};

}  // namespace

bool is_small_bank(const Rows& bank, int k) {
  return bank.count <= std::max(kAlwaysSmall, kRowsPerK * k);
}

void search_small_bank(const Rows& query, const Rows& bank, int k, float* scores, int64_t* indices,
                       const Parallel& parallel) {
  SmallBank(query, bank, k, scores, indices).run(parallel);
}

}  // namespace saferclip::cpu
