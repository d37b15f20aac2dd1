// One warp a row: gather the k neighbors into the targets s^, take eleven inner products in one pass,
// then write both gradients in closed form in a second pass over rows that are still in cache.
// Terms are reduced by a second kernel in a fixed order, so the same inputs give the same bits.
#pragma once

#include "matrix.cuh"
#include "reduce.cuh"
#include "retarget_loss.h"

namespace saferclip {

constexpr int kRetargetThreads = 128;
constexpr int kRetargetRows = kRetargetThreads / kWarpSize;  // rows a block

struct RetargetArguments {
  Matrix text, image, frozen_text, frozen_image, bank_text, bank_image;
  Global<const int64_t> neighbors;
  Global<const float> neighbor_weights;
  Global<const float> row_weights;
  int64_t batch, bank_rows;
  int k;
  float weights[4];
  float beta, margin;
  int current_negative, need_grad;
  Global<uint8_t> grad_text, grad_image;
  Global<Vec16> row_terms;  // [batch]: the four terms of a row, times its row weights
};

constexpr int64_t retarget_shared_bytes(int64_t dim) {
  return kRetargetRows * 2 * round_up(dim, 8) * static_cast<int64_t>(sizeof(float));
}

// Eight elements of sum_j w_j bank[n_j].
__device__ __forceinline__ void gather8(const RetargetArguments& p, const Matrix& bank, int64_t row, int chunk,
                                        float (&target)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) target[i] = 0.0f;
  for (int j = 0; j < p.k; ++j) {
    const int64_t neighbor = p.neighbors[row * p.k + j];
    const bool inside = neighbor >= 0 && neighbor < p.bank_rows;
    const float w = inside ? static_cast<float>(p.neighbor_weights[row * p.k + j]) : NAN;
    float s[8];
    load8(bank, inside ? neighbor : 0, chunk, s);
#pragma unroll
    for (int i = 0; i < 8; ++i) target[i] = fmaf(w, s[i], target[i]);
  }
}

__device__ __forceinline__ void store_target(Shared<float> to, int chunk, const float (&x)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Vec16 v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.word[i] = __float_as_uint(x[half * 4 + i]);
    as<Vec16>(to)[chunk * 2 + half] = v;
  }
}
__device__ __forceinline__ void load_target(Shared<float> from, int chunk, float (&x)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Vec16 v = as<const Vec16>(from)[chunk * 2 + half];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[half * 4 + i] = __uint_as_float(v.word[i]);
  }
}

__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// One side (text or image) of a row, from inner products of raw rows and 1/|.| factors.
struct Side {
  float scale;            // x enters times this power of two (row_scale)
  float inverse;          // 1/|x times scale|
  float away_scale;       // the negative is away_scale * (negative row times its scale)
  float near, far, away;  // u . own target, u . target of the other modality, u . negative
  float uni, cross;       // the two terms
  float w_uni, w_cross;   // what multiplies -s^ and (negative - other target) in dL/du
  __device__ __forceinline__ void finish(float weight_uni, float weight_cross, float beta, float margin) {
    const float x = beta * (away - far + margin);
    uni = 1.0f - near;
    cross = softplus(x) / beta;
    w_uni = weight_uni;
    w_cross = weight_cross * sigmoid(x);
  }
  // dL/dx = (g - (g . u) u) / |x| of eight elements.
  __device__ __forceinline__ void gradient(const float (&x)[8], const float (&negative)[8],
                                           const float (&own)[8], const float (&other)[8], float (&out)[8]) const {
    const float along = w_cross * (away - far) - w_uni * near;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float g = w_cross * (away_scale * negative[i] - other[i]) - w_uni * own[i];
      out[i] = (g - along * inverse * x[i]) * inverse * scale;
    }
  }
};

__global__ void __launch_bounds__(kRetargetThreads, 5) retarget_kernel(RetargetArguments p) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRetargetRows + warp;
  if (row >= p.batch) return;
  const int dim = p.text.dim, chunks = static_cast<int>(ceil_div(dim, 8));
  // Each lane reads back only what it wrote itself, so the targets need no barrier.
  const Shared<float> text_target = as<float>(dynamic_shared()) + warp * 2 * chunks * 8;
  const Shared<float> image_target = text_target + chunks * 8;
  const Matrix& text_away = p.current_negative ? p.image : p.frozen_image;
  const Matrix& image_away = p.current_negative ? p.text : p.frozen_text;

  float t_scale = 1, v_scale = 1, at_scale = 1, av_scale = 1;  // of text, image and their negatives
  float tt, vv, at_at, av_av;                                  // squared norms
  float t_st, t_sv, t_at, v_sv, v_st, v_av;
  for (bool scaled = false;; scaled = true) {
    tt = vv = at_at = av_av = t_st = t_sv = t_at = v_sv = v_st = v_av = 0;
    for (int chunk = lane; chunk < chunks; chunk += kWarpSize) {
      float t[8], v[8], x[8];
      load8(p.text, row, chunk, t), scale8(t, t_scale);
      load8(p.image, row, chunk, v), scale8(v, v_scale);
      tt = dot8(t, t, tt), vv = dot8(v, v, vv);
      load8(text_away, row, chunk, x), scale8(x, at_scale);
      t_at = dot8(t, x, t_at), at_at = dot8(x, x, at_at);
      load8(image_away, row, chunk, x), scale8(x, av_scale);
      v_av = dot8(v, x, v_av), av_av = dot8(x, x, av_av);
      gather8(p, p.bank_text, row, chunk, x);
      t_st = dot8(t, x, t_st), v_st = dot8(v, x, v_st);
      if (p.need_grad) store_target(text_target, chunk, x);
      gather8(p, p.bank_image, row, chunk, x);
      t_sv = dot8(t, x, t_sv), v_sv = dot8(v, x, v_sv);
      if (p.need_grad) store_target(image_target, chunk, x);
    }
    tt = warp_sum(tt), vv = warp_sum(vv), at_at = warp_sum(at_at), av_av = warp_sum(av_av);
    if (scaled || (in_range(tt) && in_range(vv) && in_range(at_at) && in_range(av_av))) break;
    t_scale = row_scale(p.text, row, tt), v_scale = row_scale(p.image, row, vv);
    at_scale = row_scale(text_away, row, at_at), av_scale = row_scale(image_away, row, av_av);
  }
  const float inverse_t = inverse_norm(tt), inverse_v = inverse_norm(vv);
  const float inverse_at = inverse_norm(at_at), inverse_av = inverse_norm(av_av);
  Side text = {t_scale, inverse_t, inverse_at, inverse_t * warp_sum(t_st), inverse_t * warp_sum(t_sv),
               inverse_t * inverse_at * warp_sum(t_at)};
  Side image = {v_scale, inverse_v, inverse_av, inverse_v * warp_sum(v_sv), inverse_v * warp_sum(v_st),
                inverse_v * inverse_av * warp_sum(v_av)};
  const Vec16 stored = as<const Vec16>(p.row_weights)[row];
  float weight[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) weight[i] = __uint_as_float(stored.word[i]);
  text.finish(weight[0] * p.weights[0], weight[2] * p.weights[2], p.beta, p.margin);
  image.finish(weight[1] * p.weights[1], weight[3] * p.weights[3], p.beta, p.margin);
  if (lane == 0) {
    p.row_terms[row] = Vec16{__float_as_uint(weight[0] * text.uni), __float_as_uint(weight[1] * image.uni),
                             __float_as_uint(weight[2] * text.cross), __float_as_uint(weight[3] * image.cross)};
  }
  if (!p.need_grad) return;
  for (int chunk = lane; chunk < chunks; chunk += kWarpSize) {
    float t[8], v[8], st[8], sv[8], x[8], grad[8];
    load8(p.text, row, chunk, t), scale8(t, t_scale);
    load8(p.image, row, chunk, v), scale8(v, v_scale);
    load_target(text_target, chunk, st);
    load_target(image_target, chunk, sv);
    load8(text_away, row, chunk, x), scale8(x, at_scale);
    text.gradient(t, x, st, sv, grad);
    store8(p.text, p.grad_text, row, chunk, grad);
    load8(image_away, row, chunk, x), scale8(x, av_scale);
    image.gradient(v, x, sv, st, grad);
    store8(p.image, p.grad_image, row, chunk, grad);
  }
}

}  // namespace saferclip
