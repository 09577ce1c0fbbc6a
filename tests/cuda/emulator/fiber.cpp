#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>

namespace mla::emulator {
namespace {

constexpr size_t kPageBytes = 4096;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kPitchBytes = kStackBytes + kPageBytes;

// Stacks lie a power of two apart, more or less: without a stagger, the hot ends of all of them
// would share a few sets of the first cache.
size_t stagger_bytes(int index) { return static_cast<size_t>(index % 32) * 192; }

}  // namespace

Stacks::Stacks() {
  void* memory = mmap(nullptr, kPitchBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<std::byte*>(memory);
  for (int i = 0; i < kMaxThreads; ++i) {
    (void)mprotect(base_ + static_cast<size_t>(i) * kPitchBytes, kPageBytes, PROT_NONE);
  }
}

Stacks::~Stacks() { (void)munmap(base_, kPitchBytes * kMaxThreads); }

}  // namespace mla::emulator

#ifdef __x86_64__
// Six registers are the callee's to keep; all others are dead at a call.
asm(R"(
.text
.globl mla_emulator_switch
.hidden mla_emulator_switch
.type mla_emulator_switch, @function
mla_emulator_switch:
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
.size mla_emulator_switch, . - mla_emulator_switch
)");
extern "C" void mla_emulator_switch(void** from, void* to);

namespace mla::emulator {

void switch_context(Context* from, Context to) { mla_emulator_switch(from, to); }

Context Stacks::prepare(int index, void (*entry)()) {
  std::byte* top = base_ + static_cast<size_t>(index + 1) * kPitchBytes - stagger_bytes(index);
  // Six registers, the entry as the address to return to, and an empty return address for it: at a
  // function's first instruction the stack stands 8 bytes off a multiple of 16.
  auto* frame = reinterpret_cast<uintptr_t*>(top) - 8;
  std::memset(frame, 0, 8 * sizeof *frame);
  frame[6] = reinterpret_cast<uintptr_t>(entry);
  return frame;
}

}  // namespace mla::emulator

#else
#include <ucontext.h>

#include <deque>

namespace mla::emulator {
namespace {

// One for each stack, and for the threads that launch; contexts point at them.
thread_local std::deque<ucontext_t> contexts(kMaxThreads + 1);

}  // namespace

void switch_context(Context* from, Context to) {
  if (*from == nullptr) *from = &contexts[kMaxThreads];
  swapcontext(static_cast<ucontext_t*>(*from), static_cast<ucontext_t*>(to));
}

Context Stacks::prepare(int index, void (*entry)()) {
  ucontext_t& context = contexts[static_cast<size_t>(index)];
  getcontext(&context);
  context.uc_stack.ss_sp = base_ + static_cast<size_t>(index) * kPitchBytes + kPageBytes;
  context.uc_stack.ss_size = kStackBytes - stagger_bytes(index);
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
  return &context;
}

}  // namespace mla::emulator
#endif
