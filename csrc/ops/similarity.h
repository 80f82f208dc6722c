// The similarity by its name, for every operator that has one.
#pragma once

#include <string>

#include "../stable.h"
#include "similarity_params.h"

namespace tokenprune {

inline Similarity similarity_of(const std::string& name) {
  if (name == "dot") return Similarity::kDot;
  if (name == "euclidean") return Similarity::kEuclidean;
  STD_TORCH_CHECK(name == "cosine", "similarity must be one of cosine, dot, euclidean, got '", name, "'");
  return Similarity::kCosine;
}

}  // namespace tokenprune
