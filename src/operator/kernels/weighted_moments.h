// Moments of elements that do not all count the same: for masked and padded batches.
//
// Each position (an index of the map without its channel) has a weight w, so that
//
//   n      = sum(w),  mean = sum(w * x) / n,  M2 = sum(w * (x - mean)^2)
//   dx     = gamma * invstd * g + w * (b * (x - mean) + c)
//
// with b and c as in batch_norm_kernels.h, where the sums over g have no weights: every position is
// normalized, whatever its weight, and counts in the loss as the loss says.  Weights that are not
// above 0 are 0, and what has a weight of 0 may be infinite or not a number without spoiling them.
#pragma once

#include "kernels/batch_norm_kernels.h"

namespace gluon_syncbn {

// Of the parameters' type: one for each position, [outer][inner], or one for each sample.
struct PositionWeights {
  const void* values = nullptr;
  std::size_t outer_per_sample = 0;  // 0: one for each position
};

// As Run without weights; the map is not in blocks of channels.
void RunWeighted(Cpu, const MomentsForwardParams& params, const PositionWeights& weights);
void RunWeighted(Cpu, const MomentsBackwardParams& params, const PositionWeights& weights);
void RunWeighted(const Gpu&, const MomentsForwardParams& params, const PositionWeights& weights);
void RunWeighted(const Gpu&, const MomentsBackwardParams& params, const PositionWeights& weights);

}  // namespace gluon_syncbn
