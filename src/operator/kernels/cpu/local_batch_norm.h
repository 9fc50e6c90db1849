// What local_batch_norm.cc needs of batch_norm_kernels.cc besides the four kernels.
#pragma once

#include "kernels/batch_norm_kernels.h"

namespace gluon_syncbn {

// The whole backward pass where forward used the moving statistics: the sums for gamma and beta and
// dx = gamma * invstd * dy, in one pass over the data.  `params.statistics` must be null.
void BackwardByMovingStatistics(const LocalBackwardParams& params);

}  // namespace gluon_syncbn
