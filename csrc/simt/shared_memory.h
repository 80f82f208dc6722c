// The shared memory of the running block: one arena, with red zones around every array when AddressSanitizer is there.
#pragma once

#include <cstddef>

namespace simt::shared_memory {

void enter_block(size_t dynamic_bytes);
void* dynamic();
void* find_or_add(const void* key, size_t bytes);

void unpoison(void* memory, size_t bytes);  // for AddressSanitizer: may be used

}  // namespace simt::shared_memory
