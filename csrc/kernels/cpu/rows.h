// A contiguous row-major matrix in one of the three storage types the kernels read.
#pragma once
#include <cstdint>

namespace saferclip::cpu {

enum class DType : int32_t {
  kFloat = 0,
  kBFloat16 = 1,
  kHalf = 2,
};

inline int64_t element_size(DType dtype) { return dtype == DType::kFloat ? 4 : 2; }

struct Rows {
  const void* data = nullptr;
  DType dtype = DType::kFloat;
  int64_t count = 0;
  int64_t dim = 0;

  const void* row(int64_t i) const {
    return static_cast<const char*>(data) + i * dim * element_size(dtype);
  }
};

}  // namespace saferclip::cpu
