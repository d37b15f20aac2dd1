// Quantizing rows and queries for the int8 screen of nearest_safe. Compiled once per instruction set.
#include "isa.h"
#include "kernels/cpu/rounding.h"
#include "simd.h"

namespace {

using saferclip::DType;
using saferclip::cpu::GroupTerms;
using saferclip::cpu::kGroupSize;
using saferclip::cpu::kInflate;
using saferclip::cpu::kLostLength;
using saferclip::cpu::kPanelRows;
using saferclip::cpu::PanelTerms;

constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
constexpr double kRoundMagicDouble = 6755399441055744.0;  // 1.5 * 2^52
constexpr float kCenterSlack = 1e-6f;  // of |s'|: the roundings of row - mean and of the error itself
constexpr float kLeastRow = 1e-30f;    // rows of a smaller largest element are kept as error: 1 / step may overflow
constexpr double kLeastQuery = 1e-9;   // of the largest element of a centered unit query: keeps its scale normal
constexpr double kLeastMeanSquare = 1e-20;  // a shorter mean takes no share of a query: the share could overflow
constexpr double kDoubleSlack = 1e-15; // what centering a unit query in double may lose

struct RowSums {
  float largest = 0, square = 0, mean_dot = 0;
};

// Calls step(i, chain, lanes) for each vector of a row; chain cycles through kChains independent sums, so
// that no addition waits for the one before. lanes < kWidth in the last call only.
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
  each_vector(dim, [&](int64_t i, int c, int lanes) {
    const Floats m = lanes == kWidth ? load(mean + i) : load_part(mean + i, lanes);
    const Floats x = (lanes == kWidth ? load(row + i) : load_part(row + i, lanes)) - m;
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
  each_vector(dim, [&](int64_t i, int c, int lanes) {
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
      if (j < lanes) std::memcpy(to + j * kPanelRows, bytes + j, 4);
    }
  });
  return sum(total(square));
}

inline double total(Doubles v) {
  double lanes[kDoubleWidth], result = 0;
  store_bits(lanes, v);
  for (int i = 0; i < kDoubleWidth; ++i) result += lanes[i];
  return result;
}

struct CenteredQuery {
  double mean_share;  // the query is mean_share * mean + what was stored
  double mean_dot;
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
  const double mean_share = mean_square > kLeastMeanSquare ? dot / mean_square : 0;

  Doubles top = {};
  const auto keep = [&](double* to, Doubles x) {
    store_bits(to, x);
    const Doubles size = x < 0 ? -x : x;
    top = size > top ? size : top;
  };
  for (i = 0; i + kDoubleWidth <= dim; i += kDoubleWidth) {
    keep(centered + i,
         load_bits<Doubles>(query + i) * inverse_norm - mean_share * widen_lanes(mean + i));
  }
  if (i < dim) {
    double rest[kDoubleWidth] = {};
    for (int64_t j = 0; i + j < dim; ++j) {
      rest[j] = query[i + j] * inverse_norm - mean_share * static_cast<double>(mean[i + j]);
    }
    keep(centered + i, load_bits<Doubles>(rest));
  }
  double lanes[kDoubleWidth], best = 0;
  store_bits(lanes, top);
  for (const double x : lanes) best = x > best ? x : best;
  return {mean_share, dot, best};
}

}  // namespace

namespace saferclip::cpu::SAFERCLIP_NAMESPACE {

void quantize(const void* data, DType dtype, int count, int64_t dim, const float* mean, float slack,
              float* scratch, uint8_t* panel) {
  PanelTerms term = {};
  uint8_t* bytes = panel + sizeof(term);
  const float floor = kLostLength * __builtin_sqrtf(static_cast<float>(dim));  // what squaring may lose
  with_element(dtype, [&]<class T>(const T*) {
    const T* rows = static_cast<const T*>(data);
    for (int r = 0; r < count; ++r) {
      const RowSums sums = center_row(rows + r * dim, mean, dim, scratch);
      const bool normal = sums.largest > kLeastRow;
      term.step[r] = normal ? sums.largest / 127.0f : 0.0f;
      const float inverse = normal ? 127.0f / sums.largest : 0.0f;
      const float square = quantize_row(scratch, dim, term.step[r], inverse, bytes + 4 * r);
      term.norm[r] = __builtin_sqrtf(sums.square) * (1 + slack) + floor;
      term.error[r] = __builtin_sqrtf(square) * (1 + slack) + floor + kCenterSlack * term.norm[r];
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
  const float scale = static_cast<float>((query_at.largest > kLeastQuery ? query_at.largest : kLeastQuery) / kQueryLimit);
  const double inverse = (1 - 1e-7) / static_cast<double>(scale);  // |q8| never passes the limit
  Doubles error = {}, square = {};
  int32_t sum = 0;
  for (int64_t i = 0; i < dim; i += kDoubleWidth) {
    const Doubles x = load_bits<Doubles>(centered + i);
    const Doubles shifted = x * inverse + kRoundMagicDouble;
    const Doubles level = (shifted - kRoundMagicDouble) * static_cast<double>(scale);
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
  terms->base[slot] = query_at.mean_dot;
  terms->shift[slot] = static_cast<float>(query_at.mean_share / a);
  // The last term covers every fp32 rounding on the way to the upper bound.
  terms->error[slot] = static_cast<float>(
      (__builtin_sqrt(total(error)) * kInflate + kDoubleSlack + 2 * slack * (1 + mean_part)) / a);
  terms->norm[slot] = static_cast<float>(__builtin_sqrt(total(square)) / a * kInflate);
  terms->bias[slot] = -128 * sum;
}

}  // namespace saferclip::cpu::SAFERCLIP_NAMESPACE
