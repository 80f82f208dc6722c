#include "executor.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "fiber.h"
#include "races.h"
#include "shared_memory.h"

namespace simt {

uint3 thread_index, block_index;
dim3 block_size, grid_size;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kMaxThreads = 1024;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  size_t filled;
  const void* code;
};

enum class State { kReady, kInWarpCall, kAtBarrier, kReturned };

struct Thread {
  State state = State::kReady;
  const char* call = "";
  std::source_location where;
  unsigned mask = 0;
  void* slot = nullptr;
  bool predicate = false;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

// Stacks lie in one mapping, so that the race detector tells them from memory that threads share.
struct Pool {
  char* stacks = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;

  void ensure(int threads) {
    if (!stacks) {
      void* memory = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      stacks = static_cast<char*>(memory);
      races::ignore(stacks, kStackBytes * kMaxThreads);
    }
    while (static_cast<int>(fibers.size()) < threads) {
      fibers.push_back(std::make_unique<Fiber>(stacks + fibers.size() * kStackBytes, kStackBytes));
    }
  }
  // After an error: threads that stopped half-way are forgotten, and their stacks are used again.
  void abandon() {
    fibers.clear();
    if (stacks) shared_memory::unpoison(stacks, kStackBytes * kMaxThreads);
  }
};

Pool pool;
std::string order = "forward";
std::mt19937_64 generator;

std::vector<Thread> threads;
int current = -1;  // the running thread, or -1: the scheduler
int arrived = 0;   // at the block's barrier
std::string error;

template <typename T>
void arrange(std::vector<T>& items) {
  if (order == "reversed") std::reverse(items.begin(), items.end());
  if (order == "random") std::shuffle(items.begin(), items.end(), generator);
}

// All threads of the block, warp by warp; in the random order warps and the lanes inside are shuffled.
std::vector<int> next_round() {
  const int count = static_cast<int>(threads.size());
  std::vector<int> warps((count + kLanes - 1) / kLanes);
  std::iota(warps.begin(), warps.end(), 0);
  arrange(warps);
  std::vector<int> round;
  for (const int warp : warps) {
    std::vector<int> lanes(std::min(kLanes, count - warp * kLanes));
    std::iota(lanes.begin(), lanes.end(), warp * kLanes);
    arrange(lanes);
    round.insert(round.end(), lanes.begin(), lanes.end());
  }
  return round;
}

uint3 index_of(int64_t i, dim3 size) {
  return {static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
          static_cast<unsigned>(i / size.x / size.y)};
}

std::string block_name() {
  std::ostringstream text;
  text << "block (" << block_index.x << ", " << block_index.y << ", " << block_index.z << ")";
  return text.str();
}

std::string activity(const Thread& thread) {
  if (thread.state == State::kReturned) return "returned";
  std::ostringstream text;
  text << "in " << thread.call << " at " << place(thread.where);
  if (thread.state == State::kInWarpCall && thread.mask != kAllLanes) text << ", mask 0x" << std::hex << thread.mask;
  return text.str();
}

// Nobody can go on: which threads wait where.
std::string divergence() {
  std::map<std::string, std::vector<int>> groups;
  for (size_t t = 0; t < threads.size(); ++t) groups[activity(threads[t])].push_back(static_cast<int>(t));
  std::string text = "divergence in " + block_name() + ": ";
  const char* separator = "";
  for (const auto& [what, members] : groups) {
    text += separator + thread_name(members.front());
    if (members.size() > 1) text += " and " + std::to_string(members.size() - 1) + " more";
    text += ": " + what;
    separator = "; ";
  }
  return text;
}

bool has_open_copies(const Thread& thread) {
  return !thread.open.empty() || std::any_of(thread.groups.begin(), thread.groups.end(),
                                             [](const std::vector<Copy>& group) { return !group.empty(); });
}

bool same_call(const Thread& thread, const char* name, const std::source_location& where) {
  const auto same = [](const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; };
  return thread.where.line() == where.line() && same(thread.call, name) &&
         same(thread.where.file_name(), where.file_name());
}

// The running thread has set what it waits for; returns when it may go on.
void wait() {
  const int self = current;
  pool.fibers[self]->yield();
  current = self;
}

void run_block(const std::function<void()>& body) {
  for (Thread& thread : threads) thread = Thread();
  for (size_t t = 0; t < threads.size(); ++t) pool.fibers[t]->start(&body);
  arrived = 0;
  size_t returned = 0;
  while (returned < threads.size()) {
    bool progress = false;
    for (const int t : next_round()) {
      if (threads[t].state != State::kReady) continue;
      progress = true;
      current = t;
      thread_index = index_of(t, block_size);
      races::enter_thread(t);
      pool.fibers[t]->resume();
      current = -1;
      if (error.empty() && !pool.fibers[t]->running_body()) {
        threads[t].state = State::kReturned;
        ++returned;
        if (has_open_copies(threads[t])) {
          error = block_name() + ", " + thread_name(t) + ": returned without waiting for its asynchronous copies";
        }
      }
      if (error.empty()) error = races::report();
      if (!error.empty()) return;
    }
    if (!progress) {
      error = divergence();
      return;
    }
  }
}

}  // namespace

void set_order(const std::string& name, uint64_t seed) {
  if (name != "forward" && name != "reversed" && name != "random") {
    throw std::runtime_error("order must be one of forward, reversed, random, got '" + name + "'");
  }
  order = name;
  generator.seed(seed);
}

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  const int64_t count = static_cast<int64_t>(block.x) * block.y * block.z;
  if (count < 1 || count > kMaxThreads)
    throw std::runtime_error("a block has 1..1024 threads, got " + std::to_string(count));
  pool.ensure(static_cast<int>(count));
  threads.resize(count);
  block_size = block;
  grid_size = grid;
  error.clear();
  races::enter_launch();

  std::vector<int64_t> blocks(static_cast<int64_t>(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), int64_t(0));
  arrange(blocks);
  for (const int64_t b : blocks) {
    block_index = index_of(b, grid);
    races::enter_block(b);
    shared_memory::enter_block(shared_bytes);
    run_block(thread);
    if (!error.empty()) break;
  }
  races::leave_launch();
  if (!error.empty()) {
    pool.abandon();
    throw std::runtime_error("SIMT: " + error);
  }
}

void fail(const std::string& message, const std::source_location& where) {
  error = block_name() + ", " + thread_name(current) + ", at " + place(where) + ": " + message;
  pool.fibers[current]->yield();
  __builtin_unreachable();  // the fiber is abandoned
}

void warp_call(const char* name, unsigned mask, void* slot, Combine combine, bool orders_memory,
               const std::source_location& where) {
  const int first = current / kLanes * kLanes;
  const int self = current - first;
  if (!(mask >> self & 1)) fail(std::string(name) + " is called by a lane that its mask leaves out", where);
  Thread& me = threads[current];
  me.state = State::kInWarpCall;
  me.call = name;
  me.where = where;
  me.mask = mask;
  me.slot = slot;

  void* slots[kLanes] = {};
  bool complete = true;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    const int t = first + l;
    if (t >= static_cast<int>(threads.size())) {
      fail(std::string(name) + " waits for lane " + std::to_string(l) + ", which the block does not have", where);
    }
    const Thread& other = threads[t];
    if (other.state == State::kReturned) {
      fail(std::string(name) + " waits for " + thread_name(t) + ", which has returned", where);
    }
    if (other.state != State::kInWarpCall) {
      complete = false;
      continue;
    }
    if (other.mask != mask || !same_call(other, name, where)) {
      fail("divergence in a warp: " + std::string(name) + " waits for " + thread_name(t) + ", which is " +
               activity(other),
           where);
    }
    slots[l] = other.slot;
  }
  if (!complete) return wait();
  if (combine) combine(slots, mask, where);
  if (orders_memory) races::warp_barrier(first, mask);
  for (int l = 0; l < kLanes; ++l) {
    if (mask >> l & 1) threads[first + l].state = State::kReady;
  }
}

int block_barrier(const char* name, bool predicate, const std::source_location& where) {
  static int holding = 0;
  Thread& me = threads[current];
  for (size_t t = 0; t < threads.size(); ++t) {
    const Thread& other = threads[t];
    if (other.state != State::kAtBarrier) continue;
    if (same_call(other, name, where)) break;  // and so do all others that wait
    fail("divergence: " + std::string(name) + " here, but " + thread_name(static_cast<int>(t)) + " is " +
             activity(other),
         where);
  }
  me.state = State::kAtBarrier;
  me.call = name;
  me.where = where;
  me.predicate = predicate;
  if (++arrived < static_cast<int>(threads.size())) {
    wait();
    return holding;
  }
  arrived = 0;
  holding = 0;
  for (Thread& thread : threads) {
    holding += thread.predicate;
    thread.state = State::kReady;
  }
  races::block_barrier();
  return holding;
}

void* dynamic_shared() { return shared_memory::dynamic(); }
void* static_shared(const void* key, size_t bytes) { return shared_memory::find_or_add(key, bytes); }

void copy_async(void* to, const void* from, size_t bytes, size_t filled, const std::source_location& where) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || (filled > 0 && reinterpret_cast<uintptr_t>(from) % bytes != 0)) {
    fail("an asynchronous copy of " + std::to_string(bytes) + " bytes between addresses that are not aligned to it",
         where);
  }
  const void* code = __builtin_return_address(0);
  threads[current].open.push_back({to, from, bytes, filled, code});
  races::read(from, filled, code);
  races::write(to, bytes, code);  // what others still read there is lost from now on
  std::memset(to, 0xff, bytes);
}

void commit_copies() {
  threads[current].groups.push_back(std::move(threads[current].open));
  threads[current].open.clear();
}

void wait_for_copies(int groups_left) {
  auto& groups = threads[current].groups;
  while (static_cast<int>(groups.size()) > groups_left) {
    for (const Copy& copy : groups.front()) {
      races::write(copy.to, copy.bytes, copy.code);
      std::memcpy(copy.to, copy.from, copy.filled);
      std::memset(static_cast<char*>(copy.to) + copy.filled, 0, copy.bytes - copy.filled);
    }
    groups.pop_front();
  }
}

int lane() { return current % kLanes; }

std::string place(const std::source_location& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

std::string thread_name(int thread) {
  return "thread " + std::to_string(thread) + " (warp " + std::to_string(thread / kLanes) + ", lane " +
         std::to_string(thread % kLanes) + ")";
}

}  // namespace simt
