#include "neighbor_hinge.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"

namespace saferclip::cpu {
namespace {

const double kRoot2 = std::sqrt(2.0);

// The hinge is linear in x where it is open, so one sum of the open rows gives its value and its gradient.
double hinge_row(const HingeArgs& args, int64_t i, double* wide, float* unit, float* slope) {
  const Kernels& kernel = kernels();
  const int64_t dim = args.x.dim;
  const int64_t* indices = args.indices + i * args.found;
  const float* scores = args.scores + i * args.found;
  const double square = kernel.widen(args.x.row(i), args.x.dtype, dim, wide);
  const double inverse = square > 0 ? 1 / std::sqrt(square) : 0;
  for (int64_t j = 0; j < dim; ++j) unit[j] = static_cast<float>(wide[j] * inverse);
  std::fill_n(slope, dim + 1, 0.0f);
  int64_t open = 0;
  for (int64_t j = 0; j < args.found; ++j) {
    if (!(2 * double{scores[j]} + args.margin > 0)) continue;
    kernel.accumulate(args.rows.row(indices[j]), args.rows.dtype, dim + 1, slope);  // the last is minus the limits
    ++open;
  }
  const double share = kRoot2 / static_cast<double>(args.k);
  void* grad = args.grad == nullptr ? nullptr : static_cast<char*>(args.grad) + i * dim * element_size(args.x.dtype);
  const double along = kernel.preservation_row(unit, slope, nullptr, nullptr,
                                               static_cast<float>(share * args.row_weights[i]), 0.0f,
                                               static_cast<float>(inverse), dim, args.x.dtype, grad);
  return share * (along + slope[dim]) + args.margin * static_cast<double>(open) / static_cast<double>(args.k);
}

}  // namespace

double neighbor_hinge(const HingeArgs& args, const Parallel& parallel) {
  constexpr int64_t kBlock = 32;  // rows summed together; fixed, so that the order of sums is
  const int64_t blocks = (args.x.rows + kBlock - 1) / kBlock;
  std::vector<double> partial(blocks);
  parallel(blocks, [&](int64_t b) {
    std::vector<double> wide(args.x.dim);
    std::vector<float> unit(args.x.dim), slope(args.rows.dim);
    for (int64_t i = b * kBlock; i < std::min(args.x.rows, (b + 1) * kBlock); ++i) {
      const double value = hinge_row(args, i, wide.data(), unit.data(), slope.data());
      args.values[i] = static_cast<float>(value);
      partial[b] += args.row_weights[i] * value;
    }
  });
  double total = 0;
  for (const double part : partial) total += part;
  return total;
}

}  // namespace saferclip::cpu
