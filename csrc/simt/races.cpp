#include "races.h"

#include "executor.h"

#ifndef TOKENPRUNE_SIMT_RACES

namespace simt::races {
void ignore(const void*, size_t) {}
void forget(const void*, size_t) {}
void enter_launch() {}
void leave_launch() {}
void enter_cluster(int64_t, int, int) {}
void enter_thread(int) {}
void cluster_barrier() {}
void block_barrier() {}
void warp_barrier(int, unsigned) {}
void read(const void*, size_t, const void*) {}
void write(const void*, size_t, const void*) {}
void atomic(const void*, size_t, const void*) {}
std::string report() { return {}; }
}  // namespace simt::races

#else

#include <array>
#include <cstdio>
#include <memory>
#include <unordered_map>
#include <vector>

#include "symbols.h"

namespace simt::races {
namespace {

enum class Kind : uint8_t { kNone, kRead, kWrite, kAtomic };

struct Access {
  uintptr_t code = 0;  // return address of the hook: where in the kernel
  uint32_t cluster = 0;
  uint32_t cluster_epoch = 0;  // barriers the cluster had passed
  uint32_t epoch = 0;          // barriers the block had passed
  uint32_t clock = 0;          // __syncwarps the thread had passed
  int16_t thread = 0;
  Kind kind = Kind::kNone;
};

// Two bytes of memory, the smallest numbers that kernels use: threads that write the two bytes apart would be taken for
// a race.
struct Cell {
  Access write;
  Access reads[2];  // of two different threads, where two have read
};

constexpr uintptr_t kCellBytes = 2;
constexpr uintptr_t kPageBytes = 2048;
using Page = std::array<Cell, kPageBytes / kCellBytes>;

// A thread's own clock, and how much of the clock of each lane of its warp it has seen.
struct Clocks {
  uint32_t own = 1;
  std::array<uint32_t, kLanes> seen{};
};

bool active = false;
uintptr_t ignored_begin = 0, ignored_end = 0;
std::unordered_map<uintptr_t, std::unique_ptr<Page> > pages;
bool pages_changed = false;  // some were removed
std::vector<Clocks> clocks;
uint32_t cluster = 0, cluster_epoch = 0;
int cluster_blocks = 1, block_threads = 1;
int thread = 0;
std::vector<uint32_t> epochs;  // of every block

uint32_t& epoch() { return epochs[thread / block_threads]; }
std::string found;

Cell& cell_of(uintptr_t at) {
  static uintptr_t last = 0;
  static Page* page = nullptr;
  if (!page || at / kPageBytes != last || pages_changed) {
    std::unique_ptr<Page>& entry = pages[at / kPageBytes];
    if (!entry) entry = std::make_unique<Page>();
    page = entry.get();
    last = at / kPageBytes;
    pages_changed = false;
  }
  return (*page)[at % kPageBytes / kCellBytes];
}

bool ordered(const Access& before) {
  if (before.kind == Kind::kNone) return true;
  if (before.cluster != cluster) return false;
  if (before.thread == thread || before.cluster_epoch < cluster_epoch) return true;
  if (before.thread / block_threads != thread / block_threads) return false;
  if (before.epoch < epoch()) return true;
  if (before.thread / kLanes != thread / kLanes) return false;
  return clocks[thread].seen[before.thread % kLanes] >= before.clock;
}

// "file:line" of an address; of the caller when it is inside an intrinsic of ours.
std::string source_of(uintptr_t code) {
  std::string place = "an unknown place";
  for (const std::string& line : addr2line("-Cpfsi", reinterpret_cast<void*>(code - 1))) {
    const size_t at = line.rfind(" at ");
    if (at == std::string::npos) break;
    place = line.substr(at + 4, line.find(' ', at + 4) - at - 4);
    if (place.rfind("device.h:", 0) != 0 && place.rfind("matrix.h:", 0) != 0) break;
  }
  return place;
}

std::string describe(const Access& access) {
  const char* kind = access.kind == Kind::kRead ? " reads" : access.kind == Kind::kWrite ? " writes" : " updates";
  const int64_t block = static_cast<int64_t>(access.cluster) * cluster_blocks + access.thread / block_threads;
  return "block " + std::to_string(block) + " " + thread_name(access.thread) + kind + " at " + source_of(access.code);
}

void conflict(const Access& before, const Access& now, const void* memory) {
  if (!found.empty()) return;
  char address[32];
  std::snprintf(address, sizeof address, "%p", memory);
  found = "race at address " + std::string(address) + ": " + describe(before) + "; " + describe(now) +
          "; no barrier between";
}

void check(const void* memory, size_t bytes, Kind kind, uintptr_t code) {
  if (!active) return;
  auto at = reinterpret_cast<uintptr_t>(memory);
  if (at >= ignored_begin && at < ignored_end) return;
  Access now;
  now.cluster = cluster;
  now.cluster_epoch = cluster_epoch;
  now.code = code;
  now.epoch = epoch();
  now.clock = clocks[thread].own;
  now.thread = static_cast<int16_t>(thread);
  now.kind = kind;
  for (const uintptr_t end = at + bytes; at < end; at += kCellBytes) {
    Cell& cell = cell_of(at);
    const bool both_atomic = kind == Kind::kAtomic && cell.write.kind == Kind::kAtomic;
    if (!both_atomic && !ordered(cell.write)) conflict(cell.write, now, memory);
    if (kind == Kind::kRead) {
      cell.reads[ordered(cell.reads[0]) ? 0 : 1] = now;
      continue;
    }
    for (const Access& read : cell.reads) {
      if (!ordered(read)) conflict(read, now, memory);
    }
    cell.write = now;
  }
}

}  // namespace

void ignore(const void* begin, size_t bytes) {
  ignored_begin = reinterpret_cast<uintptr_t>(begin);
  ignored_end = ignored_begin + bytes;
}
void forget(const void* begin, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(begin);
  for (uintptr_t page = first / kPageBytes; page <= (first + bytes) / kPageBytes; ++page) pages.erase(page);
  pages_changed = true;
}

void enter_launch() {
  pages.clear();
  pages_changed = true;
  found.clear();
}
void leave_launch() { active = false; }
void enter_cluster(int64_t number, int blocks, int threads) {
  cluster = static_cast<uint32_t>(number);
  cluster_epoch = 0;
  cluster_blocks = blocks;
  block_threads = threads;
  epochs.assign(blocks, 0);
  clocks.assign(static_cast<size_t>(blocks) * threads + kLanes, Clocks());
}
void enter_thread(int number) {
  thread = number;
  active = true;
}
void cluster_barrier() { ++cluster_epoch; }
void block_barrier() { ++epoch(); }
void warp_barrier(int first_thread, unsigned mask) {
  for (int l = 0; l < kLanes; ++l) {
    for (int m = 0; m < kLanes; ++m) {
      if (mask >> l & mask >> m & 1) clocks[first_thread + l].seen[m] = clocks[first_thread + m].own;
    }
  }
  for (int l = 0; l < kLanes; ++l) clocks[first_thread + l].own += mask >> l & 1;
}

void read(const void* memory, size_t bytes, const void* code) {
  check(memory, bytes, Kind::kRead, reinterpret_cast<uintptr_t>(code));
}
void write(const void* memory, size_t bytes, const void* code) {
  check(memory, bytes, Kind::kWrite, reinterpret_cast<uintptr_t>(code));
}
void atomic(const void* memory, size_t bytes, const void* code) {
  check(memory, bytes, Kind::kAtomic, reinterpret_cast<uintptr_t>(code));
}

std::string report() {
  active = false;
  return std::move(found);
}

}  // namespace simt::races

// What -fsanitize=thread calls.
#define HOOK __attribute__((visibility("default"))) void
#define CODE reinterpret_cast<uintptr_t>(__builtin_return_address(0))  // just behind the access
#define ACCESS(SIZE)                                                                                         \
  HOOK __tsan_read##SIZE(void* p) { simt::races::check(p, SIZE, simt::races::Kind::kRead, CODE); }           \
  HOOK __tsan_write##SIZE(void* p) { simt::races::check(p, SIZE, simt::races::Kind::kWrite, CODE); }         \
  HOOK __tsan_unaligned_read##SIZE(void* p) { simt::races::check(p, SIZE, simt::races::Kind::kRead, CODE); } \
  HOOK __tsan_unaligned_write##SIZE(void* p) { simt::races::check(p, SIZE, simt::races::Kind::kWrite, CODE); }
extern "C" {
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
HOOK __tsan_read_range(void* p, size_t n) { simt::races::check(p, n, simt::races::Kind::kRead, CODE); }
HOOK __tsan_write_range(void* p, size_t n) { simt::races::check(p, n, simt::races::Kind::kWrite, CODE); }
// std::shared_ptr's counter in the operators' host code; kernels call atomicAdd and the like.
__attribute__((visibility("default"))) int __tsan_atomic32_fetch_add(volatile int* p, int value, int) {
  return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);
}
HOOK __tsan_vptr_update(void**, void*) {}
HOOK __tsan_vptr_read(void**) {}
HOOK __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}
HOOK __tsan_init() {}
}

#endif
