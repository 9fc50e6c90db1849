// Small arrays of an operator on their way to the exchange and back, whatever their device.
#pragma once

#include <mxnet/operator.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "adapter/cuda_library.h"
#include "adapter/operator_device.h"
#include "adapter/operator_util.h"

namespace gluon_syncbn {

// Calls done(values, error): now on the CPU, when they have come on a GPU.  `error` is empty, or
// says why there are no values.
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
void WriteTyped(mxnet::OpReqType req, const std::vector<double>& from, T* to) {
  const bool add = req == mxnet::kAddTo;
  for (std::size_t i = 0; i < from.size(); ++i) {
    to[i] = static_cast<T>(add ? to[i] + from[i] : from[i]);
  }
}

// On a GPU from one of its workers only: `run` must have a stream.
inline void WriteValues(const mxnet::RunContext& run, const std::vector<double>& from,
                        mxnet::OpReqType req, const mxnet::TBlob& to) {
  if (req == mxnet::kNullOp) return;
  if (OnGpu(run.ctx)) {
    WriteValues(ToGpu(run), ToDataType(to.type_flag_), ToRequest(req), from, to.dptr_);
  } else if (to.type_flag_ == mshadow::kFloat64) {
    WriteTyped(req, from, to.dptr<double>());
  } else {
    WriteTyped(req, from, to.dptr<float>());
  }
}

}  // namespace gluon_syncbn
