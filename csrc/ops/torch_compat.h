// Names of torch's stable ABI that changed between the versions this module builds with (2.10 on).
#pragma once
#include <torch/csrc/stable/library.h>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name from torch 2.13 on
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif
