// See mkldnn_dispatch.h.
//
// An operator that takes such maps has, for MXNet, the attributes FStatefulComputeEx<cpu> (it gets
// arrays instead of plain memory), TIsMKLDNN (they come as they are) and FInferStorageType (which
// says that the former is to be used).  nnvm::Op::set_attr makes them; compiled by us it would
// crash in MXNet, because a std::function is called in another way there (operator_util.h), so
// MXNet's own instantiations are called, and FInferStorageType, whose arguments cannot cross at
// all, is that of an operator of MXNet's with the same needs.
#include "adapter/mkldnn_dispatch.h"

#include <dmlc/logging.h>
#include <mxnet/ndarray.h>
#include <mxnet/op_attr_types.h>
#include <nnvm/op.h>

#include <string>
#include <vector>

#include "adapter/map_layout.h"
#include "adapter/mkldnn_arrays.h"

namespace mxnet {
namespace op {
// Exported by libmxnet.so, but declared in no header: what runs a registered OperatorProperty.
void LegacyOpForward(const OpStatePtr& state, const OpContext& ctx,
                     const std::vector<TBlob>& inputs, const std::vector<OpReqType>& req,
                     const std::vector<TBlob>& outputs);
void LegacyOpBackward(const OpStatePtr& state, const OpContext& ctx,
                      const std::vector<TBlob>& inputs, const std::vector<OpReqType>& req,
                      const std::vector<TBlob>& outputs);
}  // namespace op
}  // namespace mxnet

namespace gluon_syncbn {

// nnvm::Op's set_attr<T>(name, value, level) and GetAttr<T>(name), as MXNet compiled them.
#define IN_MXNET(symbol) __asm__(symbol) __attribute__((weak))
namespace in_mxnet {
using Level = int;
nnvm::Op& SetBool(nnvm::Op* op, const std::string& name, const bool& value, Level)
    IN_MXNET("_ZN4nnvm2Op8set_attrIbEERS0_RKSsRKT_i");
nnvm::Op& SetStorageType(nnvm::Op* op, const std::string& name,
                         const mxnet::FInferStorageType& value, Level)
    IN_MXNET(
        "_ZN4nnvm2Op8set_attrISt8functionIFbRKNS_9NodeAttrsEiPN5mxnet12DispatchModeEPSt6vector"
        "IiSaIiEESC_EEEERS0_RKSsRKT_i");
nnvm::Op& SetCompute(nnvm::Op* op, const std::string& name, const mxnet::FStatefulComputeEx& value,
                     Level)
    IN_MXNET(
        "_ZN4nnvm2Op8set_attrISt8functionIFvRKN5mxnet10OpStatePtrERKNS3_9OpContextERKSt6vector"
        "INS3_7NDArrayESaISB_EERKSA_INS3_9OpReqTypeESaISG_EESF_EEEERS0_RKSsRKT_i");
const nnvm::OpMap<bool>& GetBool(const std::string& name)
    IN_MXNET("_ZN4nnvm2Op7GetAttrIbEERKNS_5OpMapIT_EERKSs");
const nnvm::OpMap<mxnet::FInferStorageType>& GetStorageType(const std::string& name) IN_MXNET(
    "_ZN4nnvm2Op7GetAttrISt8functionIFbRKNS_9NodeAttrsEiPN5mxnet12DispatchModeEPSt6vector"
    "IiSaIiEESC_EEEERKNS_5OpMapIT_EERKSs");
}  // namespace in_mxnet
#undef IN_MXNET

namespace {

using namespace in_mxnet;

using mxnet::NDArray;
using Arrays = std::vector<NDArray>;
using Requests = std::vector<mxnet::OpReqType>;

bool SameLayout(const NDArray& a, const NDArray& b) {
  const auto layout = LayoutOf(a);
  return layout && layout == LayoutOf(b);
}

// Whether the array is a feature map like x; others are statistics and parameters.
bool IsMap(const NDArray& array, const NDArray& x) {
  return array.dtype() == x.dtype() && array.shape() == x.shape();
}

// Runs a call whose input `map` is a feature map, in whose layout all other maps are taken and
// given; the first output is one.  All other arrays are plain.  False: not in these layouts, and
// nothing has happened, but that maps among the inputs may have been replaced by equal arrays.
bool RunInLayout(LegacyFunction function, std::size_t map, const mxnet::OpStatePtr& state,
                 const mxnet::OpContext& ctx, Arrays* inputs, const Requests& req,
                 const Arrays& outputs) {
  const NDArray x = inputs->at(map);
  const auto layout = LayoutOf(x);
  if (!layout || !IsMap(outputs[0], x)) return false;
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const NDArray& output = outputs[i];
    if (!IsMap(output, x) && InMkldnnLayout(output)) return false;
    if (IsMap(output, x) && req[i] == mxnet::kAddTo && !SameLayout(output, x)) return false;
  }
  for (NDArray& input : *inputs) {
    if (!IsMap(input, x) && InMkldnnLayout(input)) return false;
  }
  for (NDArray& input : *inputs) {
    if (IsMap(input, x) && !SameLayout(input, x)) input = Reordered(input, x);
  }
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const bool is_written = req[i] == mxnet::kWriteTo || req[i] == mxnet::kWriteInplace;
    if (!IsMap(outputs[i], x) || !is_written || SameLayout(outputs[i], x)) continue;
    if (!TakeLayout(outputs[i], x)) return false;
  }

  std::vector<mxnet::TBlob> in_blobs, out_blobs;
  for (const NDArray& input : *inputs) {
    in_blobs.push_back(IsMap(input, x) ? RawBlob(input) : input.data());
  }
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const bool raw = IsMap(outputs[i], x) && req[i] != mxnet::kNullOp;
    out_blobs.push_back(raw ? RawBlob(outputs[i]) : outputs[i].data());
  }
  try {
    const LayoutOfCall scope(*layout);
    function(state, ctx, in_blobs, req, out_blobs);
  } catch (const LayoutDeclined&) {
    return false;
  }
  EndMkldnnCall();
  return true;
}

template <LegacyFunction function, std::size_t map>
void Compute(const mxnet::OpStatePtr& state, const mxnet::OpContext& ctx, const Arrays& inputs,
             const Requests& req, const Arrays& outputs) {
  if (!LayoutOf(inputs[map])) {  // as everywhere but next to convolutions: keep it short
    return RunOnPlainArrays(function, state, ctx, inputs, req, outputs);
  }
  Arrays arrays = inputs;
  if (RunInLayout(function, map, state, ctx, &arrays, req, outputs)) return;
  RunOnPlainArrays(function, state, ctx, arrays, req, outputs);
}

// FInferStorageType of an operator of MXNet's; a copy, because maps of attributes move their values
// when operators are added.
mxnet::FInferStorageType StorageTypeOf(const std::string& name) {
  const nnvm::Op* const op = nnvm::Op::Get(name);  // throws if there is none
  const auto& storage_types = GetStorageType("FInferStorageType");
  if (!GetBool("TIsMKLDNN").get(op, false) || !storage_types.contains(op) || !storage_types[op]) {
    throw dmlc::Error("this MXNet differs from what is known of it: the attributes of " + name);
  }
  return storage_types[op];
}

struct Operator {
  nnvm::Op* op;
  mxnet::FStatefulComputeEx compute;
};

template <LegacyFunction function, std::size_t map>
Operator Ours(const std::string& name) {
  return {const_cast<nnvm::Op*>(nnvm::Op::Get(name)), Compute<function, map>};
}

void Register() {
  if (SetBool == nullptr || SetStorageType == nullptr || SetCompute == nullptr ||
      GetBool == nullptr || GetStorageType == nullptr) {
    throw dmlc::Error("this MXNet's library does not export the attributes of operators");
  }
  constexpr auto forward = mxnet::op::LegacyOpForward;
  constexpr auto backward = mxnet::op::LegacyOpBackward;
  // The number: which input is x, whose layout counts.
  const std::vector<Operator> all = {
      Ours<forward, 0>("_syncbn_moments"),
      Ours<forward, 0>("_syncbn_normalize"),
      Ours<forward, 0>("_syncbn_batch_norm"),
      Ours<forward, 0>("_syncbn_mabn_moments"),
      Ours<forward, 0>("_syncbn_mabn_normalize"),
      Ours<backward, 3>("_backward__syncbn_moments"),
      Ours<backward, 1>("_backward__syncbn_normalize"),
      Ours<backward, 1>("_backward__syncbn_batch_norm"),
      Ours<backward, 3>("_backward__syncbn_mabn_moments"),
      Ours<backward, 1>("_backward__syncbn_mabn_normalize"),
  };
  // It says that the operator takes such maps, and no more; forward and backward have the same.
  const mxnet::FInferStorageType storage_type = StorageTypeOf("LRN");
  constexpr Level kLevel = 10;  // set_attr's default
  for (const auto& ours : all) {
    SetCompute(ours.op, "FStatefulComputeEx<cpu>", ours.compute, kLevel);
    SetBool(ours.op, "TIsMKLDNN", true, kLevel);
  }
  // From here on MXNet uses the others.
  for (const auto& ours : all) {
    SetStorageType(ours.op, "FInferStorageType", storage_type, kLevel);
  }
}

}  // namespace

const std::string& WhyNoMkldnnLayouts() {
  static const std::string why = [] {
    try {
      VerifyMkldnnArrays();
      Register();
    } catch (const std::exception& e) {
      return std::string(e.what());
    }
    return std::string();
  }();
  return why;
}

}  // namespace gluon_syncbn
