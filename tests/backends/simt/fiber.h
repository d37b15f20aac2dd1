// Fibers: a stack and a saved stack pointer. On x86-64 a switch saves what the System V ABI says a
// callee keeps; elsewhere (or with SAFERCLIP_SIMT_UCONTEXT) the slower ucontext does it.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || defined(SAFERCLIP_SIMT_UCONTEXT)
#include <ucontext.h>

#include <memory>
#define SAFERCLIP_SIMT_USE_UCONTEXT 1
#endif

namespace simt {

constexpr size_t kStackBytes = 64 * 1024;

#ifdef SAFERCLIP_SIMT_USE_UCONTEXT

struct Fiber {
  void* stack_pointer = nullptr;  // the ucontext_t
  std::unique_ptr<ucontext_t> context;
  void start(char* stack, void (*entry)()) {
    context = std::make_unique<ucontext_t>();
    getcontext(context.get());
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = kStackBytes;
    makecontext(context.get(), entry, 0);
    stack_pointer = context.get();
  }
};

inline void switch_fiber(void** save, void* load) {
  static ucontext_t scheduler;
  if (!*save) *save = &scheduler;
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(load));
}

#else

extern "C" void saferclip_simt_switch(void** save, void* load);
asm(R"(
.text
.weak saferclip_simt_switch
.type saferclip_simt_switch, @function
saferclip_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size saferclip_simt_switch, .-saferclip_simt_switch
)");

struct Fiber {
  void* stack_pointer = nullptr;
  void start(char* stack, void (*entry)()) {
    auto top = (reinterpret_cast<uintptr_t>(stack) + kStackBytes) & ~uintptr_t(15);
    auto* word = reinterpret_cast<uintptr_t*>(top) - 3;  // entry starts as if called: 8 modulo 16
    word[0] = word[1] = word[2] = 0;
    *--word = reinterpret_cast<uintptr_t>(entry);
    for (int saved = 0; saved < 6; ++saved) *--word = 0;
    stack_pointer = word;
  }
};

inline void switch_fiber(void** save, void* load) { saferclip_simt_switch(save, load); }

#endif

}  // namespace simt
