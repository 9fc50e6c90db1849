// Copies of an operator's small arrays for the exchange, and of its results to them, on any device.
#pragma once

#include <mxnet/operator.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "adapter/cuda_library.h"
#include "adapter/operator_device.h"
#include "adapter/operator_util.h"
#include "kernels/batch_norm_math.h"

namespace gluon_syncbn {

// Calls done(values, error) with a float32 or float64 array as float64: on the CPU before it
// returns, on a GPU from another thread when they have arrived.  `error` is empty, or says why
// there are no values.
template <typename Done>
void ReadValues(const mxnet::Context& context, const mxnet::TBlob& from, const Done& done) {
  if (OnGpu(context)) {
    ReadValues(context.dev_id, ToDataType(from.type_flag_), from.dptr_, from.Size(), done);
  } else if (from.type_flag_ == mshadow::kFloat64) {
    const double* values = from.dptr<double>();
    done(std::vector<double>(values, values + from.Size()), std::string());
  } else {
    const float* values = from.dptr<float>();
    done(std::vector<double>(values, values + from.Size()), std::string());
  }
}

template <typename T>
void WriteTyped(WriteMode mode, const std::vector<double>& from, T* to) {
  for (std::size_t i = 0; i < from.size(); ++i) Store(mode, to + i, from[i]);
}

// Writes `from` to a float32 or float64 array.  On a GPU call it from one of the device's workers,
// because `run` must have a stream.
inline void WriteValues(const mxnet::RunContext& run, const std::vector<double>& from,
                        mxnet::OpReqType req, const mxnet::TBlob& to) {
  const WriteMode mode = ToWriteMode(req);
  if (mode == WriteMode::kSkip) return;
  if (OnGpu(run.ctx)) {
    WriteValues(ToGpu(run), ToDataType(to.type_flag_), mode, from, to.dptr_);
  } else if (to.type_flag_ == mshadow::kFloat64) {
    WriteTyped(mode, from, to.dptr<double>());
  } else {
    WriteTyped(mode, from, to.dptr<float>());
  }
}

}  // namespace gluon_syncbn
