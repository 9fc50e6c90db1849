// Arrays in MKL-DNN's layouts, as MXNet 1.9.1 keeps them.
//
// MXNet's convolutions leave feature maps in blocks of channels, and MXNet reorders them before and
// after an operator that does not know these layouts.  What it takes to know them is in MXNet's
// library, but not in its headers: everything that is assumed about it is in mkldnn_arrays.cc, and
// is verified when our library is loaded, on arrays made for that.
#pragma once

#include <mxnet/ndarray.h>
#include <mxnet/op_attr_types.h>

#include <optional>
#include <vector>

#include "adapter/map_layout.h"

namespace gluon_syncbn {

// Throws the reason if the functions below do not work with this MXNet, or if there are no such
// layouts to deal with, because MXNET_MKLDNN_ENABLED=0 or GLUON_SYNCBN_MKLDNN_LAYOUTS=0 says so.
void VerifyMkldnnArrays();

// Whether the array is in a layout of MKL-DNN's; one that we do not understand, possibly.
bool InMkldnnLayout(const mxnet::NDArray& array);

// The layout of a map of float32 numbers with the channels on axis 1, if it is one that our kernels
// understand and is not the plain one.
std::optional<MapLayout> LayoutOf(const mxnet::NDArray& map);

// The memory of a map as it is.
mxnet::TBlob RawBlob(const mxnet::NDArray& map);

// Gives an array the layout of `like`, which has one and the same shape.  The contents are lost.
// False: it cannot have it, because it is a view.
bool TakeLayout(const mxnet::NDArray& array, const mxnet::NDArray& like);

// A copy of the map in the layout of `like`.
mxnet::NDArray Reordered(const mxnet::NDArray& map, const mxnet::NDArray& like);

// Call it once a call is over: MXNet's stream of MKL-DNN operations keeps what it was given until
// then.
void EndMkldnnCall();

// MXNet's own way to run an operator that takes plain arrays only: reorders where needed.
using LegacyFunction = void (*)(const mxnet::OpStatePtr&, const mxnet::OpContext&,
                                const std::vector<mxnet::TBlob>&,
                                const std::vector<mxnet::OpReqType>&,
                                const std::vector<mxnet::TBlob>&);
void RunOnPlainArrays(LegacyFunction function, const mxnet::OpStatePtr& state,
                      const mxnet::OpContext& ctx, const std::vector<mxnet::NDArray>& inputs,
                      const std::vector<mxnet::OpReqType>& req,
                      const std::vector<mxnet::NDArray>& outputs);

}  // namespace gluon_syncbn
