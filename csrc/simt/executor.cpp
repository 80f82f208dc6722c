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
constexpr int kMaxThreads = 1024;  // of a block

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  size_t filled;
  const void* code;
};

enum class State { kReady, kInWarpCall, kAtBarrier, kAtClusterBarrier, kReturned };

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
  static constexpr size_t kBytes = kStackBytes * kMaxThreads * shared_memory::kMaxBlocks;

  char* stacks = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;

  void ensure(int threads) {
    if (!stacks) {
      void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      stacks = static_cast<char*>(memory);
      races::ignore(stacks, kBytes);
    }
    while (static_cast<int>(fibers.size()) < threads) {
      fibers.push_back(std::make_unique<Fiber>(stacks + fibers.size() * kStackBytes, kStackBytes));
    }
  }
  // After an error: threads that stopped half-way are forgotten, and their stacks are used again.
  void abandon() {
    if (stacks) shared_memory::unpoison(stacks, fibers.size() * kStackBytes);
    fibers.clear();
  }
};

Pool pool;
std::string order = "forward";
std::mt19937_64 generator;

struct Block {
  int arrived = 0;    // threads at its barrier
  int holding = 0;    // predicates that held at the last one
  int returned = 0;   // threads
  bool read = false;  // by another block, since the last barrier of the cluster
};

std::vector<Thread> threads;  // of all blocks of the cluster, one after the other
std::vector<Block> blocks;
int block_threads = 0;
int64_t first_block = 0;
int current = -1;  // the running thread, or -1: the scheduler
int arrived = 0;   // threads at the cluster's barrier
std::string error;

template <typename T>
void arrange(std::vector<T>& items) {
  if (order == "reversed") std::reverse(items.begin(), items.end());
  if (order == "random") std::shuffle(items.begin(), items.end(), generator);
}

int rank_of(int thread) { return thread / block_threads; }

// All threads of the cluster, warp by warp; in the random order warps and the lanes inside are shuffled.
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

void run_cluster(const std::function<void()>& body) {
  for (Thread& thread : threads) thread = Thread();
  for (Block& block : blocks) block = Block();
  for (size_t t = 0; t < threads.size(); ++t) pool.fibers[t]->start(&body);
  arrived = 0;
  size_t returned = 0;
  while (returned < threads.size()) {
    bool progress = false;
    for (const int t : next_round()) {
      if (threads[t].state != State::kReady) continue;
      progress = true;
      current = t;
      thread_index = index_of(t % block_threads, block_size);
      block_index = index_of(first_block + rank_of(t), grid_size);
      races::enter_thread(t);
      pool.fibers[t]->resume();
      current = -1;
      if (error.empty() && !pool.fibers[t]->running_body()) {
        threads[t].state = State::kReturned;
        ++returned;
        ++blocks[rank_of(t)].returned;
        if (blocks[rank_of(t)].read) {
          error = block_name() + ", " + thread_name(t) +
                  ": returned while others may read the block's shared memory, with no cluster_barrier between";
        }
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

void run(dim3 grid, dim3 block, size_t shared_bytes, int cluster, const std::function<void()>& thread) {
  const int64_t count = static_cast<int64_t>(block.x) * block.y * block.z;
  if (count < 1 || count > kMaxThreads)
    throw std::runtime_error("a block has 1..1024 threads, got " + std::to_string(count));
  if (cluster < 1 || grid.x % cluster != 0 || (cluster > 1 && count % kLanes != 0)) {
    throw std::runtime_error("clusters have whole warps and fill the grid along x, got " + std::to_string(cluster) +
                             " blocks of " + std::to_string(count) + " threads in " + std::to_string(grid.x));
  }
  pool.ensure(static_cast<int>(count) * cluster);
  threads.resize(count * cluster);
  blocks.resize(cluster);
  block_threads = static_cast<int>(count);
  block_size = block;
  grid_size = grid;
  error.clear();
  races::enter_launch();

  std::vector<int64_t> clusters(static_cast<int64_t>(grid.x) * grid.y * grid.z / cluster);
  std::iota(clusters.begin(), clusters.end(), int64_t(0));
  arrange(clusters);
  for (const int64_t c : clusters) {
    first_block = c * cluster;
    block_index = index_of(first_block, grid);
    races::enter_cluster(c, cluster, block_threads);
    shared_memory::enter_cluster(cluster, shared_bytes);
    run_cluster(thread);
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
  Thread& me = threads[current];
  Block& block = blocks[rank_of(current)];
  const int begin = rank_of(current) * block_threads, end = begin + block_threads;
  for (int t = begin; t < end; ++t) {
    const Thread& other = threads[t];
    if (other.state != State::kAtBarrier) continue;
    if (same_call(other, name, where)) break;  // and so do all others that wait
    fail("divergence: " + std::string(name) + " here, but " + thread_name(t) + " is " + activity(other), where);
  }
  me.state = State::kAtBarrier;
  me.call = name;
  me.where = where;
  me.predicate = predicate;
  if (++block.arrived < block_threads) {
    wait();
    return block.holding;
  }
  block.arrived = block.holding = 0;
  for (int t = begin; t < end; ++t) {
    block.holding += threads[t].predicate;
    threads[t].state = State::kReady;
  }
  races::block_barrier();
  return block.holding;
}

void cluster_barrier(const char* name, const std::source_location& where) {
  Thread& me = threads[current];
  me.state = State::kAtClusterBarrier;
  me.call = name;
  me.where = where;
  if (++arrived < static_cast<int>(threads.size())) return wait();
  arrived = 0;
  for (Thread& thread : threads) thread.state = State::kReady;
  for (Block& block : blocks) block.read = false;
  races::cluster_barrier();
}

int cluster_rank() { return rank_of(current); }
int cluster_size() { return static_cast<int>(blocks.size()); }

const void* in_cluster(const void* memory, int rank, const std::source_location& where) {
  if (rank < 0 || rank >= cluster_size()) {
    fail("a cluster of " + std::to_string(cluster_size()) + " blocks has none of rank " + std::to_string(rank), where);
  }
  if (blocks[rank].returned > 0) {
    fail("threads of the block of rank " + std::to_string(rank) + " have returned, and its shared memory may be gone",
         where);
  }
  blocks[rank].read |= rank != cluster_rank();
  const void* found = shared_memory::same_place(memory, cluster_rank(), rank);
  if (!found) fail("only the dynamic shared memory of a block is known to the cluster", where);
  return found;
}

void* dynamic_shared() { return shared_memory::dynamic(rank_of(current)); }
void* static_shared(const void* key, size_t bytes) { return shared_memory::find_or_add(rank_of(current), key, bytes); }

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
  thread %= block_threads;
  return "thread " + std::to_string(thread) + " (warp " + std::to_string(thread / kLanes) + ", lane " +
         std::to_string(thread % kLanes) + ")";
}

}  // namespace simt
