#include "retarget_loss.h"

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace saferclip::cpu {

void retarget_loss(const RetargetArgs& args, double terms[4], const Parallel& parallel) {
  constexpr int64_t kBlock = 32;  // rows summed together; fixed, so that the order of sums is
  const int64_t blocks = (args.batch + kBlock - 1) / kBlock;
  std::vector<double> partial(4 * blocks);
  const Kernels& kernel = kernels();
  const int64_t tasks = std::min<int64_t>(blocks, 4 * parallel.threads);
  parallel(tasks, [&](int64_t task) {
    std::vector<float> scratch(kRetargetScratchRows * (args.dim + 16));
    for (int64_t b = task * blocks / tasks; b < (task + 1) * blocks / tasks; ++b) {
      kernel.retarget_rows(args, b * kBlock, std::min(args.batch, (b + 1) * kBlock), &partial[4 * b],
                           scratch.data());
    }
  });
  for (int j = 0; j < 4; ++j) {
    terms[j] = 0;
    for (int64_t b = 0; b < blocks; ++b) terms[j] += partial[4 * b + j];
  }
}

}  // namespace saferclip::cpu
