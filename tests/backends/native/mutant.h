// Which fault is switched on; included before everything by tests/backends/native/mutants.py.
#pragma once
#ifdef __cplusplus
#include <cstdlib>
namespace saferclip {
inline const int mutant = std::getenv("SAFERCLIP_MUTANT") ? std::atoi(std::getenv("SAFERCLIP_MUTANT")) : -1;
}
#endif
