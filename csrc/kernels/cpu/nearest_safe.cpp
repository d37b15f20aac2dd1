#include "nearest_safe.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "buffer.h"
#include "candidates.h"
#include "kernels.h"
#include "packed_bank.h"
#include "rounding.h"
#include "small_bank.h"

namespace saferclip::cpu {
namespace {

constexpr int64_t kChunkPanels = 16;         // rows quantized together: 400 KB at d = 768, fits L2
constexpr int64_t kSweepGroups = 80;         // queries that sweep a chunk together: 750 KB, fits L2
constexpr int64_t kTaskGroups = 44;          // queries of a task when tasks split the queries: 400 KB
constexpr int64_t kScratchBytes = 24 << 20;  // what a block of queries may take
constexpr int64_t kPackAtOnce = 8 << 20;     // a bank whose copy is this small is packed before the search
constexpr int64_t kFewQueries = 16;          // fewer do not pay for quantizing the bank
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum class Screen {
  kInt8,
  kFp32,
};

// How a search is carried out.
struct Plan {
  Screen screen;
  bool pack;              // the whole bank is packed first, for this search alone
  bool by_queries;        // tasks take queries and the whole bank; otherwise chunks of the bank and all queries
  int64_t block_queries;  // queries prepared together
};

Plan make_plan(const Matrix& query, const Matrix& bank, bool packed, int k, int threads) {
  Plan plan;
  const bool too_wide = bank.dim > kMaxPackedDim;
  plan.screen = too_wide || (!packed && query.rows < kFewQueries) ? Screen::kFp32 : Screen::kInt8;
  const bool int8 = plan.screen == Screen::kInt8;
  plan.pack = int8 && !packed && packed_size(bank.rows, bank.dim) <= kPackAtOnce;
  plan.by_queries = int8 && (packed || plan.pack) && query.rows >= 2 * kGroupSize * threads;
  const int64_t list_bytes = CandidateList::capacity(k) * int64_t{sizeof(Candidate)};
  const int64_t query_bytes = bank.dim * (int8 ? 1 : 4) + (plan.by_queries ? 1 : threads) * list_bytes;
  plan.block_queries = std::max<int64_t>(kScratchBytes / query_bytes / kGroupSize, 1) * kGroupSize;
  return plan;
}

// A block of queries, prepared for screening.
struct QueryBlock {
  Matrix queries;
  std::vector<double> norms;
  std::vector<int8_t> q8;
  std::vector<GroupTerms> terms;
  Buffer<float> unit;
  std::once_flag unit_once;

  int64_t groups() const { return (queries.rows + kGroupSize - 1) / kGroupSize; }
};

struct Problem {
  const Kernels& kernel;
  Matrix bank;
  const uint8_t* panels = nullptr;  // packed panels, or null: quantize on the way
  const float* mean = nullptr;
  double mean_square = 0;
  int k = 1;
  Screen screen = Screen::kInt8;
};

// Exact scores. Keeps the query in use in double, so those of one query are best asked for together.
class Scorer {
 public:
  Scorer(const Problem& problem, const QueryBlock& block)
      : problem_(problem), block_(block), wide_(problem.bank.dim) {}

  // The scores of one query, as a function of the row.
  auto of_query(int64_t query) {
    return [this, query](int32_t row) { return score(query, row); };
  }

 private:
  float score(int64_t query, int32_t row) {
    const Matrix& bank = problem_.bank;
    const double norm = block_.norms[query];
    if (norm == 0) return 0;
    if (widened_ != query) {
      problem_.kernel.widen(block_.queries.row(query), block_.queries.dtype, bank.dim, wide_.data());
      widened_ = query;
    }
    const double dot = problem_.kernel.exact_dot(wide_.data(), bank.row(row), bank.dtype, bank.dim);
    const float score = static_cast<float>(dot / norm) + 0.0f;  // -0 would print as it is
    return std::isnan(score) ? -kInfinity : score;
  }

  const Problem& problem_;
  const QueryBlock& block_;
  std::vector<double> wide_;  // query number widened_
  int64_t widened_ = -1;
};

void make_unit(const Problem& problem, QueryBlock& block) {
  std::call_once(block.unit_once, [&] {
    const int64_t dim = block.queries.dim;
    block.unit = make_buffer<float>(block.queries.rows * dim);
    std::vector<double> row(dim);
    for (int64_t i = 0; i < block.queries.rows; ++i) {
      problem.kernel.widen(block.queries.row(i), block.queries.dtype, dim, row.data());
      const double scale = block.norms[i] == 0 ? 0 : 1 / block.norms[i];
      for (int64_t j = 0; j < dim; ++j) {
        block.unit[i * dim + j] = static_cast<float>(row[j] * scale);
      }
    }
  });
}

void prepare(const Problem& problem, QueryBlock& block, const Parallel& parallel) {
  const int64_t dim = block.queries.dim, quads = (dim + 3) / 4;
  block.norms.resize(block.queries.rows);
  if (problem.screen == Screen::kInt8) {
    block.q8.assign(block.groups() * quads * kGroupSize * 4, 0);
    block.terms.assign(block.groups(), GroupTerms{});
  }
  constexpr int64_t kGroupsPerTask = 4;
  parallel((block.groups() + kGroupsPerTask - 1) / kGroupsPerTask, [&](int64_t task) {
    std::vector<double> row(dim), scratch(dim + 16);
    const int64_t end = std::min(block.queries.rows, (task + 1) * kGroupsPerTask * kGroupSize);
    for (int64_t i = task * kGroupsPerTask * kGroupSize; i < end; ++i) {
      block.norms[i] = std::sqrt(problem.kernel.widen(block.queries.row(i), block.queries.dtype, dim, row.data()));
      if (problem.screen != Screen::kInt8) continue;
      const int64_t group = i / kGroupSize;
      problem.kernel.quantize_query(row.data(), block.norms[i], problem.mean, problem.mean_square,
                                    dim, sum_slack(dim), scratch.data(),
                                    static_cast<int>(i % kGroupSize),
                                    block.q8.data() + group * quads * kGroupSize * 4,
                                    &block.terms[group]);
    }
  });
  if (problem.screen == Screen::kFp32) make_unit(problem, block);
}

// Scores rows against a range of query groups and keeps what may belong to the result.
class Worker {
 public:
  Worker(const Problem& problem, QueryBlock& block, int64_t first_group, int64_t groups)
      : problem_(problem),
        block_(block),
        screen_(problem.screen),
        first_(first_group * kGroupSize),
        first_group_(first_group),
        queries_(std::min(block.queries.rows - first_, groups * kGroupSize)),
        slab_(make_buffer<Candidate>(queries_ * CandidateList::capacity(problem.k))),
        thresholds_(groups * kGroupSize, kInfinity),
        scorer_(problem, block) {
    lists_.reserve(queries_);
    for (int64_t q = 0; q < queries_; ++q) {
      lists_.emplace_back(slab_.get() + q * CandidateList::capacity(problem.k), problem.k);
      update_threshold(q);
    }
  }

  CandidateList& list(int64_t query) { return lists_[query]; }

  void finish(int64_t query) {
    lists_[query].finish(scorer_.of_query(first_ + query));
  }

  // Takes over what other workers know; shared[q] is a threshold of query q.
  void exchange(std::vector<std::atomic<float>>& shared) {
    for (int64_t q = 0; q < queries_; ++q) {
      const float theirs = shared[first_ + q].load(std::memory_order_relaxed);
      const float ours = lists_[q].threshold();
      if (theirs > ours) {
        lists_[q].raise_threshold(theirs);
        update_threshold(q);
      } else if (ours > theirs) {  // a lost race only loses a little screening
        shared[first_ + q].store(ours, std::memory_order_relaxed);
      }
    }
  }

  // Panels [first, last) of the bank.
  void scan(int64_t first, int64_t last) {
    const int64_t hits_before = hits_;
    const Screen screen = screen_;
    const uint8_t* panels = screen == Screen::kInt8 ? quantized(first, last) : nullptr;
    for (int64_t group = 0; group * kGroupSize < queries_; group += kSweepGroups) {
      for (int64_t p = first; p < last; ++p) {
        scan_panel(p, group, panels ? panels + (p - first) * panel_bytes(problem_.bank.dim) : nullptr,
                   p + 1 < last);
      }
    }
    ++scans_;
    const int64_t pairs = (last - first) * kPanelRows * queries_;
    if (screen == Screen::kInt8 && scans_ > 2 && (hits_ - hits_before) * 4 > pairs) give_up_int8();
  }

 private:
  void give_up_int8() {
    make_unit(problem_, block_);
    screen_ = Screen::kFp32;
    for (int64_t q = 0; q < queries_; ++q) update_threshold(q);
  }

  int panel_rows(int64_t panel) const {
    return static_cast<int>(
        std::min<int64_t>(kPanelRows, problem_.bank.rows - panel * kPanelRows));
  }

  // The int8 panels [first, last), quantized here unless the bank is packed.
  const uint8_t* quantized(int64_t first, int64_t last) {
    const int64_t bytes = panel_bytes(problem_.bank.dim);
    if (problem_.panels != nullptr) return problem_.panels + first * bytes;
    if (!panel_buffer_) {
      panel_buffer_ = make_buffer<uint8_t>(kChunkPanels * bytes);
      scratch_.resize(problem_.bank.dim + 16);
    }
    for (int64_t p = first; p < last; ++p) {
      problem_.kernel.quantize(problem_.bank.row(p * kPanelRows), problem_.bank.dtype, panel_rows(p),
                               problem_.bank.dim, problem_.mean, sum_slack(problem_.bank.dim),
                               scratch_.data(), panel_buffer_.get() + (p - first) * bytes);
    }
    return panel_buffer_.get();
  }

  // What the sink needs to know of the panel and the queries that are screened.
  struct Scan {
    Worker& worker;
    int64_t first_query;
    int32_t first_row;
  };

  void scan_panel(int64_t panel, int64_t group, const uint8_t* quantized_panel, bool more) {
    const int64_t dim = problem_.bank.dim;
    const int64_t block_group = first_group_ + group;
    ScreenArgs args = {};
    args.dim = dim;
    args.thresholds = thresholds_.data() + group * kGroupSize;
    args.queries_count = std::min(queries_ - group * kGroupSize, kSweepGroups * kGroupSize);
    args.slack = sum_slack(dim);
    Scan scan{*this, group * kGroupSize, static_cast<int32_t>(panel * kPanelRows)};
    args.sink = [](void* context, int64_t hit_group, const Hit* hits, int count) {
      const Scan& scan = *static_cast<const Scan*>(context);
      scan.worker.take(scan.first_query + hit_group * kGroupSize, scan.first_row, hits, count);
    };
    args.context = &scan;
    if (quantized_panel != nullptr) {
      args.terms = block_.terms.data() + block_group;
      args.next_panel = more ? quantized_panel + panel_bytes(dim) : nullptr;
      args.queries = block_.q8.data() + block_group * ((dim + 3) / 4) * kGroupSize * 4;
      problem_.kernel.screen_int8(quantized_panel, panel_rows(panel), args);
    } else {
      args.queries = block_.unit.get() + block_group * kGroupSize * dim;
      problem_.kernel.screen_fp32(problem_.bank.row(panel * kPanelRows), problem_.bank.dtype,
                                  panel_rows(panel), args);
    }
  }

  // Adds the hits of a group of queries with a panel, sorted by query.
  void take(int64_t first_query, int32_t first_row, const Hit* hits, int count) {
    hits_ += count;
    for (int i = 0; i < count; ++i) {
      const int64_t q = first_query + hits[i].query;
      lists_[q].add(hits[i].upper, hits[i].lower, first_row + hits[i].row, scorer_.of_query(first_ + q));
      if (i + 1 == count || hits[i + 1].query != hits[i].query) update_threshold(q);
    }
  }

  // Translates the threshold of a query into the units its screen compares in, rounded down.
  void update_threshold(int64_t q) {
    const float score = lists_[q].threshold();
    if (block_.norms[first_ + q] == 0) return;  // stays at infinity: a zero query is not searched
    if (screen_ != Screen::kInt8 || score == -kInfinity) {
      thresholds_[q] = score;
      return;
    }
    const int64_t block_query = first_ + q;
    const GroupTerms& terms = block_.terms[block_query / kGroupSize];
    const int slot = static_cast<int>(block_query % kGroupSize);
    // Scores are compared after rounding to fp32: a score half a unit lower still ties.
    const double reach = score - std::abs(score) * kSpacing - kHalfDenormal;
    const double scaled = (reach - terms.base[slot]) / terms.scale[slot];
    thresholds_[q] = static_cast<float>(scaled - std::abs(scaled) * kSpacing);
  }

  const Problem& problem_;
  QueryBlock& block_;
  Screen screen_;
  int64_t first_, first_group_, queries_;
  Buffer<Candidate> slab_;
  std::vector<CandidateList> lists_;
  std::vector<float> thresholds_;
  Buffer<uint8_t> panel_buffer_;
  std::vector<float> scratch_;
  Scorer scorer_;
  int64_t hits_ = 0, scans_ = 0;
};

// Where the results of a block of queries go.
struct Output {
  float* scores;
  int64_t* indices;
  int k;

  void write(int64_t query, CandidateList& list) const {
    for (int j = 0; j < k; ++j) {
      const Candidate& c = list.begin()[j];
      scores[query * k + j] = c.upper;
      indices[query * k + j] = c.row;
    }
  }
  void write_zero_query(int64_t query) const {
    for (int j = 0; j < k; ++j) {
      scores[query * k + j] = 0;
      indices[query * k + j] = j;
    }
  }
};

void write_query(const QueryBlock& block, const Output& output, int64_t query, int64_t slot,
                 Worker& worker) {
  if (block.norms[query] == 0) {
    output.write_zero_query(query);
    return;
  }
  worker.finish(slot);
  output.write(query, worker.list(slot));
}

// Tasks take queries; each scans the whole bank.
void search_by_queries(const Problem& problem, QueryBlock& block, const Output& output, const Parallel& parallel) {
  const int64_t panels = (problem.bank.rows + kPanelRows - 1) / kPanelRows;
  const int64_t rounds = ceil_div(block.groups(), parallel.threads * kTaskGroups);
  const int64_t task_groups = ceil_div(block.groups(), rounds * parallel.threads);
  parallel(ceil_div(block.groups(), task_groups), [&](int64_t task) {
    const int64_t first = task * task_groups;
    const int64_t groups = std::min(task_groups, block.groups() - first);
    Worker worker(problem, block, first, groups);
    for (int64_t p = 0; p < panels; p += kChunkPanels) {
      worker.scan(p, std::min(panels, p + kChunkPanels));
    }
    const int64_t end = std::min(block.queries.rows, (first + groups) * kGroupSize);
    for (int64_t q = first * kGroupSize; q < end; ++q) {
      write_query(block, output, q, q - first * kGroupSize, worker);
    }
  });
}

// Tasks take chunks of the bank, for all queries; what they kept is merged.
void search_by_rows(const Problem& problem, QueryBlock& block, const Output& output,
                    const Parallel& parallel) {
  const int64_t panels = (problem.bank.rows + kPanelRows - 1) / kPanelRows;
  const int64_t chunk =
      std::clamp<int64_t>(panels / (4 * parallel.threads), 1, kChunkPanels);
  std::vector<std::atomic<float>> shared(block.queries.rows);
  for (auto& threshold : shared) threshold.store(-kInfinity, std::memory_order_relaxed);
  std::vector<std::unique_ptr<Worker>> workers(parallel.threads);
  std::atomic<int64_t> next{0};
  parallel(parallel.threads, [&](int64_t w) {
    workers[w] = std::make_unique<Worker>(problem, block, 0, block.groups());
    for (int64_t p = next.fetch_add(chunk); p < panels; p = next.fetch_add(chunk)) {
      workers[w]->scan(p, std::min(panels, p + chunk));
      workers[w]->exchange(shared);
    }
  });
  if (parallel.threads == 1) {
    for (int64_t q = 0; q < block.queries.rows; ++q) write_query(block, output, q, q, *workers[0]);
    return;
  }
  constexpr int64_t kQueriesPerTask = 16;
  parallel((block.queries.rows + kQueriesPerTask - 1) / kQueriesPerTask, [&](int64_t task) {
    std::vector<Candidate> slab(parallel.threads * CandidateList::capacity(problem.k));
    Scorer scorer(problem, block);
    const int64_t end = std::min(block.queries.rows, (task + 1) * kQueriesPerTask);
    for (int64_t q = task * kQueriesPerTask; q < end; ++q) {
      if (block.norms[q] == 0) {
        output.write_zero_query(q);
        continue;
      }
      CandidateList merged(slab.data(), problem.k);
      for (auto& worker : workers) merged.absorb(worker->list(q));
      merged.finish(scorer.of_query(q));
      output.write(q, merged);
    }
  });
}

}  // namespace

void nearest_safe(const Matrix& query, const Matrix& bank, const uint8_t* packed, int k, float* scores,
                  int64_t* indices, const Parallel& parallel) {
  if (is_small_bank(bank, k)) {
    search_small_bank(query, bank, k, scores, indices, parallel);
    return;
  }
  const Plan plan = make_plan(query, bank, packed != nullptr, k, parallel.threads);
  Problem problem{.kernel = kernels(), .bank = bank, .k = k, .screen = plan.screen};

  std::vector<uint8_t> own_pack;
  std::vector<float> mean;
  if (plan.pack) {
    own_pack.resize(packed_size(bank.rows, bank.dim));
    pack_bank(bank, own_pack.data(), parallel);
    packed = own_pack.data();
  }
  if (plan.screen == Screen::kInt8) {
    mean.resize(bank.dim + 16);
    if (packed != nullptr) {
      problem.panels = packed_panels(packed, bank.dim);
      std::memcpy(mean.data(), packed_mean(packed), bank.dim * 4);
    } else {
      sample_mean(bank, mean.data());
    }
    problem.mean = mean.data();
    for (const float x : mean) problem.mean_square += static_cast<double>(x) * x;
  }

  for (int64_t first = 0; first < query.rows; first += plan.block_queries) {
    QueryBlock block;
    block.queries = query;
    block.queries.data = query.row(first);
    block.queries.rows = std::min(plan.block_queries, query.rows - first);
    prepare(problem, block, parallel);
    const Output output{scores + first * k, indices + first * k, k};
    if (plan.by_queries) {
      search_by_queries(problem, block, output, parallel);
    } else {
      search_by_rows(problem, block, output, parallel);
    }
  }
}

}  // namespace saferclip::cpu
