// Translates MXNet's types, shapes and write requests into those of our kernels.
//
// MXNet's wheels are built with GCC 4.8.5.  docs/architecture.md says which types may be passed to
// it and which may not (std::unordered_map, a std::function with arguments).
#pragma once

#include <dmlc/logging.h>
#include <dmlc/parameter.h>
#include <mxnet/base.h>
#include <mxnet/c_api.h>
#include <mxnet/op_attr_types.h>

#include <sstream>
#include <string>

#include "adapter/map_layout.h"
#include "adapter/mkldnn_dispatch.h"
#include "kernels/batch_norm_kernels.h"

namespace gluon_syncbn {

// Throws what Python sees as MXNetError.
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

// The type of gamma, beta and the moving statistics: float32 for float16 data, as in MXNet's
// BatchNorm.
inline int ParameterType(int data_type_flag) {
  return ToDataType(data_type_flag) == DataType::kFloat64 ? mshadow::kFloat64 : mshadow::kFloat32;
}

inline WriteMode ToWriteMode(mxnet::OpReqType request) {
  if (request == mxnet::kNullOp) return WriteMode::kSkip;
  return request == mxnet::kAddTo ? WriteMode::kAdd : WriteMode::kWrite;
}

// `axis` counted from 0; throws if it is out of range.
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

// Throws unless an input has this number of dimensions besides batch and channels; with 1, none is
// right as well.  0: any number is.
inline void CheckSpatialDims(int spatial_dims, int ndim) {
  if (spatial_dims == 0 || ndim == spatial_dims + 2 || (spatial_dims == 1 && ndim == 2)) return;
  Raise("BatchNorm", spatial_dims, "d takes an input of ", spatial_dims == 1 ? "2 or " : "",
        spatial_dims + 2, " dimensions, but got ", ndim, "; use ",
        ndim >= 2 && ndim <= 5 ? "BatchNorm" + std::to_string(ndim < 3 ? 1 : ndim - 2) + "d, or "
                               : "",
        "SyncBatchNorm, which takes any.");
}

// The feature maps of the current call, which have this shape and are in the layout of the call.
inline FeatureShape ToFeatureShape(const mxnet::TShape& shape, int axis) {
  const int channel_axis = ChannelAxis(axis, shape.ndim());
  const MapLayout* const layout = LayoutOfCall::Get();
  if (layout != nullptr && channel_axis != 1) throw LayoutDeclined();
  FeatureShape s{1, static_cast<std::size_t>(shape[channel_axis]), 1};
  for (int i = 0; i < channel_axis; ++i) s.outer *= static_cast<std::size_t>(shape[i]);
  for (int i = channel_axis + 1; i < shape.ndim(); ++i) {
    s.inner *= static_cast<std::size_t>(shape[i]);
  }
  if (layout == nullptr) return s;
  if (layout->block == s.channels) return {s.outer * s.inner, s.channels, 1};
  s.block = layout->block;
  return s;
}

// A vector from one operator to the next, as a row: mx.viz.print_summary drops the first dimension
// of an output and reads the next.
inline mxnet::TShape VectorShape(std::size_t size) {
  return mxnet::TShape({1, static_cast<nnvm::dim_t>(size)});
}
inline mxnet::TShape StatisticsShape(std::size_t channels) {
  return VectorShape(StatisticsSize(channels));
}

// Makes two shapes or types equal if one of them is known; throws if both are known and differ.
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
          " does not have the dtype that the input needs (float32 parameters for float16 and "
          "float32 data, float64 for float64); use cast() on the block.");
  }
}

// The type of what operators hand to each other.  A file could give it another one.
inline void RequireFloat64(int* type, const char* what) {
  if (*type != -1 && *type != mshadow::kFloat64) {
    Raise("SyncBatchNorm: ", what, " must be float64, as the operator before computes it.");
  }
  *type = mshadow::kFloat64;
}

inline int VisibleGpus() {
  int gpus = 0;
  return MXGetGPUCount(&gpus) == 0 ? gpus : 0;  // fails without a driver
}

// Whether the first output of _syncbn_moments should share memory with its input.  On the CPU,
// MXNet's convolutions leave their output in a layout of MKL-DNN's own.  MXNet converts the inputs
// of operators that do not take it to the plain layout; for one that works in place it converts the
// output as well, and back again, which costs more than the copy that sharing saves.
inline bool AliasInput() {
  static const bool in_place = VisibleGpus() > 0 || WhyNoMkldnnLayouts().empty() ||
                               dmlc::GetEnv("MXNET_MKLDNN_ENABLED", true) == false;
  return in_place;
}

}  // namespace gluon_syncbn
