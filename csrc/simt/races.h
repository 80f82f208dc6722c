// Finds accesses that no barrier orders. The kernels of the build `races` are compiled with -fsanitize=thread, whose
// calls for every load and store end here instead of in its own run time: two threads race when one of them writes,
// they touch the same two bytes, and no __syncthreads (in the block), __syncwarp (in the warp) or barrier of the
// cluster stands between; threads of different clusters are never ordered. The result does not depend on the order in
// which the threads ran. In the other builds nothing is recorded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace simt::races {

void ignore(const void* begin, size_t bytes);  // the threads' own stacks
void forget(const void* begin, size_t bytes);  // memory that starts anew

void enter_launch();
void leave_launch();
void enter_cluster(int64_t cluster, int blocks, int block_threads);
void enter_thread(int thread);  // threads are numbered through the blocks of the cluster
void cluster_barrier();
void block_barrier();  // of the block of the thread that entered last
void warp_barrier(int first_thread, unsigned mask);

// Accesses that the compiler does not report; `code` is an address in the function that makes them.
void read(const void* memory, size_t bytes, const void* code);
void write(const void* memory, size_t bytes, const void* code);
void atomic(const void* memory, size_t bytes, const void* code);

// The first race found in this launch, or nothing.
std::string report();

}  // namespace simt::races
