#pragma once

namespace tokenprune {

enum class HeadReduce { kMean, kMax, kSum };

}  // namespace tokenprune
