// Picks the table of kernels for this CPU. The one file in isa/ that is compiled once.
#include "kernels/cpu/kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace saferclip::cpu {
namespace {

bool cpu_runs(const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx512vnni") return cpu_runs("avx512") && __builtin_cpu_supports("avx512vnni");
  if (name == "avx512") {
    return cpu_runs("avx2") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
  }
  if (name == "avx2") {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  }
#endif
  return name == "generic";
}

const Kernels* const kTables[] = {
#if defined(__x86_64__)
    &kKernelsAvx512Vnni, &kKernelsAvx512, &kKernelsAvx2,
#endif
    &kKernelsGeneric};

}  // namespace

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
  for (const Kernels* table : kTables) {
    if (cpu_runs(table->name)) usable.push_back(table);
  }
  return usable;
}

const Kernels& kernels() {
  const char* wanted = std::getenv("SAFERCLIP_FAST_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    static const Kernels* const best = usable_kernels().front();
    return *best;
  }
  for (const Kernels* table : kTables) {
    if (wanted != std::string(table->name)) continue;
    if (cpu_runs(wanted)) return *table;
    throw std::runtime_error("SAFERCLIP_FAST_ISA=" + std::string(wanted) +
                             " names an instruction set that this CPU does not have");
  }
  throw std::runtime_error("SAFERCLIP_FAST_ISA=" + std::string(wanted) +
                           " is unknown; use generic, avx2, avx512 or avx512vnni");
}

}  // namespace saferclip::cpu
