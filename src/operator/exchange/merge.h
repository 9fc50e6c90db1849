// How two contributions to a round of the exchange are merged.
//
// These are pure functions of two vectors.  The exchange applies them to all contributions in the
// order of the participants; an exchange between processes could do the same.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels/batch_norm_math.h"

namespace gluon_syncbn {

enum class Merge {
  kSum,      // elementwise
  kMoments,  // the statistics of batch_norm_kernels.h: means, M2s and a count
};

// Merges `from` into `*into`.  They have the same size; for moments, 2 * channels + 1.
inline void MergeInto(Merge merge, const std::vector<double>& from, std::vector<double>* into) {
  std::vector<double>& to = *into;
  if (merge == Merge::kSum) {
    for (std::size_t i = 0; i < to.size(); ++i) to[i] += from[i];
    return;
  }
  const std::size_t channels = to.size() / 2;
  for (std::size_t c = 0; c < channels; ++c) {
    const Moments merged =
        Merged({to.back(), to[c], to[channels + c]}, {from.back(), from[c], from[channels + c]});
    to[c] = merged.mean;
    to[channels + c] = merged.m2;
  }
  to.back() += from.back();
}

}  // namespace gluon_syncbn
