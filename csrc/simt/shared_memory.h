// The shared memory of the blocks that run together: an arena for each, with red zones around every array when
// AddressSanitizer is there.
#pragma once

#include <cstddef>

namespace simt::shared_memory {

constexpr int kMaxBlocks = 8;

// Ranks are places in the cluster.
void enter_cluster(int blocks, size_t dynamic_bytes);
void* dynamic(int rank);
void* find_or_add(int rank, const void* key, size_t bytes);

// Where block `to` has what block `from` has at `memory`; null unless that is in the dynamic part.
void* same_place(const void* memory, int from, int to);

void unpoison(void* memory, size_t bytes);  // for AddressSanitizer: may be used

}  // namespace simt::shared_memory
