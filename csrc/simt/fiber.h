// A context that runs on its own stack until it yields. One CUDA thread is one fiber.
#pragma once

#include <cstddef>
#include <functional>

namespace simt {

class Fiber {
 public:
  // `stack` has to outlive the fiber. `body` runs at every start().
  Fiber(void* stack, size_t bytes);
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void start(const std::function<void()>* body) { body_ = body; }
  void resume();  // from the scheduler: runs until the fiber yields, or its body returns
  void yield();   // from the fiber: back to resume()
  bool running_body() const { return body_ != nullptr; }

 private:
  static void entry(unsigned high, unsigned low);
  void loop();

  void* stack_;
  size_t bytes_;
  const std::function<void()>* body_ = nullptr;
  bool entered_ = false;
  void* here_[5];  // for __builtin_setjmp
  void* scheduler_[5];
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_bytes_ = 0;
  void* fake_stack_ = nullptr;
};

}  // namespace simt
