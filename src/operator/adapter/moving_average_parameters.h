// The parameters that both operators of moving average batch normalization have.
#pragma once

#include <dmlc/parameter.h>

#include "adapter/operator_util.h"
#include "kernels/moving_average_kernels.h"
#include "kernels/moving_average_math.h"

namespace gluon_syncbn {

// To be expanded in the declaration of a dmlc::Parameter with these two fields.
#define GLUON_SYNCBN_DECLARE_MOVING_AVERAGES()                                            \
  DMLC_DECLARE_FIELD(buffer_size)                                                         \
      .set_default(1)                                                                     \
      .set_range(1, static_cast<int>(kMaxIterations) + 1)                                 \
      .describe("Averages are over so many iterations, and buffers have so many slots."); \
  DMLC_DECLARE_FIELD(warmup_iters)                                                        \
      .set_default(100)                                                                   \
      .set_range(0, static_cast<int>(kMaxIterations) + 1)                                 \
      .describe("In so many iterations there are no averages yet.")

template <typename Param>
MovingAverages ToMovingAverages(const Param& param) {
  return {static_cast<std::size_t>(param.buffer_size),
          static_cast<std::size_t>(param.warmup_iters)};
}

// The shape of a buffer.
inline mxnet::TShape BufferShape(int buffer_size, nnvm::dim_t channels) {
  return mxnet::TShape({static_cast<nnvm::dim_t>(buffer_size), channels});
}

constexpr int kMovingAverageAxis = 1;

}  // namespace gluon_syncbn
