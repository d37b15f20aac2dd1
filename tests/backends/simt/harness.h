// C entry points that every test library has: buffers, counters, schedule; and the call that turns a
// fault into a message for Python.
#pragma once

#include <cstdio>
#include <exception>

#include "device.cuh"

// Everything else stays hidden: two test libraries in one process must not share the executor's state.
#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void simt_guard(const void* p, int64_t bytes, int writable, int filled, const char* name) {
  simt::guard(p, bytes, writable, filled, name);
}
EXPORT void simt_reset(int reverse, int multiprocessors) {
  simt::forget_buffers();
  simt::counters = {};
  simt::reverse_schedule = reverse;
  saferclip::simulated_multiprocessors = multiprocessors;
}
EXPORT void simt_set_mutant(int mutant) { simt::mutant = mutant; }
EXPORT void simt_counters(int64_t* out) {
  const auto& c = simt::counters;
  const int64_t all[] = {c.load_bytes, c.store_bytes, c.wide_loads, c.narrow_loads, c.mma, c.fma, c.launches};
  for (int64_t x : all) *out++ = x;
}

template <class Call>
int report_faults(char* message, int size, Call call) {
  try {
    return call();
  } catch (const std::exception& e) {
    std::snprintf(message, size, "%s", e.what());
    return -1;
  }
}
