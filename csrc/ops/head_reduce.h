// The reduction over heads by its name, for every operator that has one.
#pragma once

#include <string>

#include "../stable.h"
#include "head_reduce_params.h"

namespace tokenprune {

inline HeadReduce head_reduce_of(const std::string& name) {
  if (name == "max") return HeadReduce::kMax;
  if (name == "sum") return HeadReduce::kSum;
  STD_TORCH_CHECK(name == "mean", "head_reduce must be one of mean, max, sum, got '", name, "'");
  return HeadReduce::kMean;
}

}  // namespace tokenprune
