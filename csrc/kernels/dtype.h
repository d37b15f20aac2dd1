// The storage types that the kernels read, whatever the device.
#pragma once
#include <cstdint>

namespace saferclip {

enum class DType : int32_t {
  kFloat32,
  kBFloat16,
  kFloat16,
};

constexpr int element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace saferclip
