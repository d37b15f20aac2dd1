// Uninitialized scratch memory aligned to a cache line.
#pragma once
#include <cstdint>
#include <memory>
#include <new>

namespace saferclip::cpu {

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};

template <class T>
using Buffer = std::unique_ptr<T[], AlignedDelete>;

template <class T>
Buffer<T> make_buffer(int64_t count) {
  return Buffer<T>(static_cast<T*>(
      ::operator new(static_cast<std::size_t>(count) * sizeof(T), std::align_val_t{64})));
}

}  // namespace saferclip::cpu
