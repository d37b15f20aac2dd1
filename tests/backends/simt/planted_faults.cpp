// Small kernels with one planted fault each, and their sound twins, for test_executor.py.
#include <string>

#include "harness.h"

using namespace saferclip;

namespace {

// Sums 64 numbers over two warps through shared memory.
void sum_kernel(Global<const float> in, Global<float> out, bool barrier) {
  Shared<float> partial = as<float>(dynamic_shared());
  const int t = threadIdx.x;
  partial[t] = 0.0f;
  __syncthreads();
  partial[t] = static_cast<float>(in[t]);
  if (barrier) __syncthreads();
  if (t != 0) return;
  float sum = 0;
  for (int i = 0; i < int(blockDim.x); ++i) sum += partial[i];
  out[0] = sum;
}

// Overwrites a cell that another thread of the phase has read.
void write_after_read_kernel(Global<float> out, bool barrier) {
  Shared<float> cell = as<float>(dynamic_shared());
  const int t = threadIdx.x;
  cell[t] = float(t);
  __syncthreads();
  const float neighbor = cell[(t + 1) % blockDim.x];
  if (barrier) __syncthreads();
  cell[t] = neighbor;
  __syncthreads();
  out[t] = static_cast<float>(cell[t]);
}

// Lanes of one warp exchange through shared memory.
void warp_exchange_kernel(Global<float> out, bool sync) {
  Shared<float> cell = as<float>(dynamic_shared());
  const int t = threadIdx.x;
  cell[t] = 0.0f;
  __syncwarp();
  cell[t] = float(t);
  if (sync) __syncwarp();
  out[t] = static_cast<float>(cell[t ^ 1]);
}

void shift_kernel(Global<const float> in, Global<float> out, int from, int to) {
  out[threadIdx.x + to] = static_cast<float>(in[threadIdx.x + from]);
}

void shared_bounds_kernel(Global<float> out, int shift) {
  Shared<float> cell = as<float>(dynamic_shared());
  cell[threadIdx.x + shift] = 1.0f;
  out[threadIdx.x] = 1.0f;
}

void half_barrier_kernel() {
  if (threadIdx.x < 32) __syncthreads();
}
void two_barriers_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
void barrier_against_shuffle_kernel() {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __shfl_xor_sync(kFullMask, 1, 1);
  }
}

void shuffle_kernel(Global<int> out, unsigned mask, int active, int step) {
  const int t = threadIdx.x;
  if (t >= active) return;
  out[t] = __shfl_xor_sync(mask, t, step);
}
void two_masks_kernel(Global<int> out) {
  const int t = threadIdx.x;
  out[t] = static_cast<int>(__ballot_sync(t < 16 ? kFullMask : 0xfffffff0u, true));
}

void copy_kernel(Global<const uint8_t> in, Global<float> out, int waits, bool barrier) {
  const Shared<uint8_t> shared = dynamic_shared();
  const int t = threadIdx.x;
  cp_async16(shared + t * 16, in + t * 16, true);
  cp_async_commit();
  if (waits == 0) cp_async_wait<0>();
  if (waits == 1) cp_async_wait<1>();
  if (barrier) __syncthreads();
  out[t] = static_cast<float>(as<float>(shared)[(t ^ 1) * 4]);
}

void unwritten_kernel(Global<float> out) { out[0] = static_cast<float>(as<float>(dynamic_shared())[0]); }
void misaligned_kernel(Global<const uint8_t> in, Global<float> out) {
  const Vec16 v = as<const Vec16>(in + 8)[0];
  out[0] = __uint_as_float(v.word[0]);
}
void blocks_kernel(Global<float> out, bool same) { out[same ? 0 : int(blockIdx.x)] = 1.0f; }
void count_kernel(Global<int> out) {
  Shared<int> n = as<int>(dynamic_shared());
  if (threadIdx.x == 0) n[0] = 0;
  __syncthreads();
  atomicAdd(n, 1);
  __syncthreads();
  if (threadIdx.x == 0) out[0] = static_cast<int>(n[0]);
}
// Nothing orders what thread 1 does plainly and what threads of another warp add.
void atomic_kernel(int unordered) {
  Shared<int> n = as<int>(dynamic_shared());
  const int t = threadIdx.x;
  if (t == 1) n[0] = 0;
  if (unordered == 1) {  // the store's own thread adds first
    if (t == 1) atomicAdd(n, 1);
    __syncwarp();
    if (t >= 32) atomicAdd(n, 1);
  } else if (unordered == 2) {  // the thread that read adds at once
    __syncthreads();
    if (t == 1) atomicAdd(n, n[0]);
    __syncwarp();
    if (t >= 32) atomicAdd(n, 1);
  } else {  // the thread that adds last stores
    __syncthreads();
    atomicAdd(n, 1);
    n[0] = 1;
  }
}

}  // namespace

// Runs one case by name on `in` (64 floats, guarded, read-only) and `out` (64 floats).
EXPORT int run_case(const char* name, float* in, float* out, char* message, int size) {
  return report_faults(message, size, [&]() -> int {
    const std::string which = name;
    int* ints = reinterpret_cast<int*>(out);
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(in);
    auto run = [&](auto kernel, int blocks, int threads, auto... args) {
      return launch(nullptr, kernel, dim3(blocks), threads, 1024, args...);
    };
    if (which == "sum") return run(sum_kernel, 1, 64, in, out, true);
    if (which == "sum without barrier") return run(sum_kernel, 1, 64, in, out, false);
    if (which == "write after read") return run(write_after_read_kernel, 1, 64, out, true);
    if (which == "write after read without barrier") return run(write_after_read_kernel, 1, 64, out, false);
    if (which == "warp exchange") return run(warp_exchange_kernel, 1, 32, out, true);
    if (which == "warp exchange without sync") return run(warp_exchange_kernel, 1, 32, out, false);
    if (which == "copy") return run(shift_kernel, 1, 64, in, out, 0, 0);
    if (which == "read past the end") return run(shift_kernel, 1, 64, in, out, 1, 0);
    if (which == "read before the start") return run(shift_kernel, 1, 64, in, out, -1, 0);
    if (which == "write past the end") return run(shift_kernel, 1, 64, in, out, 0, 1);
    if (which == "write to an input") return run(shift_kernel, 1, 64, in, in, 0, 0);
    if (which == "shared") return run(shared_bounds_kernel, 1, 64, out, 192);
    if (which == "shared past the end") return run(shared_bounds_kernel, 1, 64, out, 193);
    if (which == "half a barrier") return run(half_barrier_kernel, 1, 64);
    if (which == "two barriers") return run(two_barriers_kernel, 1, 64);
    if (which == "barrier against shuffle") return run(barrier_against_shuffle_kernel, 1, 32);
    if (which == "shuffle") return run(shuffle_kernel, 1, 32, ints, kFullMask, 32, 5);
    if (which == "shuffle in half a warp") return run(shuffle_kernel, 1, 32, ints, 0xffffu, 16, 5);
    if (which == "mask without the caller") return run(shuffle_kernel, 1, 32, ints, 0xffffu, 32, 1);
    if (which == "mask with exited lanes") return run(shuffle_kernel, 1, 32, ints, kFullMask, 16, 1);
    if (which == "source outside the mask") return run(shuffle_kernel, 1, 32, ints, 0xffffu, 16, 16);
    if (which == "two masks") return run(two_masks_kernel, 1, 32, ints);
    if (which == "async copy") return run(copy_kernel, 1, 16, bytes, out, 0, true);
    if (which == "async copy without wait") return run(copy_kernel, 1, 16, bytes, out, 2, true);
    if (which == "async copy with one group left") return run(copy_kernel, 1, 16, bytes, out, 1, true);
    if (which == "async copy without barrier") return run(copy_kernel, 1, 16, bytes, out, 0, false);
    if (which == "unwritten shared memory") return run(unwritten_kernel, 1, 1, out);
    if (which == "unwritten output") return run(shift_kernel, 1, 1, out, out, 0, 1);
    if (which == "misaligned") return run(misaligned_kernel, 1, 1, bytes, out);
    if (which == "blocks") return run(blocks_kernel, 2, 1, out, false);
    if (which == "blocks at one address") return run(blocks_kernel, 2, 1, out, true);
    if (which == "atomic count") return run(count_kernel, 1, 64, ints);
    if (which == "atomic after its own thread's store") return run(atomic_kernel, 1, 64, 1);
    if (which == "atomic after its own thread's read") return run(atomic_kernel, 1, 64, 2);
    if (which == "store after atomics") return run(atomic_kernel, 1, 64, 3);
    throw std::invalid_argument("no such case: " + which);
  });
}
