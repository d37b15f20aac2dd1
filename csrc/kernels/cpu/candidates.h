// The pairs of one query that may still belong to its top k, in a slab lent by the caller.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace saferclip::cpu {

struct Candidate {
  float upper;
  float lower;  // == upper once the score is known exactly
  int32_t row;

  bool exact() const { return lower == upper; }
};

// Best first: higher score, then lower row.
inline bool better(const Candidate& a, const Candidate& b) {
  return a.upper != b.upper ? a.upper > b.upper : a.row < b.row;
}

class CandidateList {
 public:
  CandidateList(Candidate* slab, int k) : slab_(slab), k_(k), next_shrink_(k + kSpare / 2) {}

  // Room for the best k and for those whose bounds reach them: shrinking frees at least a quarter.
  static constexpr int kSpare = 64;
  static int64_t capacity(int k) { return 4 * int64_t{k} + kSpare; }

  // A lower bound of the k-th best score among all rows seen; -infinity until k were seen.
  float threshold() const { return threshold_; }
  void raise_threshold(float value) { threshold_ = std::max(threshold_, value); }
  int count() const { return count_; }
  Candidate* begin() { return slab_; }
  Candidate* end() { return slab_ + count_; }

  // score(row) returns the exact score.
  template <class Score>
  void add(float upper, float lower, int32_t row, Score&& score) {
    if (upper < threshold_) return;
    slab_[count_++] = {std::isnan(upper) ? kInfinity : upper, std::isnan(lower) ? -kInfinity : lower,
                       row};
    if (k_ == 1 && lower > threshold_) threshold_ = lower;
    if (count_ >= next_shrink_) shrink(score);
  }

  // Adds what another list found. The caller's slab must have room.
  void absorb(const CandidateList& other) {
    std::copy(other.slab_, other.slab_ + other.count_, slab_ + count_);
    count_ += other.count_;
    raise_threshold(other.threshold_);
  }

  // Leaves at most k candidates, all exact, best first.
  template <class Score>
  void finish(Score&& score) {
    raise_to_lower_bounds();
    drop_below_threshold();
    std::sort(begin(), end(), better);  // by upper bound: the likely winners are scored first
    int kept = 0;
    for (int i = 0; i < count_ && !(slab_[i].upper < threshold_); ++i) {
      Candidate c = slab_[i];
      if (!c.exact()) c.upper = c.lower = score(c.row);
      kept = insert(c, kept);
    }
    count_ = kept;
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  // Keeps slab_[0, kept) sorted best first, at most k long. Only reads entries before the one given.
  int insert(const Candidate& c, int kept) {
    if (kept == k_ && !better(c, slab_[k_ - 1])) return kept;
    const int end = kept == k_ ? k_ - 1 : kept;
    Candidate* at = std::upper_bound(slab_, slab_ + end, c, better);
    std::move_backward(at, slab_ + end, slab_ + end + 1);
    *at = c;
    if (end + 1 == k_) raise_threshold(slab_[k_ - 1].upper);
    return end + 1;
  }

  void drop_below_threshold() {
    count_ = static_cast<int>(
        std::remove_if(begin(), end(), [&](const Candidate& c) { return c.upper < threshold_; }) -
        begin());
  }

  void raise_to_lower_bounds() {
    if (count_ <= k_) return;
    std::nth_element(begin(), begin() + k_ - 1, end(),
                     [](const Candidate& a, const Candidate& b) { return a.lower > b.lower; });
    raise_threshold(slab_[k_ - 1].lower);
  }

  // Scores the k that look best, which the result is likely to need anyway: the k-th best exact
  // score is a much better threshold than the k-th best lower bound.
  template <class Score>
  void score_front_runners(Score&& score) {
    std::nth_element(begin(), begin() + k_ - 1, end(),
                     [](const Candidate& a, const Candidate& b) { return a.upper > b.upper; });
    float lowest = kInfinity;
    for (int i = 0; i < k_; ++i) {
      if (!slab_[i].exact()) slab_[i].upper = slab_[i].lower = score(slab_[i].row);
      lowest = std::min(lowest, slab_[i].lower);
    }
    raise_threshold(lowest);
    drop_below_threshold();
  }

  template <class Score>
  void shrink(Score&& score) {
    raise_to_lower_bounds();
    drop_below_threshold();
    const int capacity = static_cast<int>(CandidateList::capacity(k_));
    if (count_ > capacity / 2) score_front_runners(score);
    if (count_ > capacity - capacity / 4) finish(score);
    next_shrink_ = std::min(capacity, count_ + std::max(k_ / 2, 16));
  }

  Candidate* slab_;
  int k_;
  int count_ = 0;
  int next_shrink_;
  float threshold_ = -kInfinity;
};

}  // namespace saferclip::cpu
