// The average over all batches so far, in the place of a moving one: PyTorch's momentum=None.
#pragma once

#include "batch_norm_kernels.h"

#ifdef __CUDACC__
#define GLUON_SYNCBN_HOST_DEVICE __host__ __device__
#else
#define GLUON_SYNCBN_HOST_DEVICE
#endif

namespace gluon_syncbn {

// How much the moving statistics keep of what they were.  `W` is the type of the parameters.
template <typename W>
GLUON_SYNCBN_HOST_DEVICE double Momentum(const NormalizeForward& k) {
  if (k.batches == nullptr) return k.momentum;
  const double before = *static_cast<const W*>(k.batches);
  return before / (before + 1);
}

// After all channels have taken their Momentum.  In float32 the number stays at 2^24, where one
// batch more or less no longer changes the average.
template <typename W>
GLUON_SYNCBN_HOST_DEVICE void CountBatch(const NormalizeForward& k) {
  if (k.batches != nullptr) *static_cast<W*>(k.batches) += 1;
}

}  // namespace gluon_syncbn
