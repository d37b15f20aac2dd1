// Limits that hold on every device.
#pragma once

namespace saferclip {

constexpr int kMaxNeighbors = 256;  // of a query; ops/backends.py calls it MAX_NATIVE_K

}  // namespace saferclip
