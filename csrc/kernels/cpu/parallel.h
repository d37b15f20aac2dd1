// How a kernel gets threads: the host lends them, kernels own none.
#pragma once
#include <cstdint>
#include <functional>

namespace saferclip::cpu {

struct Parallel {
  // How many threads the host will use; 1 means `run` is never called.
  int threads = 1;
  // Calls task(i) once for every i in [0, tasks), in any order, and returns when all are done.
  std::function<void(int64_t tasks, const std::function<void(int64_t)>& task)> run;

  void operator()(int64_t tasks, const std::function<void(int64_t)>& task) const {
    if (threads > 1 && tasks > 1) {
      run(tasks, task);
      return;
    }
    for (int64_t i = 0; i < tasks; ++i) task(i);
  }
};

}  // namespace saferclip::cpu
