// The inner loops of nearest_safe. Compiled once per instruction set.
#include "isa.h"
#include "simd.h"

namespace {

using saferclip::cpu::DType;
using saferclip::cpu::GroupTerms;
using saferclip::cpu::Hit;
using saferclip::cpu::kGroupSize;
using saferclip::cpu::kPanelRows;
using saferclip::cpu::PanelTerms;
using saferclip::cpu::ScreenArgs;

constexpr int kPanelVectors = kPanelRows / kWidth;
constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer

// ---- int8 dot products of a panel with a group -------------------------------------------------

#if defined(__AVX512VNNI__)
constexpr int kLimit = 127;
constexpr int kQueryTile = 12;
constexpr int kRowVectors = 2;
inline Ints multiply_add(Ints sums, Ints rows, int32_t query) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)rows, _mm512_set1_epi32(query));
}
#elif defined(__AVX512BW__)
constexpr int kLimit = 64;  // 2 * 255 * 64 < 2^15: the pairwise 16-bit sums cannot saturate
constexpr int kQueryTile = 12;
constexpr int kRowVectors = 2;
inline Ints multiply_add(Ints sums, Ints rows, int32_t query) {
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)rows, _mm512_set1_epi32(query));
  return sums + (Ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
#elif defined(__AVX2__)
constexpr int kLimit = 64;
constexpr int kQueryTile = 4;
constexpr int kRowVectors = 2;
inline Ints multiply_add(Ints sums, Ints rows, int32_t query) {
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)rows, _mm256_set1_epi32(query));
  return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#else
constexpr int kLimit = 127;
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

// Sends every pair whose upper bound reaches its query's threshold.
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
      mask |= mask_not_less(upper(m, v), threshold) << (v * kWidth);
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

// ---- fp32 dot products of rows as they are -----------------------------------------------------

template <int Queries, class T>
inline void fp32_tile(const T* const* rows, const float* queries, int64_t dim, float* dots,
                      float* squares) {
  constexpr int Rows = 4;
  Floats sums[Rows][Queries] = {};
  Floats square[Rows] = {};
  const auto step = [&](int64_t i, auto&& get_row, auto&& get_query) {
    Floats row[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) row[r] = get_row(rows[r] + i);
#pragma GCC unroll 4
    for (int m = 0; m < Queries; ++m) {
      const Floats query = get_query(queries + m * dim + i);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) sums[r][m] += row[r] * query;
    }
    if (squares != nullptr) {
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) square[r] += row[r] * row[r];
    }
  };
  int64_t i = 0;
  for (; i + kWidth <= dim; i += kWidth) {
    step(i, [](const T* p) { return load(p); }, [](const float* p) { return load(p); });
  }
  if (i < dim) {
    const int64_t rest = dim - i;
    step(i, [rest](const T* p) { return load_part(p, rest); },
         [rest](const float* p) { return load_part(p, rest); });
  }
  for (int m = 0; m < Queries; ++m) {
    const Floats parts[4] = {sums[0][m], sums[1][m], sums[2][m], sums[3][m]};
    sum4(parts, dots + m * kPanelRows);
  }
  if (squares != nullptr) sum4(square, squares);
}

template <class T>
inline void fp32_rows(const T* const* rows, const float* queries, int count, int64_t dim, float* dots,
                      float* squares) {
  int m = 0;
  for (; m + 4 <= count; m += 4) {
    fp32_tile<4>(rows, queries + m * dim, dim, dots + m * kPanelRows, squares);
    squares = nullptr;
  }
  for (; m < count; ++m) {
    fp32_tile<1>(rows, queries + m * dim, dim, dots + m * kPanelRows, squares);
    squares = nullptr;
  }
}

// ---- quantising --------------------------------------------------------------------------------

struct RowSums {
  float largest = 0, square = 0, mean_dot = 0;
};

// Calls step(i, lane, part) for each vector of a row; lane cycles through kChains independent sums,
// so that no addition waits for the one before. part < kWidth in the last call only.
constexpr int kChains = 4;
template <class Step>
inline void each_vector(int64_t dim, Step&& step) {
  int64_t i = 0;
  for (; i + kChains * kWidth <= dim; i += kChains * kWidth) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) step(i + c * kWidth, c, kWidth);
  }
  for (; i < dim; i += kWidth) step(i, 0, static_cast<int>(dim - i < kWidth ? dim - i : kWidth));
}

inline Floats total(const Floats (&chains)[kChains]) {
  return (chains[0] + chains[1]) + (chains[2] + chains[3]);
}

// centered = row - mean, with what the bound needs to know of it.
template <class T>
RowSums center_row(const T* row, const float* mean, int64_t dim, float* centered) {
  Floats top[kChains] = {}, square[kChains] = {}, mean_dot[kChains] = {};
  each_vector(dim, [&](int64_t i, int c, int part) {
    const Floats m = part == kWidth ? load(mean + i) : load_part(mean + i, part);
    const Floats x = (part == kWidth ? load(row + i) : load_part(row + i, part)) - m;
    store(centered + i, x);
    top[c] = maximum(absolute(x), top[c]);
    square[c] += x * x;
    mean_dot[c] += x * m;
  });
  return {largest(maximum(maximum(top[0], top[1]), maximum(top[2], top[3]))), sum(total(square)),
          sum(total(mean_dot))};
}

// Writes round(centered / step) + 128 into the panel's column and returns the squared error.
float quantize_row(const float* centered, int64_t dim, float step, float inverse, uint8_t* column) {
  Floats square[kChains] = {};
  each_vector(dim, [&](int64_t i, int c, int part) {
    const Floats x = load(centered + i);
    const Floats shifted = x * inverse + kRoundMagic;
    const Floats error = x - (shifted - kRoundMagic) * step;
    square[c] += error * error;
    const UInts bits = (load_bits<UInts>(&shifted) & 0xffu) ^ 0x80u;
    uint8_t bytes[kWidth];
    store_bits(bytes, __builtin_convertvector(bits, Bytes));
    uint8_t* to = column + i * kPanelRows;
#pragma GCC unroll 4
    for (int j = 0; j < kWidth; j += 4) {
      if (j < part) std::memcpy(to + j * kPanelRows, bytes + j, 4);
    }
  });
  return sum(total(square));
}

// ---- exact scores ------------------------------------------------------------------------------

// The order of additions is part of the result: 32 running sums, element i to sum i % 32.
// Products of two floats are exact in double, so a fused multiply-add changes nothing.
constexpr int kExactLanes = 32;
constexpr int kExactVectors = kExactLanes / kDoubleWidth;

inline Doubles widen_lanes(const float* p) {
  return __builtin_convertvector(load_bits<HalfFloats>(p), Doubles);
}
template <class T>
inline Doubles widen_lanes(const T* p) {
  float lanes[kDoubleWidth];
#pragma GCC unroll 8
  for (int i = 0; i < kDoubleWidth; ++i) lanes[i] = to_float(p[i]);
  return widen_lanes(lanes);
}

template <class T>
double exact_row(const double* query, const T* row, int64_t dim) {
  Doubles sums[kExactVectors] = {};
  int64_t i = 0;
  for (; i + kExactLanes <= dim; i += kExactLanes) {
#pragma GCC unroll 16
    for (int v = 0; v < kExactVectors; ++v) {
      const int64_t at = i + v * kDoubleWidth;
      sums[v] += load_bits<Doubles>(query + at) * widen_lanes(row + at);
    }
  }
  double lanes[kExactLanes];
  std::memcpy(lanes, sums, sizeof(lanes));
  for (int64_t j = 0; i + j < dim; ++j) {
    lanes[j] += query[i + j] * static_cast<double>(to_float(row[i + j]));
  }
  for (int step = kExactLanes / 2; step > 0; step /= 2) {
    for (int l = 0; l < step; ++l) lanes[l] += lanes[l + step];
  }
  return lanes[0];
}

inline double total(Doubles v) {
  double lanes[kDoubleWidth], result = 0;
  store_bits(lanes, v);
  for (int i = 0; i < kDoubleWidth; ++i) result += lanes[i];
  return result;
}

struct CenteredQuery {
  double mean_share;  // the query is mean_share * mean + what was stored
  double largest;
};

CenteredQuery center_query(const double* query, double inverse_norm, const float* mean,
                           double mean_square, int64_t dim, double* centered) {
  double dot = 0;
  Doubles dots = {};
  int64_t i = 0;
  for (; i + kDoubleWidth <= dim; i += kDoubleWidth) {
    dots += load_bits<Doubles>(query + i) * widen_lanes(mean + i);
  }
  for (; i < dim; ++i) dot += query[i] * static_cast<double>(mean[i]);
  dot = (dot + total(dots)) * inverse_norm;
  const double share = mean_square > 0 ? dot / mean_square : 0;

  Doubles top = {};
  const auto keep = [&](double* to, Doubles x) {
    store_bits(to, x);
    const Doubles size = x < 0 ? -x : x;
    top = size > top ? size : top;
  };
  for (i = 0; i + kDoubleWidth <= dim; i += kDoubleWidth) {
    keep(centered + i,
         load_bits<Doubles>(query + i) * inverse_norm - share * widen_lanes(mean + i));
  }
  if (i < dim) {
    double rest[kDoubleWidth] = {};
    for (int64_t j = 0; i + j < dim; ++j) {
      rest[j] = query[i + j] * inverse_norm - share * static_cast<double>(mean[i + j]);
    }
    keep(centered + i, load_bits<Doubles>(rest));
  }
  double lanes[kDoubleWidth], best = 0;
  store_bits(lanes, top);
  for (const double x : lanes) best = x > best ? x : best;
  return {share, best};
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
      const double room = term.scale[m] * error * 1.000001 + 1.2e-7 * __builtin_fabs(score) + 1e-45;
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
  const float floor = 1.2e-19f * __builtin_sqrtf(static_cast<float>(dim));  // what squaring may lose
  with_element(dtype, [&]<class T>(const T*) {
    const T* first = static_cast<const T*>(data);
    for (int64_t group = 0; group * kGroupSize < args.queries_count; ++group) {
      const int count = group_queries(args, group);
      const float* queries = static_cast<const float*>(args.queries) + group * kGroupSize * dim;
      for (int r = 0; r < rows; r += 4) {
        const int last = rows - 1;
        const auto at = [&](int i) { return first + dim * (i < last ? i : last); };
        const T* block[4] = {at(r), at(r + 1), at(r + 2), at(r + 3)};
        fp32_rows(block, queries, count, dim, dots + r, group == 0 ? norms + r : nullptr);
      }
      if (group == 0) {
        for (int r = 0; r < kPanelRows; ++r) {
          norms[r] = (__builtin_sqrtf(norms[r]) * (1 + args.slack) + floor) * (args.slack + 2e-7f) +
                     floor * floor;
        }
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
  });
}

void quantize(const void* data, DType dtype, int count, int64_t dim, const float* mean, float slack,
              float* scratch, uint8_t* panel) {
  PanelTerms term = {};
  uint8_t* bytes = panel + sizeof(term);
  const float floor = 1.2e-19f * __builtin_sqrtf(static_cast<float>(dim));  // what squaring may lose
  with_element(dtype, [&]<class T>(const T*) {
    const T* rows = static_cast<const T*>(data);
    for (int r = 0; r < count; ++r) {
      const RowSums sums = center_row(rows + r * dim, mean, dim, scratch);
      const bool normal = sums.largest > 1e-30f;  // else 1 / step may overflow: keep it all as error
      term.step[r] = normal ? sums.largest / 127.0f : 0.0f;
      const float inverse = normal ? 127.0f / sums.largest : 0.0f;
      const float square = quantize_row(scratch, dim, term.step[r], inverse, bytes + 4 * r);
      term.norm[r] = __builtin_sqrtf(sums.square) * (1 + slack) + floor;
      // 1e-6 |s'|: the roundings of row - mean and of the error itself.
      term.error[r] = __builtin_sqrtf(square) * (1 + slack) + floor + 1e-6f * term.norm[r];
      term.mean_dot[r] = sums.mean_dot;
    }
  });
  for (int64_t g = 0; count < kPanelRows && g < (dim + 3) / 4; ++g) {
    std::memset(bytes + (g * kPanelRows + count) * 4, 128, (kPanelRows - count) * 4);
  }
  std::memcpy(panel, &term, sizeof(term));
}

void quantize_query(const double* query, double norm, const float* mean, double mean_square,
                    int64_t dim, float slack, double* centered, int slot, int8_t* group,
                    GroupTerms* terms) {
  const double inverse_norm = norm > 0 || norm != norm ? 1 / norm : 0;
  const CenteredQuery query_at =
      center_query(query, inverse_norm, mean, mean_square, dim, centered);
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  const float scale = static_cast<float>((query_at.largest > 1e-9 ? query_at.largest : 1e-9) / kLimit);
  const double inverse = (1 - 1e-7) / static_cast<double>(scale);  // |q8| never passes the limit
  Doubles error = {}, square = {};
  int32_t sum = 0;
  for (int64_t i = 0; i < dim; i += kDoubleWidth) {
    const Doubles x = load_bits<Doubles>(centered + i);
    const Doubles shifted = x * inverse + kRound;
    const Doubles level = (shifted - kRound) * static_cast<double>(scale);
    error += (x - level) * (x - level);
    square += level * level;
    uint64_t bits[kDoubleWidth];
    store_bits(bits, shifted);
    for (int j = 0; j < kDoubleWidth && i + j < dim; ++j) {
      const int8_t q8 = static_cast<int8_t>(bits[j] & 0xff);
      group[(i + j) / 4 * (kGroupSize * 4) + slot * 4 + (i + j) % 4] = q8;
      sum += q8;
    }
  }
  const double a = static_cast<double>(scale);
  const double mean_part = __builtin_fabs(query_at.mean_share) * __builtin_sqrt(mean_square);
  terms->scale[slot] = scale;
  terms->base[slot] = query_at.mean_share * mean_square;
  terms->shift[slot] = static_cast<float>(query_at.mean_share / a);
  // The last term covers every fp32 rounding on the way to the upper bound.
  terms->error[slot] = static_cast<float>(
      (__builtin_sqrt(total(error)) * 1.000001 + 1e-15 + 2 * slack * (1 + mean_part)) / a);
  terms->norm[slot] = static_cast<float>(__builtin_sqrt(total(square)) / a * 1.000001);
  terms->bias[slot] = -128 * sum;
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

void widen(const void* row, DType dtype, int64_t dim, double* out) {
  with_element(dtype, [&]<class T>(const T*) {
    const T* in = static_cast<const T*>(row);
    int64_t i = 0;
    for (; i + kDoubleWidth <= dim; i += kDoubleWidth) store_bits(out + i, widen_lanes(in + i));
    for (; i < dim; ++i) out[i] = static_cast<double>(to_float(in[i]));
  });
}

}  // namespace saferclip::cpu::SAFERCLIP_NAMESPACE
