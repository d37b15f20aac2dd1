#include "retarget_loss.h"

#include <cmath>
#include <vector>

namespace saferclip::cpu {
namespace {

float dot(const float* a, const float* b, int64_t n) {
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

float normalise(const float* x, float* unit, int64_t n) {
  const float norm = std::sqrt(dot(x, x, n));
  const float inverse = norm > 0 ? 1 / norm : 0;
  for (int64_t i = 0; i < n; ++i) unit[i] = x[i] * inverse;
  return inverse;
}

float softplus(float x) { return std::fmax(x, 0.0f) + std::log1p(std::exp(-std::fabs(x))); }
float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

// grad = (g - (g.u) u) / |x|, the derivative of u = x / |x| applied to g.
void project(const float* g, const float* u, float inverse_norm, float* grad, int64_t n) {
  const float along = dot(g, u, n);
  for (int64_t i = 0; i < n; ++i) grad[i] = (g[i] - along * u[i]) * inverse_norm;
}

}  // namespace

void retarget_loss_rows(const RetargetArgs& a, int64_t begin, int64_t end) {
  const int64_t d = a.width;
  std::vector<float> scratch(8 * d);
  float *u_t = &scratch[0], *u_v = u_t + d, *r_t = u_v + d, *r_v = r_t + d;
  float *s_t = r_v + d, *s_v = s_t + d, *g_t = s_v + d, *g_v = g_t + d;
  for (int64_t i = begin; i < end; ++i) {
    const float inverse_t = normalise(a.text + i * d, u_t, d);
    const float inverse_v = normalise(a.image + i * d, u_v, d);
    normalise(a.frozen_text + i * d, r_t, d);
    normalise(a.frozen_image + i * d, r_v, d);
    for (int64_t c = 0; c < d; ++c) s_t[c] = s_v[c] = 0;
    for (int64_t j = 0; j < a.k; ++j) {
      const float w = a.neighbor_weights[i * a.k + j];
      const int64_t row = a.neighbors[i * a.k + j] * d;
      for (int64_t c = 0; c < d; ++c) {
        s_t[c] += w * a.bank_text[row + c];
        s_v[c] += w * a.bank_image[row + c];
      }
    }
    const float* n_v = a.current_negative ? u_v : r_v;  // what the text is pushed from
    const float* n_t = a.current_negative ? u_t : r_t;  // what the image is pushed from
    const float x_t = a.beta * (dot(u_t, n_v, d) - dot(u_t, s_v, d) + a.margin);
    const float x_v = a.beta * (dot(u_v, n_t, d) - dot(u_v, s_t, d) + a.margin);
    const float* rw = a.row_weights + 4 * i;
    double* terms = a.row_terms + 4 * i;
    terms[0] = rw[0] * (1 - dot(u_t, s_t, d));
    terms[1] = rw[1] * (1 - dot(u_v, s_v, d));
    terms[2] = rw[2] * softplus(x_t) / a.beta;
    terms[3] = rw[3] * softplus(x_v) / a.beta;
    if (!a.grad_text) continue;
    const float uni_t = a.weights[0] * rw[0], cross_t = a.weights[2] * rw[2] * sigmoid(x_t);
    const float uni_v = a.weights[1] * rw[1], cross_v = a.weights[3] * rw[3] * sigmoid(x_v);
    for (int64_t c = 0; c < d; ++c) {
      g_t[c] = cross_t * (n_v[c] - s_v[c]) - uni_t * s_t[c];
      g_v[c] = cross_v * (n_t[c] - s_t[c]) - uni_v * s_v[c];
    }
    project(g_t, u_t, inverse_t, a.grad_text + i * d, d);
    project(g_v, u_v, inverse_v, a.grad_image + i * d, d);
  }
}

}  // namespace saferclip::cpu
