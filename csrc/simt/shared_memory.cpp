#include "shared_memory.h"

#include <cstring>
#include <map>
#include <stdexcept>

#include "races.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace simt::shared_memory {
namespace {

constexpr size_t kArenaBytes = 1024 * 1024;
constexpr size_t kAlignment = 128;
constexpr size_t kRedZone = 1024;

alignas(4096) unsigned char arenas[kMaxBlocks][kArenaBytes];

struct Block {
  size_t used = kArenaBytes;  // by the last one of this rank
  unsigned char* dynamic = nullptr;
  size_t dynamic_bytes = 0;
  std::map<const void*, void*> arrays;
};
Block blocks[kMaxBlocks];

void poison([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(memory, bytes);
#endif
}

unsigned char* add(int rank, size_t bytes) {
  const size_t begin = (blocks[rank].used + kRedZone + kAlignment - 1) / kAlignment * kAlignment;
  if (begin + bytes + kRedZone > kArenaBytes) throw std::runtime_error("the block's shared memory is above 1 MiB");
  blocks[rank].used = begin + bytes;
  unpoison(arenas[rank] + begin, bytes);
  return arenas[rank] + begin;
}

}  // namespace

void unpoison([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(memory, bytes);
#endif
}

void enter_cluster(int count, size_t dynamic_bytes) {
  if (count > kMaxBlocks) throw std::runtime_error("a cluster has at most 8 blocks");
  for (int rank = 0; rank < count; ++rank) {
    Block& block = blocks[rank];
    unpoison(arenas[rank], block.used);
    std::memset(arenas[rank], 0xff, block.used);
    poison(arenas[rank], block.used);
    races::forget(arenas[rank], kArenaBytes);
    block.used = 0;
    block.arrays.clear();
    block.dynamic = add(rank, dynamic_bytes);
    block.dynamic_bytes = dynamic_bytes;
  }
}

void* dynamic(int rank) { return blocks[rank].dynamic; }

void* find_or_add(int rank, const void* key, size_t bytes) {
  std::map<const void*, void*>& arrays = blocks[rank].arrays;
  const auto found = arrays.find(key);
  if (found != arrays.end()) return found->second;
  return arrays[key] = add(rank, bytes);
}

void* same_place(const void* memory, int from, int to) {
  const auto offset = static_cast<size_t>(static_cast<const unsigned char*>(memory) - blocks[from].dynamic);
  return offset < blocks[from].dynamic_bytes ? blocks[to].dynamic + offset : nullptr;
}

}  // namespace simt::shared_memory
