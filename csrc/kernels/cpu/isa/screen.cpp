// The inner loops of nearest_safe. Compiled once per instruction set.
#include "isa.h"
#include "kernels/cpu/rounding.h"
#include "simd.h"

namespace {

using saferclip::DType;
using saferclip::cpu::GroupTerms;
using saferclip::cpu::Hit;
using saferclip::cpu::kGroupSize;
using saferclip::cpu::kPanelRows;
using saferclip::cpu::PanelTerms;
using saferclip::cpu::ScreenArgs;

using saferclip::cpu::kDenormal;
using saferclip::cpu::kHalfDenormal;
using saferclip::cpu::kInflate;
using saferclip::cpu::kLostLength;
using saferclip::cpu::kOverflow;
using saferclip::cpu::kSpacing;

constexpr int kPanelVectors = kPanelRows / kWidth;
// fp32 roundings, of 2^-24 each, of the unit query, of the upper bound and of the score.
constexpr float kUnitQuerySlack = 2e-7f;

// ---- int8 dot products of a panel with a group -------------------------------------------------

#if defined(__AVX512VNNI__)
constexpr int kQueryTile = 12;
constexpr int kRowVectors = 2;
inline Ints multiply_add(Ints sums, Ints rows, int32_t query) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)rows, _mm512_set1_epi32(query));
}
#elif defined(__AVX512BW__)
constexpr int kQueryTile = 12;
constexpr int kRowVectors = 2;
inline Ints multiply_add(Ints sums, Ints rows, int32_t query) {
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)rows, _mm512_set1_epi32(query));
  return sums + (Ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
#elif defined(__AVX2__)
constexpr int kQueryTile = 4;
constexpr int kRowVectors = 2;
inline Ints multiply_add(Ints sums, Ints rows, int32_t query) {
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)rows, _mm256_set1_epi32(query));
  return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#else
constexpr int kQueryTile = 2;
constexpr int kRowVectors = 2;
inline Ints multiply_add(Ints sums, Ints rows, int32_t query) {
  uint8_t r[kWidth * 4];
  int8_t q[4];
  std::memcpy(r, &rows, sizeof(r));
  std::memcpy(q, &query, sizeof(q));
  for (int i = 0; i < kWidth; ++i) {
    sums[i] += r[4 * i] * q[0] + r[4 * i + 1] * q[1] + r[4 * i + 2] * q[2] + r[4 * i + 3] * q[3];
  }
  return sums;
}
#endif

template <int Queries>
inline void int8_tile(const uint8_t* rows, const int8_t* queries, const int32_t* bias, int64_t quads,
                      int32_t* dots) {
  Ints sums[Queries][kRowVectors];
  for (int m = 0; m < Queries; ++m) {
    for (int v = 0; v < kRowVectors; ++v) sums[m][v] = Ints{} + bias[m];
  }
  for (int64_t g = 0; g < quads; ++g) {
    Ints row[kRowVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kRowVectors; ++v) row[v] = load_bits<Ints>(rows + v * sizeof(Ints));
#pragma GCC unroll 12
    for (int m = 0; m < Queries; ++m) {
      int32_t query;
      std::memcpy(&query, queries + 4 * m, 4);
#pragma GCC unroll 2
      for (int v = 0; v < kRowVectors; ++v) sums[m][v] = multiply_add(sums[m][v], row[v], query);
    }
    rows += kPanelRows * 4;
    queries += kGroupSize * 4;
  }
  for (int m = 0; m < Queries; ++m) {
    for (int v = 0; v < kRowVectors; ++v) store_bits(dots + m * kPanelRows + v * kWidth, sums[m][v]);
  }
}

template <int Queries>
inline void int8_rows(const uint8_t* rows, const int8_t* queries, const int32_t* bias, int64_t quads,
                      int32_t* dots) {
  for (int r = 0; r < kPanelRows; r += kRowVectors * kWidth) {
    int8_tile<Queries>(rows + 4 * r, queries, bias, quads, dots + r);
  }
}

inline void int8_dots(const uint8_t* rows, const int8_t* queries, const int32_t* bias, int64_t quads,
                      int count, int32_t* dots) {
  int m = 0;
  const auto step = [&]<int Queries>() {
    for (; count - m >= Queries; m += Queries) {
      int8_rows<Queries>(rows, queries + 4 * m, bias + m, quads, dots + m * kPanelRows);
    }
  };
  step.template operator()<kQueryTile>();
  step.template operator()<(kQueryTile < 4 ? kQueryTile : 4)>();
  step.template operator()<1>();
}

// ---- from dot products to hits -----------------------------------------------------------------

// Sends every pair whose upper bound reaches its query's threshold, or is none because something overflowed.
template <class Upper, class Bounds>
inline void send_hits(int64_t group, int queries, int rows, const ScreenArgs& args, Upper&& upper,
                      Bounds&& bounds) {
  const float* thresholds = args.thresholds + group * kGroupSize;
  Hit hits[kGroupSize * kPanelRows];
  int count = 0;
  for (int m = 0; m < queries; ++m) {
    const Floats threshold = splat(thresholds[m]);
    uint32_t mask = 0;
    for (int v = 0; v < kPanelVectors; ++v) {
      const Floats bound = upper(m, v);
      const Floats or_nan = bound + (bound - bound);  // -infinity would be less than any threshold
      mask |= mask_not_less(or_nan, threshold) << (v * kWidth);
    }
    if (rows < kPanelRows) mask &= (1u << rows) - 1;
    for (; mask != 0; mask &= mask - 1) {
      const int r = __builtin_ctz(mask);
      hits[count] = {0, 0, m, r};
      bounds(m, r, &hits[count]);
      ++count;
    }
  }
  if (count > 0) args.sink(args.context, group, hits, count);
}

inline int group_queries(const ScreenArgs& args, int64_t group) {
  const int64_t left = args.queries_count - group * kGroupSize;
  return static_cast<int>(left < kGroupSize ? left : kGroupSize);
}

// Asks for the group's share of the panel that comes next.
inline void prefetch(const uint8_t* panel, int64_t group, int64_t groups, int64_t bytes) {
  if (panel == nullptr) return;
  const int64_t lines = (bytes + 63) / 64;
  const int64_t end = (group + 1) * lines / groups;
  for (int64_t line = group * lines / groups; line < end; ++line) {
    __builtin_prefetch(panel + line * 64, 0, 2);
  }
}

// ---- exact scores ------------------------------------------------------------------------------

// The order of additions is part of the result: 32 running sums, element i to sum i % 32.
// Products of two floats are exact in double, so a fused multiply-add changes nothing.
constexpr int kExactLanes = 32;
constexpr int kExactVectors = kExactLanes / kDoubleWidth;

inline double to_double(double x) { return x; }
template <class T>
inline double to_double(T x) {
  return static_cast<double>(to_float(x));
}

// products(i): of a vector of elements; product(i): of one, behind the last 32.
template <class Vector, class Scalar>
inline double exact_sum(int64_t dim, Vector&& products, Scalar&& product) {
  Doubles sums[kExactVectors] = {};
  int64_t i = 0;
  for (; i + kExactLanes <= dim; i += kExactLanes) {
#pragma GCC unroll 16
    for (int v = 0; v < kExactVectors; ++v) sums[v] += products(i + v * kDoubleWidth);
  }
  if (i < dim) {
    double lanes[kExactLanes];
    std::memcpy(lanes, sums, sizeof(lanes));
    for (int64_t j = 0; i + j < dim; ++j) lanes[j] += product(i + j);
    std::memcpy(sums, lanes, sizeof(lanes));
  }
  for (int step = kExactVectors / 2; step > 0; step /= 2) {
    for (int v = 0; v < step; ++v) sums[v] += sums[v + step];
  }
  double lanes[kDoubleWidth];
  store_bits(lanes, sums[0]);
  for (int step = kDoubleWidth / 2; step > 0; step /= 2) {
    for (int l = 0; l < step; ++l) lanes[l] += lanes[l + step];
  }
  return lanes[0];
}

template <class T>
double exact_row(const double* query, const T* row, int64_t dim) {
  return exact_sum(
      dim, [&](int64_t i) { return load_bits<Doubles>(query + i) * widen_lanes(row + i); },
      [&](int64_t i) { return query[i] * static_cast<double>(to_float(row[i])); });
}

// ---- selection ---------------------------------------------------------------------------------

// A value that at least k of the dots reach, and seldom more. NaN pads the last vector.
float kth_largest(const float* dots, int64_t count, int k) {
  Floats top = splat(-__builtin_inff()), bottom = top;
  for (int64_t i = 0; i < count; i += kWidth) {
    const Floats x = load(dots + i);
    top = maximum(x, top);
    bottom = maximum(-x, bottom);
  }
  float high = largest(top), low = -largest(bottom);
  if (k == 1) return high;
  const int64_t padding = -(-count & (kWidth - 1));  // NaN is not less
  constexpr int kHalvings = 24;  // enough for any fp32 spread that matters; ties never come down to k
  for (int step = 0; step < kHalvings; ++step) {
    const float middle = low + (high - low) * 0.5f;
    const Floats threshold = splat(middle);
    int64_t total = padding;
    for (int64_t i = 0; i < count; i += kWidth) total += __builtin_popcount(mask_not_less(load(dots + i), threshold));
    (total >= k ? low : high) = middle;
    if (total == k) break;
  }
  return low;
}

}  // namespace

namespace saferclip::cpu::SAFERCLIP_NAMESPACE {

void screen_int8(const uint8_t* panel, int rows, const ScreenArgs& args) {
  const int64_t quads = (args.dim + 3) / 4;
  PanelTerms row;
  std::memcpy(&row, panel, sizeof(row));
  const uint8_t* bytes = panel + sizeof(row);
  const int8_t* queries = static_cast<const int8_t*>(args.queries);
  alignas(64) int32_t dots[kGroupSize * kPanelRows];
  const int64_t groups = (args.queries_count + kGroupSize - 1) / kGroupSize;
  const int64_t panel_size = static_cast<int64_t>(sizeof(row)) + quads * kPanelRows * 4;
  for (int64_t group = 0; group < groups; ++group) {
    const GroupTerms& term = args.terms[group];
    const int count = group_queries(args, group);
    prefetch(args.next_panel, group, groups, panel_size);
    int8_dots(bytes, queries + group * quads * kGroupSize * 4, term.bias, quads, count, dots);
    const auto upper = [&](int m, int v) {
      const int at = v * kWidth;
      const Floats dot =
          __builtin_convertvector(load_bits<Ints>(dots + m * kPanelRows + at), Floats);
      return dot * load(row.step + at) + splat(term.shift[m]) * load(row.mean_dot + at) +
             splat(term.error[m]) * load(row.norm + at) + splat(term.norm[m]) * load(row.error + at);
    };
    const auto bounds = [&](int m, int r, Hit* hit) {
      const double middle = static_cast<double>(dots[m * kPanelRows + r]) * row.step[r] +
                            static_cast<double>(term.shift[m]) * row.mean_dot[r];
      const double error = static_cast<double>(term.error[m]) * row.norm[r] +
                           static_cast<double>(term.norm[m]) * row.error[r];
      // The score that is compared later is rounded to fp32: leave room for that as well.
      const double score = term.base[m] + term.scale[m] * middle;
      const double room = term.scale[m] * error * kInflate + kSpacing * __builtin_fabs(score) + kHalfDenormal;
      hit->upper = static_cast<float>(score + room);
      hit->lower = static_cast<float>(score - room);
    };
    send_hits(group, count, rows, args, upper, bounds);
  }
}

void screen_fp32(const void* data, DType dtype, int rows, const ScreenArgs& args) {
  alignas(64) float dots[kGroupSize * kPanelRows] = {};
  alignas(64) float norms[kPanelRows] = {};
  const int64_t dim = args.dim;
  const float floor = kLostLength * __builtin_sqrtf(static_cast<float>(dim));  // what squaring may lose
  for (int64_t group = 0; group * kGroupSize < args.queries_count; ++group) {
    const int count = group_queries(args, group);
    const float* queries = static_cast<const float*>(args.queries) + group * kGroupSize * dim;
    dot_rows(data, dtype, rows, dim, queries, dim, count, dots, kPanelRows, group == 0 ? norms : nullptr);
    for (int r = 0; group == 0 && r < kPanelRows; ++r) {
      norms[r] = (__builtin_sqrtf(norms[r]) * (1 + args.slack) + floor) * (args.slack + kUnitQuerySlack) + floor * floor;
    }
    const auto upper = [&](int m, int v) {
      return load(dots + m * kPanelRows + v * kWidth) + load(norms + v * kWidth);
    };
    const auto bounds = [&](int m, int r, Hit* hit) {
      hit->upper = dots[m * kPanelRows + r] + norms[r];
      hit->lower = dots[m * kPanelRows + r] - norms[r];
    };
    send_hits(group, count, rows, args, upper, bounds);
  }
}

int64_t top_rows(float* dots, int64_t count, int k, double error, double norm, int32_t* rows) {
  if (!(error < kOverflow)) {  // no bound
    for (int64_t i = 0; i < count; ++i) rows[i] = static_cast<int32_t>(i);
    return count;
  }
  for (int64_t i = count; i % kWidth != 0; ++i) dots[i] = __builtin_nanf("");
  const double least = static_cast<double>(kth_largest(dots, count, k));
  // Scores are compared after division by norm and rounding to fp32: leave room for that as well.
  const double reach = least - 2 * error - kSpacing * (__builtin_fabs(least) + error) - kDenormal * norm;
  const Floats threshold = splat(static_cast<float>(reach - kSpacing * __builtin_fabs(reach) - kHalfDenormal));
  int64_t written = 0;
  for (int64_t i = 0; i < count; i += kWidth) {
    uint32_t mask = mask_not_less(load(dots + i), threshold);
    if (count - i < kWidth) mask &= (1u << (count - i)) - 1;
    for (; mask != 0; mask &= mask - 1) rows[written++] = static_cast<int32_t>(i) + __builtin_ctz(mask);
  }
  return written;
}

double exact_dot(const double* query, const void* row, DType dtype, int64_t dim) {
  double result = 0;
  with_element(dtype, [&]<class T>(const T*) {
    result = exact_row(query, static_cast<const T*>(row), dim);
  });
  return result;
}

void accumulate(const void* row, DType dtype, int64_t dim, float* sum) {
  with_element(dtype, [&]<class T>(const T*) {
    const T* in = static_cast<const T*>(row);
    int64_t i = 0;
    for (; i + kWidth <= dim; i += kWidth) store(sum + i, load(sum + i) + load(in + i));
    for (; i < dim; ++i) sum[i] += to_float(in[i]);
  });
}

double widen(const void* row, DType dtype, int64_t dim, double* out) {
  double square = 0;
  with_element(dtype, [&]<class T>(const T*) {
    const T* in = static_cast<const T*>(row);
    const auto vector = [&](int64_t i) {
      const Doubles x = widen_lanes(in + i);
      store_bits(out + i, x);
      return x * x;
    };
    const auto scalar = [&](int64_t i) {
      out[i] = static_cast<double>(to_float(in[i]));
      return out[i] * out[i];
    };
    square = exact_sum(dim, vector, scalar);
  });
  return square;
}

}  // namespace saferclip::cpu::SAFERCLIP_NAMESPACE
