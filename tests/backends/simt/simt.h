// A SIMT executor: runs CUDA kernels as host C++, one fiber per thread of a block, and reports what
// a GPU would not: shared- and global-memory races, accesses out of bounds, reads of memory nobody
// wrote, divergent barriers, wrong warp masks, and cp.async data used before its wait.
// Blocks run one after the other; within a block fibers switch only at barriers and warp operations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "fiber.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {

constexpr int kWarp = 32;
constexpr size_t kGranule = 2;  // bytes one race-detector cell stands for; narrower stores are faults

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] void fault(const std::string& what);  // adds block and thread, then throws Fault

// ---- What the kernels did: the counts that the roofline table is checked against.
struct Counters {
  int64_t load_bytes = 0, store_bytes = 0;      // global memory, as the kernel asked for it
  int64_t wide_loads = 0, narrow_loads = 0;     // 16-byte accesses (cp.async included), and the rest
  int64_t mma = 0, fma = 0;                     // multiply-adds, on tensor cores and in fp32
  int64_t launches = 0;
};
inline Counters counters;

// ---- Memory regions and the race detector.
struct Access {  // who touched a granule last, and when
  int64_t launch = -1;
  int block = -1, thread = -1;
  uint32_t block_epoch = 0, warp_epoch = 0;
};
// Accesses of one kind that need not be ordered among themselves: the last one, and how far they spread since.
struct Accesses {
  Access last;
  enum Spread {
    kOne,
    kWarp,
    kBlock,
    kGrid,
  } spread = kOne;
};
struct Cell {
  Access write;  // plain store, or the wait for a cp.async; an atomic leaves it as it is
  Accesses reads, atomics;
  bool pending = false;                               // a cp.async into it has not been waited for
  bool filled = false;
};
struct Region {
  std::byte* base = nullptr;
  size_t size = 0;
  bool writable = false, shared = false;
  std::string name;
  std::vector<Cell> cells;
};
inline std::map<const std::byte*, std::shared_ptr<Region>> regions;  // global memory, by address

// Guards [p, p + size). `filled`: the bytes hold data; otherwise a read before a write is a fault.
inline void guard(const void* p, size_t size, bool writable, bool filled, std::string name) {
  auto region = std::make_shared<Region>();
  region->base = static_cast<std::byte*>(const_cast<void*>(p));
  region->size = size, region->writable = writable, region->name = std::move(name);
  if (writable) region->cells.resize((size + kGranule - 1) / kGranule);
  for (Cell& cell : region->cells) cell.filled = filled;
  regions[region->base] = region;
}
inline void forget_buffers() { regions.clear(); }

inline Region* find_region(const void* p) {
  auto it = regions.upper_bound(static_cast<const std::byte*>(p));
  if (it == regions.begin()) fault("pointer into no guarded buffer");
  Region* region = std::prev(it)->second.get();
  if (static_cast<const std::byte*>(p) > region->base + region->size) {
    fault("pointer into no guarded buffer (nearest: " + region->name + ")");
  }
  return region;
}

// ---- Threads, warps, blocks.
struct Copy {  // one cp.async under way
  std::byte* to;
  Region* to_region;
  const std::byte* from;
  size_t valid;
};
struct Thread {
  dim3 index;
  int linear = 0;
  Fiber fiber;
  bool done = false;
  const char* waits_for = nullptr;  // nullptr: may run
  std::deque<std::vector<Copy>> groups{1};  // committed cp.async groups; the last one is still open
};
struct Arrival {
  const char* op = nullptr;
  unsigned mask = 0;
  void* data = nullptr;
};
struct Warp {
  Arrival lane[kWarp];
  uint32_t epoch = 0;
};
struct Block {
  dim3 index;
  int linear = 0, arrived = 0, exited = 0;
  uint32_t epoch = 0, barrier_line = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Region shared;
  std::string failure;
};
inline dim3 grid_dim, block_dim;
inline Block* block = nullptr;
inline Thread* self = nullptr;
inline void* scheduler_stack = nullptr;
inline bool reverse_schedule = false;
inline int mutant = -1;  // which planted fault is on (tests/backends/cuda/test_mutants.py); -1: none

inline int lane_id() { return self->linear % kWarp; }
inline Warp& warp() { return block->warps[self->linear / kWarp]; }

[[noreturn]] inline void fault(const std::string& what) {
  if (!block || !self) throw Fault(what);
  throw Fault(what + " (block " + std::to_string(block->linear) + ", thread " +
              std::to_string(self->linear) + ")");
}

inline void block_until_released(const char* what) {
  self->waits_for = what;
  while (self->waits_for) switch_fiber(&self->fiber.stack_pointer, scheduler_stack);
}

inline Access now() { return {counters.launches, block->linear, self->linear, block->epoch, warp().epoch}; }

// Whether something orders the earlier access before the one the current thread makes now.
inline bool ordered(const Access& before) {
  if (before.launch != counters.launches) return true;
  if (before.block != block->linear) return false;
  if (before.thread == self->linear || before.block_epoch != block->epoch) return true;
  return before.thread / kWarp == self->linear / kWarp && before.warp_epoch != warp().epoch;
}

inline void check_bounds(const Region& r, const std::byte* p, size_t size, const char* verb) {
  if (p < r.base || p + size > r.base + r.size) {
    fault(std::string("out-of-bounds ") + verb + " of " + r.name + " at byte " +
          std::to_string(p - r.base) + " of " + std::to_string(r.size));
  }
  if (reinterpret_cast<uintptr_t>(p) % (size > 16 ? 16 : size) != 0) {
    fault(std::string("misaligned ") + verb + " of " + r.name);
  }
}

inline void race(const Region& r, const std::byte* p, const char* kind, const Access& other) {
  fault(std::string(kind) + " race on " + r.name + " byte " + std::to_string(p - r.base) +
        " with block " + std::to_string(other.block) + " thread " + std::to_string(other.thread));
}

inline void add_access(Accesses& all) {
  const Access& last = all.last;
  const bool same_block = last.block == block->linear;
  if (last.launch != counters.launches || (same_block && last.block_epoch != block->epoch)) {
    all.spread = Accesses::kOne;  // a barrier or a launch orders the earlier ones
  } else if (!same_block || all.spread == Accesses::kGrid) {
    all.spread = Accesses::kGrid;
  } else if (last.thread / kWarp != self->linear / kWarp || all.spread == Accesses::kBlock) {
    all.spread = Accesses::kBlock;
  } else if (last.thread != self->linear || all.spread == Accesses::kWarp) {
    all.spread = Accesses::kWarp;
  }
  all.last = now();
}
// Whether something orders all of them before the access the current thread makes now.
inline bool ordered(const Accesses& all) {
  const Access& last = all.last;
  if (last.launch != counters.launches) return true;
  if (!ordered(last) || all.spread == Accesses::kGrid) return false;
  const bool same_epoch = last.block_epoch == block->epoch;
  if (all.spread == Accesses::kBlock && same_epoch) return false;
  return !(all.spread == Accesses::kWarp && same_epoch && last.warp_epoch == warp().epoch);
}

// Calls use(cell) for every cell of [p, p + size).
template <class Use>
void each_cell(Region& r, const std::byte* p, size_t size, Use use) {
  for (size_t i = (p - r.base) / kGranule; i * kGranule < size_t(p - r.base) + size; ++i) use(r.cells[i]);
}

inline void check_read(const Region& r, const std::byte* p, const Cell& cell) {
  if (cell.pending) fault("read of " + r.name + " before the wait for its cp.async");
  if (!cell.filled) fault("read of " + r.name + " that nobody wrote");
  if (!ordered(cell.write)) race(r, p, "read-after-write", cell.write);
}
inline void check_write(const Region& r, const std::byte* p, const Cell& cell) {
  if (cell.pending) fault("write to " + r.name + " while a cp.async into it is under way");
  if (!ordered(cell.write)) race(r, p, "write-after-write", cell.write);
  if (!ordered(cell.reads)) race(r, p, "write-after-read", cell.reads.last);
}

inline void note_read(Region& r, const std::byte* p, size_t size) {
  check_bounds(r, p, size, "read");
  if (r.cells.empty()) return;
  each_cell(r, p, size, [&](Cell& cell) {
    check_read(r, p, cell);
    if (!ordered(cell.atomics)) race(r, p, "read-after-atomic", cell.atomics.last);
    add_access(cell.reads);
  });
}

inline void check_writable(const Region& r, const std::byte* p, size_t size) {
  check_bounds(r, p, size, "write");
  if (!r.writable) fault("write to read-only " + r.name);
  if (size < kGranule) fault("store narrower than a race-detector cell to " + r.name);
}
inline void note_write(Region& r, const std::byte* p, size_t size) {
  check_writable(r, p, size);
  each_cell(r, p, size, [&](Cell& cell) {
    check_write(r, p, cell);
    if (!ordered(cell.atomics)) race(r, p, "write-after-atomic", cell.atomics.last);
    cell.write = now();
    cell.filled = true;
  });
}
// A read and a write that other atomics need not be ordered with.
inline void note_atomic(Region& r, const std::byte* p, size_t size) {
  check_writable(r, p, size);
  each_cell(r, p, size, [&](Cell& cell) {
    check_read(r, p, cell);
    check_write(r, p, cell);
    add_access(cell.atomics);
  });
}

// ---- Pointers that check. On the device the same names are plain T*.
template <class T>
class Ref {
 public:
  using Value = std::remove_const_t<T>;
  Ref(T* p, Region* r) : p_(p), r_(r) {}
  operator Value() const {
    note_read(*r_, bytes(), sizeof(T));
    if (!r_->shared) {
      counters.load_bytes += sizeof(T);
      ++(sizeof(T) == 16 ? counters.wide_loads : counters.narrow_loads);
    }
    return *p_;
  }
  const Ref& operator=(const Value& v) const {
    note_write(*r_, bytes(), sizeof(T));
    if (!r_->shared) counters.store_bytes += sizeof(T);
    *const_cast<Value*>(p_) = v;
    return *this;
  }
  const Ref& operator=(const Ref& other) const { return *this = static_cast<Value>(other); }
  const Ref& operator+=(const Value& v) const { return *this = static_cast<Value>(*this) + v; }

 private:
  const std::byte* bytes() const { return reinterpret_cast<const std::byte*>(p_); }
  T* p_;
  Region* r_;
};

template <class T>
class Ptr {
 public:
  Ptr() = default;
  Ptr(std::nullptr_t) {}
  Ptr(T* p) : p_(p), region_(p ? find_region(p) : nullptr) {}
  Ptr(T* p, Region* r) : p_(p), region_(r) {}
  operator Ptr<const T>() const
    requires(!std::is_const_v<T>)
  {
    return {p_, region_};
  }
  explicit operator bool() const { return p_ != nullptr; }
  Ref<T> operator[](int64_t i) const { return {p_ + i, region()}; }
  Ref<T> operator*() const { return (*this)[0]; }
  Ptr operator+(int64_t i) const { return {p_ + i, region_}; }
  T* raw() const { return p_; }
  Region* region() const {
    if (!region_) fault("access through a null pointer");
    return region_;
  }
  template <class U>
  Ptr<U> as() const {
    return {reinterpret_cast<U*>(p_), region_};
  }

 private:
  T* p_ = nullptr;
  Region* region_ = nullptr;
};

// ---- Barriers and warp rendezvous.
inline constexpr char kBarrier[] = "__syncthreads";

inline void barrier(std::source_location site) {
  if (block->exited) fault("divergent barrier: a thread of the block has exited");
  if (block->arrived && block->barrier_line != site.line()) {
    fault("divergent barrier: others wait at line " + std::to_string(block->barrier_line) +
          ", this thread at line " + std::to_string(site.line()));
  }
  block->barrier_line = site.line();
  if (++block->arrived < int(block->threads.size())) return block_until_released(kBarrier);
  block->arrived = 0;
  ++block->epoch;
  for (Thread& t : block->threads) t.waits_for = nullptr;
}

// All lanes of `mask` meet; the last to arrive runs `execute(lanes)`, lanes[i] = lane i's data or null.
template <class Data, class Execute>
void rendezvous(const char* op, unsigned mask, Data& mine, Execute execute) {
  Warp& w = warp();
  const int lane = lane_id(), first = self->linear - lane;
  if (!(mask >> lane & 1)) fault(std::string(op) + ": the calling lane is not in its own mask");
  w.lane[lane] = {op, mask, &mine};
  bool all = true;
  for (int i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    if (first + i >= int(block->threads.size()) || block->threads[first + i].done) {
      fault(std::string(op) + ": the mask names lane " + std::to_string(i) + ", which has exited");
    }
    const Arrival& a = w.lane[i];
    if (!a.op) {
      all = false;
    } else if (std::string_view(a.op) != op || a.mask != mask) {
      fault(std::string(op) + ": lane " + std::to_string(i) + " is in " + a.op + " with another mask");
    }
  }
  if (!all) return block_until_released(op);
  Data* lanes[kWarp] = {};
  for (int i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) lanes[i] = static_cast<Data*>(w.lane[i].data);
  }
  execute(lanes);
  for (int i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) w.lane[i] = {}, block->threads[first + i].waits_for = nullptr;
  }
}

// ---- cp.async: nothing arrives before the wait that covers it.
inline void copy_async(Ptr<std::byte> to, Ptr<const std::byte> from, size_t size, size_t valid) {
  note_write(*to.region(), to.raw(), size);
  if (valid) check_bounds(*from.region(), from.raw(), valid, "cp.async read");
  for (size_t i = 0; i < size; i += kGranule) {
    to.region()->cells[(to.raw() - to.region()->base + i) / kGranule].pending = true;
  }
  counters.load_bytes += valid;
  if (valid == 16) ++counters.wide_loads;
  self->groups.back().push_back({to.raw(), to.region(), from.raw(), valid});
}
inline void commit_copies() { self->groups.emplace_back(); }
inline void wait_copies(size_t still_allowed) {
  while (self->groups.size() > still_allowed + 1) {
    for (const Copy& c : self->groups.front()) {
      for (size_t i = 0; i < 16; i += kGranule) {
        Cell& cell = c.to_region->cells[(c.to - c.to_region->base + i) / kGranule];
        cell.pending = false;
        cell.write = now();
      }
      std::memset(c.to, 0, 16);
      std::memcpy(c.to, c.from, c.valid);
    }
    self->groups.pop_front();
  }
}

// ---- Running a block, and a launch.
inline std::function<void()> kernel_call;

inline void thread_main() {
  try {
    kernel_call();
    if (self->groups.size() > 1 || !self->groups.back().empty()) {
      for (const auto& g : self->groups) {
        if (!g.empty()) fault("thread exits with a cp.async under way");
      }
    }
  } catch (const std::exception& e) {
    if (block->failure.empty()) block->failure = e.what();
  }
  self->done = true;
  ++block->exited;
  for (;;) switch_fiber(&self->fiber.stack_pointer, scheduler_stack);
}

inline std::string describe_deadlock() {
  std::string text = "deadlock:";
  std::map<std::string, int> waiting;
  for (const Thread& t : block->threads) {
    if (!t.done) ++waiting[t.waits_for ? t.waits_for : "?"];
  }
  for (const auto& [what, n] : waiting) text += " " + std::to_string(n) + " threads at " + what + ";";
  return text + " " + std::to_string(block->exited) + " exited (divergent barrier or warp operation)";
}

inline void run_block(dim3 index, int linear, size_t shared_bytes) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  static std::vector<std::byte> shared_storage(256 * 1024 + 16);
  Block b;
  const int n = block_dim.x * block_dim.y * block_dim.z;
  b.index = index, b.linear = linear;
  b.threads.resize(n);
  b.warps.resize((n + kWarp - 1) / kWarp);
  void* aligned = shared_storage.data();
  size_t space = shared_storage.size();
  std::align(16, shared_bytes, aligned, space);
  b.shared.base = static_cast<std::byte*>(aligned), b.shared.size = shared_bytes;
  b.shared.writable = b.shared.shared = true, b.shared.name = "shared memory";
  b.shared.cells.resize((shared_bytes + kGranule - 1) / kGranule);
  std::memset(aligned, 0xff, shared_bytes);
  while (int(stacks.size()) < n) stacks.push_back(std::make_unique_for_overwrite<char[]>(kStackBytes));
  for (int i = 0; i < n; ++i) {
    Thread& t = b.threads[i];
    t.linear = i;
    t.index = dim3(i % block_dim.x, i / block_dim.x % block_dim.y, i / (block_dim.x * block_dim.y));
    t.fiber.start(stacks[i].get(), thread_main);
  }
  block = &b;
  while (b.exited < n && b.failure.empty()) {
    bool progress = false;
    for (int i = 0; i < n && b.failure.empty(); ++i) {
      Thread& t = b.threads[reverse_schedule ? n - 1 - i : i];
      if (t.done || t.waits_for) continue;
      self = &t;
      switch_fiber(&scheduler_stack, t.fiber.stack_pointer);
      progress = true;
    }
    self = nullptr;
    if (!progress && b.failure.empty()) b.failure = describe_deadlock();
  }
  block = nullptr, self = nullptr;
  if (!b.failure.empty()) throw Fault(b.failure);
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 threads, size_t shared_bytes, A... args) {
  std::tuple<std::remove_cv_t<P>...> params(static_cast<P>(args)...);
  grid_dim = grid, block_dim = threads;
  ++counters.launches;
  kernel_call = [&] { std::apply(kernel, params); };
  int linear = 0;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) run_block(dim3(x, y, z), linear++, shared_bytes);
    }
  }
}

}  // namespace simt
