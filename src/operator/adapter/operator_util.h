// What the operators share on MXNet's side: types, shapes and requests in our terms.
//
// MXNet's wheels are built by GCC 4.8.5.  What may cross to it, and what may not
// (std::unordered_map, a std::function with arguments), stands in docs/architecture.md.
#pragma once

#include <dmlc/logging.h>
#include <dmlc/parameter.h>
#include <mxnet/base.h>
#include <mxnet/c_api.h>
#include <mxnet/op_attr_types.h>

#include <sstream>
#include <string>

#include "kernels/batch_norm_kernels.h"

namespace gluon_syncbn {

// Throws the error that Python shows as MXNetError.
template <typename... Parts>
[[noreturn]] void Raise(const Parts&... parts) {
  std::ostringstream os;
  (os << ... << parts);
  throw dmlc::Error(os.str());
}

inline DataType ToDataType(int type_flag) {
  switch (type_flag) {
    case mshadow::kFloat16:
      return DataType::kFloat16;
    case mshadow::kFloat32:
      return DataType::kFloat32;
    case mshadow::kFloat64:
      return DataType::kFloat64;
    default:
      Raise(
          "SyncBatchNorm takes float16, float32 or float64 data; convert the input first, for "
          "example with x.astype('float32').");
  }
}

// float16 data have float32 parameters, as in MXNet's BatchNorm.
inline int ParameterType(int data_type_flag) {
  return ToDataType(data_type_flag) == DataType::kFloat64 ? mshadow::kFloat64 : mshadow::kFloat32;
}

inline WriteMode ToWriteMode(mxnet::OpReqType request) {
  if (request == mxnet::kNullOp) return WriteMode::kSkip;
  return request == mxnet::kAddTo ? WriteMode::kAdd : WriteMode::kWrite;
}

// The channel axis as an index from 0; throws when it is out of range.
inline int ChannelAxis(int axis, int ndim) {
  if (ndim < 2) {
    Raise("SyncBatchNorm takes an input of 2 or more dimensions, (batch, channels, ...), but got ",
          ndim, "; add an axis, for example with x.expand_dims(0).");
  }
  if (axis < -ndim || axis >= ndim) {
    Raise("SyncBatchNorm: axis=", axis, " is out of range for an input of ", ndim,
          " dimensions; it must lie from ", -ndim, " to ", ndim - 1, ".");
  }
  return axis < 0 ? axis + ndim : axis;
}

inline FeatureShape ToFeatureShape(const mxnet::TShape& shape, int axis) {
  const int channel_axis = ChannelAxis(axis, shape.ndim());
  FeatureShape s{1, static_cast<std::size_t>(shape[channel_axis]), 1};
  for (int i = 0; i < channel_axis; ++i) s.outer *= static_cast<std::size_t>(shape[i]);
  for (int i = channel_axis + 1; i < shape.ndim(); ++i) {
    s.inner *= static_cast<std::size_t>(shape[i]);
  }
  return s;
}

// What one operator hands to the next per channel: a row, because mx.viz.print_summary takes away
// an output's first dimension and looks at the next.
inline mxnet::TShape VectorShape(std::size_t size) {
  return mxnet::TShape({1, static_cast<nnvm::dim_t>(size)});
}
// Of the statistics on their way: mx.viz takes the first axis of whatever one operator gets of
// another for the batch, and needs a second one.
inline mxnet::TShape StatisticsShape(std::size_t channels) {
  return {1, static_cast<nnvm::dim_t>(StatisticsSize(channels))};
}

// Makes two shapes or types of an operator the same; throws when they are known and differ.
inline void Unify(mxnet::TShape* a, mxnet::TShape* b, const char* what) {
  const bool know_a = mxnet::shape_is_known(*a), know_b = mxnet::shape_is_known(*b);
  if (know_a && know_b && *a != *b) {
    Raise("SyncBatchNorm: the shape of ", what, " is ", *b, ", but ", *a,
          " is needed; check the number of channels (in_channels, axis).");
  }
  if (know_b) *a = *b;
  if (know_a) *b = *a;
}

inline void Unify(int* a, int* b, const char* what) {
  if (*a == -1) *a = *b;
  if (*b == -1) *b = *a;
  if (*a != *b) {
    Raise("SyncBatchNorm: ", what,
          " has another dtype than the input needs (float32 parameters beside float16 and float32 "
          "data, float64 beside float64); use cast() on the block.");
  }
}

inline int VisibleGpus() {
  int gpus = 0;
  return MXGetGPUCount(&gpus) == 0 ? gpus : 0;  // fails without a driver
}

// Whether a graph should give _syncbn_moments its input as its output.  On the CPU, MXNet's
// convolutions leave their output in a layout of MKL-DNN's own.  An operator from outside gets it
// copied into the plain layout; one that works in place gets its output copied, too, and back
// again, which costs more than the copy that being in place saves.
inline bool AliasInput() {
  static const bool in_place =
      VisibleGpus() > 0 || dmlc::GetEnv("MXNET_MKLDNN_ENABLED", true) == false;
  return in_place;
}

}  // namespace gluon_syncbn
