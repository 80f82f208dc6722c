// Recording of launches: what _C_cuda, which launches kernels, tells _native, which has no kernels. Plain C++.
#pragma once

#include <cstdint>
#include <vector>

namespace tokenprune {

// One launch, and what the current device makes of it; shared memory in bytes of a block. The host build of the kernels
// does not know registers, static_shared and blocks_per_sm: they are 0 there.
struct Launch {
  const char* kernel;  // mangled
  unsigned grid[3];
  int threads;    // of a block
  int registers;  // of a thread
  int64_t static_shared;
  int64_t dynamic_shared;
  int blocks_per_sm;
  int num_sms;
};

struct LaunchRecord {
  std::vector<Launch> launches;
  bool execute = true;  // false: kernels are recorded and not run
};

}  // namespace tokenprune

// From now on the launches of this thread go to `record`; null: to nobody. Returns where they went before.
extern "C" tokenprune::LaunchRecord* tokenprune_record_launches(tokenprune::LaunchRecord* record);
