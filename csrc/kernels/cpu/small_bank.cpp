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
#include "rounding.h"

namespace saferclip::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kRowsPerK = 32;            // up to 32 k rows, the product costs less than what int8 lets through
constexpr int64_t kAlwaysSmall = 256;        // rows that are not worth quantizing
constexpr int64_t kQueriesPerThread = 4;     // fewer do not pay for reading the whole bank on every thread
constexpr int64_t kShortRow = 256;            // adding up the lanes of a short product takes longer than
constexpr int64_t kWorthTransposing = 12;     // transposing the rows for this many queries
constexpr int64_t kTileBytes = 256 << 10;    // products of a block of queries, half of a small L2
constexpr int64_t kRankByCounting = 16;     // candidates; more are sorted
constexpr int64_t kMaxBlock = 96;            // queries of a block: 300 KB at d = 768
constexpr int64_t kMaxSummed = 100'000;      // dim up to which slack() bounds the error of a sum
// What underflow takes where denormals are flushed to zero: from the length of a row sqrt(2 dim) 2^-63, from an inner
// product 2 dim 2^-126.
constexpr double kLostRowLength = 1.6e-19;
constexpr double kLostProduct = 2.4e-38;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

class SmallBank {
 public:
  SmallBank(const Matrix& query, const Matrix& bank, int k, float* scores, int64_t* indices)
      : query_(query),
        bank_(bank),
        k_(k),
        scores_(scores),
        indices_(indices),
        panels_((bank.rows + kPanelRows - 1) / kPanelRows),
        // Rows 4 KB apart would compete for the same cache lines.
        copies_(query.dtype != DType::kFloat32 || bank.dim % 1024 == 0),
        query_stride_(copies_ ? round_up(bank.dim, 16) + 16 : bank.dim),
        // More than three quarters of the rows wanted: scoring all exactly costs less than the product.
        all_exact_(bank.rows * 3 <= int64_t{k} * 4) {}

  void run(const Parallel& parallel) {
    if (query_.rows >= kQueriesPerThread * parallel.threads) {
      run_by_queries(parallel);
    } else {
      run_by_rows(parallel);
    }
  }

 private:
  int panel_rows(int64_t panel) const {
    return static_cast<int>(std::min<int64_t>(kPanelRows, bank_.rows - panel * kPanelRows));
  }
  int64_t dots_stride() const { return panels_ * kPanelRows; }

  // Tasks take queries, and the whole bank.
  void run_by_queries(const Parallel& parallel) {
    const int64_t most = std::clamp<int64_t>(kTileBytes / (dots_stride() * 4), kQueriesPerThread, kMaxBlock);
    const int64_t rounds = (query_.rows + most * parallel.threads - 1) / (most * parallel.threads);
    const int64_t blocks = std::min(query_.rows, rounds * parallel.threads);
    parallel(blocks, [&](int64_t b) {
      const int64_t first = b * query_.rows / blocks, count = (b + 1) * query_.rows / blocks - first;
      const Buffer<float> dots = make_buffer<float>(count * dots_stride());
      float square = 0;
      if (!all_exact_) {
        Buffer<float> copy;
        const float* floats = to_floats(first, count, copy);
        for (int64_t p = 0; p < panels_; ++p) square = larger(square, multiply(p, floats, count, dots.get()));
      }
      Choice choice(bank_);
      for (int64_t i = 0; i < count; ++i) {
        choose(first + i, dots.get() + i * dots_stride(), longest(square), choice);
      }
    });
  }

  // Few queries: tasks take rows, then queries.
  void run_by_rows(const Parallel& parallel) {
    const Buffer<float> dots = make_buffer<float>(query_.rows * dots_stride());
    std::vector<float> squares(panels_);
    if (!all_exact_) {
      Buffer<float> copy;
      const float* floats = to_floats(0, query_.rows, copy);
      parallel(panels_, [&](int64_t p) { squares[p] = multiply(p, floats, query_.rows, dots.get()); });
    }
    float square = 0;
    for (const float s : squares) square = larger(square, s);
    parallel(query_.rows, [&](int64_t i) {
      Choice choice(bank_);
      choose(i, dots.get() + i * dots_stride(), longest(square), choice);
    });
  }

  // The products of a panel with `count` queries; returns the largest squared length of its rows.
  float multiply(int64_t panel, const float* floats, int64_t count, float* dots) const {
    const void* rows = bank_.row(panel * kPanelRows);
    const bool transposed = bank_.dim <= kShortRow && count >= kWorthTransposing;
    float squares[kPanelRows] = {}, top = 0;
    dots += panel * kPanelRows;
    kernel_.dot_rows(rows, bank_.dtype, panel_rows(panel), bank_.dim, floats, query_stride_,
                     static_cast<int>(transposed ? 1 : count), dots, dots_stride(), squares);
    if (transposed) {
      alignas(64) float columns[kShortRow * kPanelRows];
      kernel_.transpose_panel(rows, bank_.dtype, panel_rows(panel), bank_.dim, 1, columns);
      kernel_.multiply_panel(floats, count, query_stride_, columns, bank_.dim, dots, dots_stride(), kPanelRows, false);
    }
    for (const float square : squares) top = larger(top, square);
    return top;
  }

  static float larger(float top, float square) { return square > top || std::isnan(square) ? square : top; }

  // The queries in fp32, query_stride_ apart: as they are, or in `copy`.
  const float* to_floats(int64_t first, int64_t count, Buffer<float>& copy) const {
    if (!copies_) return static_cast<const float*>(query_.row(first));
    copy = make_buffer<float>(count * query_stride_);
    std::vector<double> wide(query_.dim);
    for (int64_t i = 0; i < count; ++i) {
      if (query_.dtype == DType::kFloat32) {
        std::memcpy(&copy[i * query_stride_], query_.row(first + i), query_.dim * sizeof(float));
        continue;
      }
      kernel_.widen(query_.row(first + i), query_.dtype, query_.dim, wide.data());
      for (int64_t j = 0; j < query_.dim; ++j) copy[i * query_stride_ + j] = static_cast<float>(wide[j]);
    }
    return copy.get();
  }

  // The longest row of the bank, from above; NaN or infinity where fp32 cannot tell.
  double longest(float square) const {
    return std::sqrt(double{square}) * (1 + slack()) + kLostRowLength * std::sqrt(static_cast<double>(bank_.dim));
  }

  // Relative error of an fp32 sum of dim products in any order, and of the double one.
  double slack() const { return (static_cast<double>(bank_.dim) + 8) * kUnitRoundoff; }

  // How far an fp32 product may be from <query, row>, whatever the row: gamma |q||s|, and what
  // underflows (also where denormals are flushed). Infinite where a sum may overflow, or slack is no bound.
  double error(double norm, double longest) const {
    const double reach = norm * longest;
    if (all_exact_ || !(reach < kOverflow) || bank_.dim > kMaxSummed) return kInfinity;
    return slack() * reach + kLostProduct * static_cast<double>(bank_.dim);
  }

  // What a thread needs to choose the rows of a query.
  struct Choice {
    std::vector<double> query;
    std::vector<int32_t> rows;
    std::vector<uint64_t> keys;
    explicit Choice(const Matrix& bank) : query(bank.dim), rows(bank.rows), keys(bank.rows) {}
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

  void choose(int64_t i, float* dots, double longest, Choice& choice) const {
    float* scores = scores_ + i * k_;
    int64_t* indices = indices_ + i * k_;
    const double norm = std::sqrt(kernel_.widen(query_.row(i), query_.dtype, query_.dim, choice.query.data()));
    if (norm == 0) {
      for (int j = 0; j < k_; ++j) scores[j] = 0, indices[j] = j;
      return;
    }
    const int64_t candidates =
        kernel_.top_rows(dots, bank_.rows, k_, error(norm, longest), norm, choice.rows.data());
    for (int64_t c = 0; c < candidates; ++c) {
      const int32_t row = choice.rows[c];
      const double dot = kernel_.exact_dot(choice.query.data(), bank_.row(row), bank_.dtype, bank_.dim);
      const float score = static_cast<float>(dot / norm) + 0.0f;
      choice.keys[c] = key(std::isnan(score) ? -kInfinity : score, row);
    }
    if (candidates <= kRankByCounting) {
      for (int64_t c = 0; c < candidates; ++c) {
        int rank = 0;
        for (int64_t other = 0; other < candidates; ++other) rank += choice.keys[other] > choice.keys[c];
        if (rank >= k_) continue;
        scores[rank] = score_of(choice.keys[c]);
        indices[rank] = choice.rows[c];
      }
      return;
    }
    const auto best = choice.keys.begin(), last = best + candidates;
    if (candidates > k_) std::nth_element(best, best + k_ - 1, last, std::greater<>());
    std::sort(best, best + k_, std::greater<>());
    for (int j = 0; j < k_; ++j) {
      scores[j] = score_of(best[j]);
      indices[j] = static_cast<int64_t>(~static_cast<uint32_t>(best[j]));
    }
  }

  const Kernels& kernel_ = kernels();
  Matrix query_, bank_;
  int k_;
  float* scores_;
  int64_t* indices_;
  int64_t panels_;
  bool copies_;
  int64_t query_stride_;
  bool all_exact_;
};

}  // namespace

bool is_small_bank(const Matrix& bank, int k) {
  return bank.rows <= std::max(kAlwaysSmall, kRowsPerK * k);
}

void search_small_bank(const Matrix& query, const Matrix& bank, int k, float* scores, int64_t* indices,
                       const Parallel& parallel) {
  SmallBank(query, bank, k, scores, indices).run(parallel);
}

}  // namespace saferclip::cpu
