// What InfoNCE does to a tile of logits while it is in cache, and the rows of its gradient. Compiled once
// per instruction set.
#include "isa.h"
#include "simd.h"

namespace {

using saferclip::DType;

constexpr float kLowest = -3e38f;

// exp(x) for x <= 88, to about one unit in the last place; 0 below -87.
inline Floats exponential(Floats x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  x = maximum(x, splat(-100.0f));
  const Floats shifted = x * kLog2E + kMagic;
  const Floats n = shifted - kMagic;
  const Floats r = (x - n * kLn2High) - n * kLn2Low;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^n from the integer that the rounding left in the low bits; clear what would be denormal.
  const UInts exponent = (load_bits<UInts>(&shifted) << 23) + (127u << 23);
  const Floats power = load_bits<Floats>(&exponent);
  return x < -87.0f ? Floats{} : p * power;
}

// Lanes beyond the tile read as a logit that adds nothing.
inline Floats logits(const float* p, int64_t left) {
  if (left >= kWidth) return load(p);
  float lanes[kWidth];
  for (int i = 0; i < kWidth; ++i) lanes[i] = i < left ? p[i] : kLowest;
  return load(lanes);
}

void sum_row(const float* row, int64_t columns, float* largest_seen, float* sum_seen) {
  Floats top = splat(kLowest);
  for (int64_t c = 0; c < columns; c += kWidth) top = maximum(logits(row + c, columns - c), top);
  const float before = *largest_seen, now = largest(top);
  const float best = now > before ? now : before;
  Floats total[4] = {};
  int64_t c = 0;
  for (; c + 4 * kWidth <= columns; c += 4 * kWidth) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      total[v] += exponential(load(row + c + v * kWidth) - best);
    }
  }
  for (; c < columns; c += kWidth) total[0] += exponential(logits(row + c, columns - c) - best);
  const float old = *sum_seen > 0 ? *sum_seen * __builtin_expf(before - best) : 0.0f;
  *sum_seen = old + sum((total[0] + total[1]) + (total[2] + total[3]));
  *largest_seen = best;
}

// Up to kWidth * Vectors columns, from the top of the tile to its bottom.
template <int Vectors>
void sum_columns(const float* tile, int64_t rows, int64_t stride, int64_t columns,
                 float* column_largest, float* column_sum) {
  Floats top[Vectors], total[Vectors] = {};
  for (int v = 0; v < Vectors; ++v) top[v] = splat(kLowest);
  for (int64_t r = 0; r < rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      top[v] = maximum(logits(tile + r * stride + v * kWidth, columns - v * kWidth), top[v]);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      const Floats x = logits(tile + r * stride + v * kWidth, columns - v * kWidth);
      total[v] += exponential(x - top[v]);
    }
  }
  for (int v = 0; v < Vectors; ++v) {
    for (int i = 0; i < kWidth && v * kWidth + i < columns; ++i) {
      column_largest[v * kWidth + i] = top[v][i];
      column_sum[v * kWidth + i] = total[v][i];
    }
  }
}

}  // namespace

namespace saferclip::cpu::SAFERCLIP_NAMESPACE {

void log_sum_exp(const float* tile, int64_t rows, int64_t columns, float* row_largest,
                 float* row_sum, float* column_largest, float* column_sum) {
  for (int64_t r = 0; r < rows; ++r) {
    sum_row(tile + r * columns, columns, row_largest + r, row_sum + r);
  }
  constexpr int kVectors = 4;
  int64_t c = 0;
  for (; c + kVectors * kWidth <= columns; c += kVectors * kWidth) {
    sum_columns<kVectors>(tile + c, rows, columns, kVectors * kWidth, column_largest + c,
                          column_sum + c);
  }
  for (; c < columns; c += kWidth) {
    sum_columns<1>(tile + c, rows, columns, columns - c, column_largest + c, column_sum + c);
  }
}

void softmax_sum(const float* tile, int64_t rows, int64_t columns, const float* row_largest,
                 const float* row_log, const float* column_largest, const float* column_log, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = tile + r * columns;
    float* to = out + r * columns;
    const auto softmaxes = [&](Floats x, Floats largest, Floats log) {
      return exponential(x - row_largest[r] - row_log[r]) +
             exponential(x - largest - log);
    };
    int64_t c = 0;
    for (; c + kWidth <= columns; c += kWidth) {
      store(to + c, softmaxes(load(row + c), load(column_largest + c), load(column_log + c)));
    }
    if (c == columns) continue;
    const int64_t rest = columns - c;
    const Floats p = softmaxes(load_part(row + c, rest), load_part(column_largest + c, rest),
                               load_part(column_log + c, rest));
    for (int64_t j = 0; j < rest; ++j) to[c + j] = p[j];
  }
}

double preservation_row(const float* unit, const float* own, const float* mixed, const float* paired,
                        float pull, float push, float inverse_norm, int64_t dim, DType dtype,
                        void* grad) {
  Floats cosine = {}, along = {};
  const auto direction = [&](auto&& get, int64_t i) {
    Floats g = get(own + i) * pull;
    if (mixed != nullptr) g += push * (get(mixed + i) - 2 * get(paired + i));
    return g;
  };
  const auto sweep = [&](auto&& get, int64_t i) {
    const Floats u = get(unit + i);
    cosine += u * get(own + i);
    along += u * direction(get, i);
  };
  const auto whole = [](const float* p) { return load(p); };
  const int64_t body = dim / kWidth * kWidth;
  const auto rest = [&](const float* p) { return load_part(p, dim - body); };
  for (int64_t i = 0; i < body; i += kWidth) sweep(whole, i);
  if (body < dim) sweep(rest, body);
  if (grad != nullptr) {
    const float projection = sum(along);
    with_element(dtype, [&]<class T>(const T*) {
      T* out = static_cast<T*>(grad);
      for (int64_t i = 0; i < body; i += kWidth) {
        write(out + i, (direction(whole, i) - projection * load(unit + i)) * inverse_norm, false);
      }
      if (body == dim) return;
      const Floats last = (direction(rest, body) - projection * rest(unit + body)) * inverse_norm;
      for (int64_t j = 0; body + j < dim; ++j) write_one(out + body + j, last[j]);
    });
  }
  return sum(cosine);
}

}  // namespace saferclip::cpu::SAFERCLIP_NAMESPACE
