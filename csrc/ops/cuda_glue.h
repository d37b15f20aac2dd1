// What the CUDA ops share: contiguous inputs, dtypes, workspace, and the current stream.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "kernels/dtype.h"
#include "ops/torch_compat.h"

namespace saferclip::cuda_glue {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType kernel_dtype(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": the CUDA kernels take float32, bfloat16 and float16; use backend=\"reference\"");
  }
}

inline void check_device(const char* op, const char* name, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index(), op, ": ", name,
                  " must be on the same CUDA device as the first argument");
}

inline void check_matrix(const char* op, const char* name, const Tensor& x, const Tensor& like, int64_t rows) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == like.size(1), op, ": ", name, " must be [",
                  rows, ", ", like.size(1), "]");
  check_device(op, name, x, like);
}

// The stable ABI hands out the native stream from torch 2.13 on; before that the C shim of libtorch_cuda
// does. It is looked up at run time so that the module also loads under a torch without CUDA.
inline void* current_stream(int32_t device) {
  using Shim = AOTITorchError (*)(int32_t, void**);
  static const Shim shim = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Shim>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(shim, "saferclip_fast: this torch has no libtorch_cuda.so; install a CUDA build of torch");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(shim(device, &stream));
  return stream;
}

inline Tensor workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes > 0 ? bytes : 1}, ScalarType::Byte);
}

// Contiguous, and starting at a 16-byte boundary (a view may not).
inline Tensor aligned(const Tensor& x) {
  const Tensor dense = torch::stable::contiguous(x);
  return reinterpret_cast<uintptr_t>(dense.data_ptr()) % 16 ? torch::stable::clone(dense) : dense;
}

inline void check_queued(const char* op, int error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(static_cast<cudaError_t>(error)),
                  " (this build has kernels for ", SAFERCLIP_CUDA_ARCHITECTURES, ")");
}

// The four results of both losses, of the type the schema promises.
struct LossOutputs {
  Tensor loss, terms, grad_text, grad_image;
  LossOutputs(const Tensor& text, bool need_grad)
      : loss(torch::stable::new_empty(text, {}, ScalarType::Float)),
        terms(torch::stable::new_empty(text, {4}, ScalarType::Float)),
        grad_text(torch::stable::new_empty(text, {need_grad ? text.size(0) : 0, text.size(1)})),
        grad_image(torch::stable::new_empty(text, {need_grad ? text.size(0) : 0, text.size(1)})) {}
  std::tuple<Tensor, Tensor, Tensor, Tensor> result() const { return {loss, terms, grad_text, grad_image}; }
  std::tuple<Tensor, Tensor, Tensor, Tensor> zero() const {
    torch::stable::zero_(const_cast<Tensor&>(loss));
    torch::stable::zero_(const_cast<Tensor&>(terms));
    return result();
  }
};

}  // namespace saferclip::cuda_glue
