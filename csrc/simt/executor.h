// Runs a CUDA grid on the host: block by block, each thread a fiber, warps in a chosen order. Synchronising calls
// yield; between two of them a thread runs alone. What a GPU may leave undefined is an error here, with block, thread
// and line.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

namespace simt {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Where the running thread is. Only the executor writes them.
extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;

// In which order the threads that may run do run: ascending, descending, or shuffled anew in every round.
void set_order(const std::string& order, uint64_t seed);

// Runs `thread` for every thread of the grid, in clusters of so many blocks, side by side along x, that run together.
// Throws std::runtime_error when the kernel does what it must not.
void run(dim3 grid, dim3 block, size_t shared_bytes, int cluster, const std::function<void()>& thread);

// The running thread reports an error: the launch ends with it. For calls from device code.
[[noreturn]] void fail(const std::string& message, const std::source_location& where);

// A call that all lanes of `mask` make together. Each brings its `slot`; when the last has come, `combine` turns the
// slots of the warp into the results, and all go on. `orders_memory`: what a lane wrote before, the others see after.
using Combine = void (*)(void* const slots[kLanes], unsigned mask, const std::source_location& where);
void warp_call(const char* name, unsigned mask, void* slot, Combine combine, bool orders_memory,
               const std::source_location& where);

// A barrier of the whole block; returns how many threads brought a predicate that holds.
int block_barrier(const char* name, bool predicate, const std::source_location& where);

// A barrier of all blocks of the cluster.
void cluster_barrier(const char* name, const std::source_location& where);

// The running block's place in its cluster, and how many blocks that has.
int cluster_rank();
int cluster_size();

// Where the block of this rank has what the running block has at `memory`, in its shared memory.
const void* in_cluster(const void* memory, int rank, const std::source_location& where);

// Shared memory of the running block. It is filled with 0xff, NaN in every floating type, when the block starts.
// `key` tells one declaration from another.
void* dynamic_shared();
void* static_shared(const void* key, size_t bytes);

// An asynchronous copy to shared memory by the running thread: done by the wait of its group, not before.
void copy_async(void* to, const void* from, size_t bytes, size_t filled, const std::source_location& where);
void commit_copies();
void wait_for_copies(int groups_left);

int lane();
std::string place(const std::source_location& where);
std::string thread_name(int thread);

}  // namespace simt
