// Finds accesses that no barrier orders. The kernels of the build `races` are compiled with -fsanitize=thread, whose
// calls for every load and store end here instead of in its own run time: two threads race when one of them writes,
// they touch the same two bytes, and no __syncthreads (in the block) or __syncwarp (in the warp) stands between;
// threads of different blocks are never ordered. The result does not depend on the order in which the threads ran. In
// the other builds nothing is recorded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace simt::races {

void ignore(const void* begin, size_t bytes);  // the threads' own stacks
void forget(const void* begin, size_t bytes);  // memory that starts anew

void enter_launch();
void leave_launch();
void enter_block(int64_t block);
void enter_thread(int thread);
void block_barrier();
void warp_barrier(int first_thread, unsigned mask);

// Accesses that the compiler does not report; `code` is an address in the function that makes them.
void read(const void* memory, size_t bytes, const void* code);
void write(const void* memory, size_t bytes, const void* code);
void atomic(const void* memory, size_t bytes, const void* code);

// The first race found in this launch, or nothing.
std::string report();

}  // namespace simt::races
