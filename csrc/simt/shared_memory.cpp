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

alignas(4096) unsigned char arena[kArenaBytes];
size_t used = kArenaBytes;  // by the last block
void* dynamic_base = nullptr;
std::map<const void*, void*> arrays;

void poison([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(memory, bytes);
#endif
}

void* add(size_t bytes) {
  const size_t begin = (used + kRedZone + kAlignment - 1) / kAlignment * kAlignment;
  if (begin + bytes + kRedZone > kArenaBytes) throw std::runtime_error("the block's shared memory is above 1 MiB");
  used = begin + bytes;
  unpoison(arena + begin, bytes);
  return arena + begin;
}

}  // namespace

void unpoison([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(memory, bytes);
#endif
}

void enter_block(size_t dynamic_bytes) {
  unpoison(arena, used);
  std::memset(arena, 0xff, used);
  poison(arena, used);
  races::forget(arena, kArenaBytes);
  used = 0;
  arrays.clear();
  dynamic_base = add(dynamic_bytes);
}

void* dynamic() { return dynamic_base; }

void* find_or_add(const void* key, size_t bytes) {
  const auto found = arrays.find(key);
  if (found != arrays.end()) return found->second;
  return arrays[key] = add(bytes);
}

}  // namespace simt::shared_memory
