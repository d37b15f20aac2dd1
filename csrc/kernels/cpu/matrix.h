// A contiguous row-major matrix in one of the three storage types the kernels read.
#pragma once
#include <cstdint>

#include "kernels/dtype.h"

namespace saferclip::cpu {

struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t dim = 0;

  const void* row(int64_t i) const {
    return static_cast<const char*>(data) + i * dim * element_size(dtype);
  }
};

}  // namespace saferclip::cpu
