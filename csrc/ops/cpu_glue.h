// What the CPU op files share: views of torch tensors for the kernels, and torch's threads.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>

#include "kernels/cpu/matrix.h"
#include "kernels/cpu/parallel.h"
#include "ops/torch_compat.h"

namespace saferclip {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_kernel_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline DType kernel_dtype(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16 on the cpu backend");
}

inline Tensor dense(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

inline Tensor dense(const Tensor& x, ScalarType dtype) {
  return dense(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
}

// x must be a contiguous CPU matrix and outlive the view.
inline cpu::Matrix matrix_of(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, name, " must have shape [rows, d], got ", x.dim(), " dimensions");
  return {x.const_data_ptr(), kernel_dtype(name, x), x.size(0), x.size(1)};
}

// An uninitialized, contiguous CPU tensor, without torch's dispatcher, which takes longer than a small search.
template <std::size_t N>
Tensor new_tensor(ScalarType dtype, const std::array<int64_t, N>& sizes) {
  std::array<int64_t, N> strides{};
  int64_t stride = 1;
  for (std::size_t i = N; i-- > 0; stride *= sizes[i]) strides[i] = stride;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      N, sizes.data(), strides.data(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline void check_shape(const char* name, const Tensor& x, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == columns, name,
                  " must have shape [", rows, ", ", columns, "]");
}

// torch's threads for a job of `work` multiply-adds; small jobs stay on the caller's thread.
inline cpu::Parallel threads_for(int64_t work) {
  constexpr int64_t kWorthThreads = 1 << 18;  // about 10 us of one core
  if (work < kWorthThreads) return {};
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t tasks, const std::function<void(int64_t)>& task) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(i);
            });
          }};
}

}  // namespace saferclip
