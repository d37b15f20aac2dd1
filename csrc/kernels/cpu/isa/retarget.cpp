// The rows of retarget_loss: one sweep gathers every inner product, a second, from cache, writes both
// gradients. Compiled once per instruction set.
#include "isa.h"
#include "kernels/cpu/retarget_loss.h"
#include "simd.h"

namespace {

using saferclip::DType;
using saferclip::cpu::RetargetArgs;

// The six rows that one sample is made of.
template <class T>
struct Sample {
  const T *text, *image;
  const T *away_text, *away_image;          // what text, image are pushed from
  const float *target_text, *target_image;  // what they are pulled to
};

struct Products {
  float text_text, image_image, away_text, away_image;          // squared lengths
  float text_target, image_target;                              // own modality
  float text_away, image_away, text_other, image_other;         // other modality
};

template <class T>
Products products(const Sample<T>& row, int64_t dim) {
  Floats tt = {}, vv = {}, aa_t = {}, aa_v = {}, t_s = {}, v_s = {}, t_a = {}, v_a = {}, t_o = {}, v_o = {};
  const auto step = [&](auto&& get, int64_t i) {
    const Floats t = get(row.text + i), v = get(row.image + i);
    const Floats a_t = get(row.away_text + i), a_v = get(row.away_image + i);
    const Floats s_t = get(row.target_text + i), s_v = get(row.target_image + i);
    tt += t * t;
    vv += v * v;
    aa_t += a_t * a_t;
    aa_v += a_v * a_v;
    t_s += t * s_t;
    v_s += v * s_v;
    t_a += t * a_t;
    v_a += v * a_v;
    t_o += t * s_v;
    v_o += v * s_t;
  };
  int64_t i = 0;
  for (; i + kWidth <= dim; i += kWidth) step([](const auto* p) { return load(p); }, i);
  if (i < dim) step([&](const auto* p) { return load_part(p, dim - i); }, i);
  return {sum(tt), sum(vv), sum(aa_t), sum(aa_v), sum(t_s),
          sum(v_s), sum(t_a), sum(v_a), sum(t_o), sum(v_o)};
}

// grad = own * x + away * a + target * s + other * o
struct Mix {
  float own, away, target, other;
};

template <class T>
void write_gradients(const Sample<T>& row, const Mix& t, const Mix& v, int64_t dim, bool stream,
                     T* grad_text, T* grad_image) {
  const auto mixed = [&](auto&& get, int64_t i, Floats* text, Floats* image) {
    const Floats s_t = get(row.target_text + i), s_v = get(row.target_image + i);
    *text = get(row.text + i) * t.own + get(row.away_text + i) * t.away + s_t * t.target + s_v * t.other;
    *image = get(row.image + i) * v.own + get(row.away_image + i) * v.away + s_v * v.target + s_t * v.other;
  };
  Floats text, image;
  int64_t i = 0;
  for (; i + kWidth <= dim; i += kWidth) {
    mixed([](const auto* p) { return load(p); }, i, &text, &image);
    write(grad_text + i, text, stream);
    write(grad_image + i, image, stream);
  }
  if (i == dim) return;
  mixed([&](const auto* p) { return load_part(p, dim - i); }, i, &text, &image);
  for (int64_t j = 0; i + j < dim; ++j) {
    write_one(grad_text + i + j, text[j]);
    write_one(grad_image + i + j, image[j]);
  }
}

inline float inverse_length(float square) { return square > 0 ? 1 / __builtin_sqrtf(square) : 0.0f; }

// softplus(x) and its derivative, neither overflowing.
inline void softplus(float x, float* value, float* slope) {
  const float e = __builtin_expf(-__builtin_fabsf(x));
  *value = (x > 0 ? x : 0) + __builtin_log1pf(e);
  *slope = (x > 0 ? 1 : e) / (1 + e);
}

// One modality of one sample: its two terms, and how its gradient mixes the rows.
struct Side {
  float uni, cross;
  Mix mix;
};

inline Side side(const RetargetArgs& args, float inverse, float scale, float inverse_away,
                 float dot_target, float dot_away, float dot_other, float uni_weight,
                 float cross_weight) {
  const float target = dot_target * inverse, away = dot_away * inverse * inverse_away;
  const float other = dot_other * inverse;
  float value, slope;
  softplus(args.beta * (away - other + args.margin), &value, &slope);
  const float push = cross_weight * slope;
  const float along = push * (away - other) - uni_weight * target;  // g . u
  const float outer = inverse * scale;  // 1 / |x| of the row as it was given
  const Mix mix{-along * inverse * outer, push * inverse_away * outer, -uni_weight * outer, -push * outer};
  return {1 - target, value / args.beta, mix};
}

// Sum of weight * row, as float, or the row itself where that is the same thing.
const float* blend(const saferclip::cpu::Matrix& bank, const int64_t* neighbors, const float* weights,
                   int64_t k, float* scratch) {
  if (k == 1 && weights[0] == 1 && bank.dtype == DType::kFloat32) {
    return static_cast<const float*>(bank.row(neighbors[0]));
  }
  with_element(bank.dtype, [&]<class T>(const T*) {
    const T* rows = static_cast<const T*>(bank.data);
    int64_t i = 0;
    for (; i + kWidth <= bank.dim; i += kWidth) {
      Floats sum = {};
      for (int64_t j = 0; j < k; ++j) sum += weights[j] * load(rows + neighbors[j] * bank.dim + i);
      store(scratch + i, sum);
    }
    for (; i < bank.dim; ++i) {
      float sum = 0;
      for (int64_t j = 0; j < k; ++j) sum += weights[j] * to_float(rows[neighbors[j] * bank.dim + i]);
      scratch[i] = sum;
    }
  });
  return scratch;
}

inline void fetch(const void* row, int64_t bytes) {
  const char* p = static_cast<const char*>(row);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 3);
}

template <class T>
void fetch_sample(const RetargetArgs& args, int64_t i) {
  const int64_t bytes = args.dim * static_cast<int64_t>(sizeof(T));
  for (const void* base : {args.text, args.image, args.frozen_text, args.frozen_image}) {
    fetch(static_cast<const char*>(base) + i * bytes, bytes);
  }
  const int64_t bank_bytes = args.dim * element_size(args.bank_text.dtype);
  fetch(args.bank_text.row(args.neighbors[i * args.k]), bank_bytes);
  fetch(args.bank_image.row(args.neighbors[i * args.k]), bank_bytes);
}

// Whether squaring in fp32 lost a row: its length overflows or underflows though the row is fine.
inline bool extreme(float square) { return !(square >= 1e-28f && square <= 1e30f); }

// The row times the power of two that brings its largest element into [1, 2), in scratch.
template <class T>
const T* rescaled(const T* row, int64_t dim, T* scratch, float* scale) {
  float top = 0;
  for (int64_t i = 0; i < dim; ++i) {
    const float size = __builtin_fabsf(to_float(row[i]));
    top = size > top ? size : top;
  }
  *scale = 1;
  if (top == 0 || !__builtin_isfinite(top)) return row;
  const int exponent = __builtin_ilogbf(top);
  for (int64_t i = 0; i < dim; ++i) {
    const double scaled = __builtin_ldexp(static_cast<double>(to_float(row[i])), -exponent);
    write_one(scratch + i, static_cast<float>(scaled));
  }
  *scale = static_cast<float>(__builtin_ldexp(1.0, -exponent));
  return scratch;
}

// Replaces rows whose squared length fp32 cannot hold; scales[0..1] belong to text and image.
template <class T>
Products tame(Sample<T>* row, const Products& p, int64_t dim, bool current_negative, float* scratch,
              float* scales) {
  T* free_row = reinterpret_cast<T*>(scratch);
  const auto fix = [&](const T** x, float square, float* scale) {
    if (!extreme(square)) return;
    *x = rescaled(*x, dim, free_row, scale);
    free_row += dim;
  };
  float unused;
  fix(&row->text, p.text_text, &scales[0]);
  fix(&row->image, p.image_image, &scales[1]);
  if (current_negative) {
    row->away_text = row->image;
    row->away_image = row->text;
  } else {
    fix(&row->away_text, p.away_text, &unused);
    fix(&row->away_image, p.away_image, &unused);
  }
  return products(*row, dim);
}

template <class T>
void retarget_typed(const RetargetArgs& args, int64_t begin, int64_t end, double* sums,
                    float* scratch) {
  const int64_t dim = args.dim;
  const auto at = [&](const void* base, int64_t i) { return static_cast<const T*>(base) + i * dim; };
  for (int64_t i = begin; i < end; ++i) {
    if (i + 1 < args.batch) fetch_sample<T>(args, i + 1);
    Sample<T> row;
    row.text = at(args.text, i);
    row.image = at(args.image, i);
    row.away_text = args.current_negative ? row.image : at(args.frozen_image, i);
    row.away_image = args.current_negative ? row.text : at(args.frozen_text, i);
    const int64_t* neighbors = args.neighbors + i * args.k;
    const float* mix = args.neighbor_weights + i * args.k;
    row.target_text = blend(args.bank_text, neighbors, mix, args.k, scratch);
    row.target_image = blend(args.bank_image, neighbors, mix, args.k, scratch + dim);

    Products p = products(row, dim);
    float scales[2] = {1, 1};
    if (extreme(p.text_text) || extreme(p.image_image) || extreme(p.away_text) || extreme(p.away_image)) {
      p = tame(&row, p, dim, args.current_negative, scratch + 2 * dim, scales);
    }
    const float inverse_t = inverse_length(p.text_text), inverse_v = inverse_length(p.image_image);
    const float* rw = args.row_weights + 4 * i;
    const Side text = side(args, inverse_t, scales[0], inverse_length(p.away_text), p.text_target, p.text_away,
                           p.text_other, args.weights[0] * rw[0], args.weights[2] * rw[2]);
    const Side image = side(args, inverse_v, scales[1], inverse_length(p.away_image), p.image_target, p.image_away,
                            p.image_other, args.weights[1] * rw[1], args.weights[3] * rw[3]);
    sums[0] += static_cast<double>(rw[0]) * text.uni;
    sums[1] += static_cast<double>(rw[1]) * image.uni;
    sums[2] += static_cast<double>(rw[2]) * text.cross;
    sums[3] += static_cast<double>(rw[3]) * image.cross;
    if (args.grad_text == nullptr) continue;
    write_gradients(row, text.mix, image.mix, dim, args.stream,
                    static_cast<T*>(args.grad_text) + i * dim,
                    static_cast<T*>(args.grad_image) + i * dim);
  }
  if (args.stream) end_streaming();
}

}  // namespace

namespace saferclip::cpu::SAFERCLIP_NAMESPACE {

void retarget_rows(const RetargetArgs& args, int64_t begin, int64_t end, double* sums,
                   float* scratch) {
  with_element(args.dtype, [&]<class T>(const T*) {
    retarget_typed<T>(args, begin, end, sums, scratch);
  });
}

}  // namespace saferclip::cpu::SAFERCLIP_NAMESPACE
