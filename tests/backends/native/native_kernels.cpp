// Every CPU kernel, torch-free, on adversarial inputs: built with AddressSanitizer and
// UndefinedBehaviorSanitizer by `make sanitize`. Results are compared with plain double loops.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "kernels/cpu/info_nce.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/nearest_safe.h"
#include "kernels/cpu/neighbor_hinge.h"
#include "kernels/cpu/packed_bank.h"
#include "kernels/cpu/preservation_loss.h"
#include "kernels/cpu/retarget_loss.h"

using namespace saferclip;
using namespace saferclip::cpu;

namespace {

int failures = 0;
void expect(bool ok, const char* what, const char* isa, int64_t a, int64_t b) {
  if (ok) return;
  ++failures;
  std::printf("FAILED %s on %s (%lld, %lld)\n", what, isa, static_cast<long long>(a),
              static_cast<long long>(b));
}

Parallel threads(int count) {
  return {count, [count](int64_t tasks, const std::function<void(int64_t)>& task) {
            std::atomic<int64_t> next{0};
            const auto work = [&] {
              for (int64_t i = next++; i < tasks; i = next++) task(i);
            };
            std::vector<std::thread> pool;
            for (int t = 1; t < count; ++t) pool.emplace_back(work);
            work();
            for (auto& thread : pool) thread.join();
          }};
}

// Heap blocks of exactly the right size, so that one element too far is seen.
std::vector<float> values(int64_t count, int kind, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (int64_t i = 0; i < count; ++i) {
    const float n = normal(random);
    switch (kind) {
      case 0: x[i] = n; break;
      case 1: x[i] = n * 1e-39f; break;
      case 2: x[i] = n * 1e30f; break;
      case 3: x[i] = i % 17 == 0 ? 1000 * n : n * 1e-3f; break;
      case 4: x[i] = std::round(n); break;
      case 5: x[i] = 1.0f; break;
      case 6: x[i] = 0.0f; break;
      default: x[i] = i % 29 == 0   ? std::numeric_limits<float>::quiet_NaN()
                      : i % 31 == 0 ? std::numeric_limits<float>::infinity()
                                    : n;
    }
  }
  return x;
}

std::vector<uint16_t> halves(const std::vector<float>& x) {  // the upper half of a float is a bfloat16
  std::vector<uint16_t> h(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &x[i], 4);
    h[i] = static_cast<uint16_t>(bits >> 16);
  }
  return h;
}

struct Shape {
  int64_t queries, rows, dim;
  int k;
};

void check_order(const std::vector<float>& q, const std::vector<float>& b, const Shape& s,
                 const std::vector<float>& scores, const std::vector<int64_t>& indices, const char* isa) {
  for (int64_t i = 0; i < s.queries; ++i) {
    double square = 0;
    for (int64_t j = 0; j < s.dim; ++j) square += double{q[i * s.dim + j]} * q[i * s.dim + j];
    std::vector<std::pair<float, int64_t>> all;
    for (int64_t r = 0; r < s.rows; ++r) {
      double sum = 0;
      for (int64_t j = 0; j < s.dim; ++j) sum += double{q[i * s.dim + j]} * b[r * s.dim + j];
      all.push_back({square > 0 ? -static_cast<float>(sum / std::sqrt(square)) : 0.0f, r});
    }
    std::sort(all.begin(), all.end());
    for (int j = 0; j < s.k; ++j) {
      const float want = -all[j].first, got = scores[i * s.k + j];
      expect(std::abs(want - got) <= 3e-7f * std::abs(want) + 1e-12f, "score", isa, i, j);
      expect(indices[i * s.k + j] >= 0 && indices[i * s.k + j] < s.rows, "index", isa, i, j);
    }
  }
}

void search(const char* isa) {
  const Shape shapes[] = {
      {1, 1, 1, 1},
      {3, 40, 5, 40},
      {17, 333, 70, 9},
      {40, 900, 33, 256},
      {13, 97, 129, 1},
      {61, 500, 64, 5},
      {2, 2000, 16, 3},
      {90, 64, 70, 5},
      {5, 250, 129, 1},
      {30, 1000, 64, 100},
  };
  for (const Shape& s : shapes) {
    for (int kind = 0; kind < 8; ++kind) {
      const std::vector<float> q = values(s.queries * s.dim, kind % 2 ? 0 : kind, 1);
      const std::vector<float> b = values(s.rows * s.dim, kind, 2);
      const Matrix query{q.data(), DType::kFloat32, s.queries, s.dim};
      const Matrix bank{b.data(), DType::kFloat32, s.rows, s.dim};
      std::vector<uint8_t> blob(packed_size(s.rows, s.dim) + 1);  // at an odd address
      pack_bank(bank, blob.data() + 1, threads(3));
      expect(packed_matches(blob.data() + 1, static_cast<int64_t>(blob.size()) - 1, s.rows, s.dim),
             "packed_matches", isa, s.rows, s.dim);
      for (const uint8_t* packed : {static_cast<const uint8_t*>(nullptr), static_cast<const uint8_t*>(blob.data() + 1)}) {
        std::vector<float> scores(s.queries * s.k), again(scores);
        std::vector<int64_t> indices(scores.size()), more(indices);
        nearest_safe(query, bank, packed, s.k, scores.data(), indices.data(), threads(1));
        for (const int count : {2, 7}) {
          nearest_safe(query, bank, packed, s.k, again.data(), more.data(), threads(count));
          expect(indices == more && std::memcmp(scores.data(), again.data(), scores.size() * 4) == 0,
                 "threads", isa, s.rows, kind);
        }
        if (kind < 7) check_order(q, b, s, scores, indices, isa);
      }
      const std::vector<uint16_t> hq = halves(q), hb = halves(b);
      for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
        std::vector<float> scores(s.queries * s.k);
        std::vector<int64_t> indices(scores.size());
        nearest_safe({hq.data(), dtype, s.queries, s.dim}, {hb.data(), dtype, s.rows, s.dim}, nullptr,
                     s.k, scores.data(), indices.data(), threads(2));
        for (const int64_t i : indices) expect(i >= 0 && i < s.rows, "half index", isa, i, kind);
      }
    }
  }
}

// The last third of the rows against all of them, with and without a mask, logits kept and not.
void part_of_a_batch(const char* isa, const Matrix& all_x, const Matrix& y, int kind, void* grad) {
  const int64_t count = (all_x.rows + 2) / 3, first = all_x.rows - count;
  const Matrix x{all_x.row(first), all_x.dtype, count, all_x.dim};
  std::vector<uint8_t> mask(y.rows);
  for (std::size_t i = 0; i < mask.size(); ++i) mask[i] = i % 3 == 1;
  for (const uint8_t* chosen : {static_cast<const uint8_t*>(nullptr), static_cast<const uint8_t*>(mask.data())}) {
    for (const bool keep : {false, true}) {
      std::vector<float> rows(3 * count), columns(2 * y.rows), logits(keep ? count * y.rows : 0);
      const Parallel parallel = threads(3);
      InfoNce nce({x, y, first, chosen, 100.0f}, parallel);
      const LogSums sums{rows.data(), columns.data(), keep ? logits.data() : nullptr};
      nce.log_sums(sums);
      for (int64_t j = y.rows; j < 2 * y.rows; ++j) columns[j] = std::log(columns[j]);
      expect(kind == 7 || std::isfinite(nce.loss(sums)), "info_nce", isa, x.rows, x.dim);
      nce.gradient({.sums = sums, .nce_weight = 1, .own = nullptr, .pull = 0, .grad = grad});
    }
  }
}

template <class T>
void losses(const char* isa, DType dtype, int64_t batch, int64_t dim, int64_t k, int kind,
            std::vector<T> (*convert)(const std::vector<float>&)) {
  const int64_t rows = 11;
  std::vector<std::vector<T>> x;
  for (uint32_t i = 0; i < 4; ++i) x.push_back(convert(values(batch * dim, kind, i)));
  const std::vector<float> bank_text = values(rows * dim, 0, 7), bank_image = values(rows * dim, 0, 8);
  std::vector<int64_t> neighbors(batch * k);
  for (std::size_t i = 0; i < neighbors.size(); ++i) neighbors[i] = static_cast<int64_t>(i * 7 % rows);
  const std::vector<float> mix(batch * k, 1.0f / static_cast<float>(k)), weights(batch * 4, 0.1f);
  for (const bool current : {false, true}) {
    std::vector<T> grad_text(batch * dim), grad_image(batch * dim);
    RetargetArgs args{
        x[0].data(),
        x[1].data(),
        x[2].data(),
        x[3].data(),
        dtype,
        {bank_text.data(), DType::kFloat32, rows, dim},
        {bank_image.data(), DType::kFloat32, rows, dim},
        neighbors.data(),
        mix.data(),
        weights.data(),
        batch,
        dim,
        k,
        {1, 1, 1, 1},
        2.0f,
        0.1f,
        current,
        grad_text.data(),
        grad_image.data(),
        false,
    };
    double terms[4];
    retarget_loss(args, terms, threads(3));
    for (int j = 0; j < 4; ++j) expect(kind == 7 || std::isfinite(terms[j]), "retarget", isa, batch, dim);
  }
  std::vector<T> grad_text(batch * dim), grad_image(batch * dim);
  double terms[4];
  const auto input = [&](int i) { return Matrix{x[i].data(), dtype, batch, dim}; };
  for (const int64_t kept : {int64_t{0}, int64_t{1} << 30}) {
    preservation_loss({.text = input(0),
                       .image = input(1),
                       .frozen_text = input(2),
                       .frozen_image = input(3),
                       .weights = {1, 1, 1, 1},
                       .logit_scale = 100.0f,
                       .kept_bytes = kept,
                       .grad_text = grad_text.data(),
                       .grad_image = grad_image.data()},
                      terms, threads(3));
    for (int j = 0; j < 4; ++j) expect(kind == 7 || std::isfinite(terms[j]), "preservation", isa, batch, dim);
  }
  part_of_a_batch(isa, input(0), input(1), kind, grad_text.data());
  const std::vector<float> guard = values(rows * (dim + 2), 0, 9), scores = values(batch * k, 4, 10);
  std::vector<float> hinges(batch);
  const double hinge = neighbor_hinge({.x = input(0),
                                       .rows = {guard.data(), DType::kFloat32, rows, dim + 2},
                                       .indices = neighbors.data(),
                                       .scores = scores.data(),
                                       .row_weights = mix.data(),
                                       .found = k,
                                       .margin = 0.1,
                                       .k = k,
                                       .values = hinges.data(),
                                       .grad = grad_text.data()},
                                      threads(3));
  expect(kind == 7 || std::isfinite(hinge), "neighbor_hinge", isa, batch, dim);
}

}  // namespace

int main() {
  for (const Kernels* table : usable_kernels()) {
    setenv("SAFERCLIP_FAST_ISA", table->name, 1);
    search(table->name);
    for (int kind = 0; kind < 8; ++kind) {
      for (const auto& [batch, dim, k] : {std::array<int64_t, 3>{1, 1, 1}, {7, 5, 2}, {40, 33, 1}, {300, 70, 3}}) {
        losses<float>(table->name, DType::kFloat32, batch, dim, k, kind,
                      [](const std::vector<float>& x) { return x; });
        for (const DType half : {DType::kBFloat16, DType::kFloat16}) {
          losses<uint16_t>(table->name, half, batch, dim, k, kind == 2 && half == DType::kFloat16 ? 0 : kind, halves);
        }
      }
    }
    std::printf("%s done\n", table->name);
  }
  return failures == 0 ? 0 : 1;
}
