// ucontext makes the stacks. __builtin_setjmp and __builtin_longjmp switch between them: swapcontext asks the kernel
// for the signal mask every time, and longjmp does as much under AddressSanitizer, which is told about each switch
// anyway.
#include "fiber.h"

#include <ucontext.h>

#include <cstdint>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

void leave_for([[maybe_unused]] void** fake_stack, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
#endif
}

void arrive([[maybe_unused]] void* fake_stack, [[maybe_unused]] const void** stack, [[maybe_unused]] size_t* bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, stack, bytes);
#endif
}

// Apart from its __builtin_setjmp, as the compiler demands; and behind a pointer, because before a call that is known
// not to return the sanitizer clears the whole stack.
__attribute__((no_sanitize("address"))) void long_jump(void** to) { __builtin_longjmp(to, 1); }
void (*volatile jump)(void**) = long_jump;

}  // namespace

Fiber::Fiber(void* stack, size_t bytes) : stack_(stack), bytes_(bytes) {}

void Fiber::resume() {
  void* fake_stack = nullptr;
  leave_for(&fake_stack, stack_, bytes_);
  if (__builtin_setjmp(scheduler_) == 0) {
    if (entered_) jump(here_);
    entered_ = true;
    ucontext_t context, unused;
    getcontext(&context);
    context.uc_stack.ss_sp = stack_;
    context.uc_stack.ss_size = bytes_;
    context.uc_link = nullptr;
    const auto self = reinterpret_cast<uint64_t>(this);  // makecontext passes ints only
    makecontext(&context, reinterpret_cast<void (*)()>(&Fiber::entry), 2, static_cast<unsigned>(self >> 32),
                static_cast<unsigned>(self));
    swapcontext(&unused, &context);
  }
  arrive(fake_stack, nullptr, nullptr);
}

void Fiber::yield() {
  leave_for(&fake_stack_, scheduler_stack_, scheduler_bytes_);
  if (__builtin_setjmp(here_) == 0) jump(scheduler_);
  arrive(fake_stack_, &scheduler_stack_, &scheduler_bytes_);
}

void Fiber::entry(unsigned high, unsigned low) {
  auto* self = reinterpret_cast<Fiber*>(static_cast<uint64_t>(high) << 32 | low);
  arrive(nullptr, &self->scheduler_stack_, &self->scheduler_bytes_);
  self->loop();
}

void Fiber::loop() {
  for (;;) {
    (*body_)();
    body_ = nullptr;
    yield();
  }
}

}  // namespace simt
