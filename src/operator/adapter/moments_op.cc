// _syncbn_moments: step 1 of forward, and step 2 of backward.
//
//   forward   data, with `weighted` also weights -> data, statistics of this device's shard,
//             backward_context (not written)
//   backward  g, the backward sums of all devices, gamma * invstd and the mean -> gradient of data
//             (weights have none)
//
// _syncbn_normalize computes its gradients first, and passes on to this operator what it needs, as
// the gradients of its outputs (see moments_property.h).
// docs/architecture.md has the picture.
#include <string>
#include <utility>
#include <vector>

#include "adapter/huge_pages.h"
#include "adapter/moments_property.h"
#include "adapter/operator_device.h"
#include "kernels/weighted_moments.h"

namespace gluon_syncbn {
namespace {

enum Arguments { kData, kWeights };

struct MomentsParam : public dmlc::Parameter<MomentsParam> {
  int axis;
  bool use_batch_stats;
  bool weighted;
  bool use_global_stats;
  int spatial_dims;
  DMLC_DECLARE_PARAMETER(MomentsParam) {
    DMLC_DECLARE_FIELD(axis).set_default(1).describe("The channel axis; negative from the end.");
    DMLC_DECLARE_FIELD(use_batch_stats)
        .set_default(false)
        .describe("Compute statistics in inference as well, where nothing is exchanged.");
    DMLC_DECLARE_FIELD(use_global_stats)
        .set_default(false)
        .describe("Compute no statistics, so that the moving ones are used in training as well.");
    DMLC_DECLARE_FIELD(weighted).set_default(false).describe(
        "Take weights: samples or positions count as much as theirs say.");
    DMLC_DECLARE_FIELD(spatial_dims)
        .set_default(0)
        .describe(
            "The number of dimensions besides batch and channels that the input must have (with 1, "
            "none is right as well); 0: any number.");
  }
};

class MomentsOp : public mxnet::Operator {
 public:
  MomentsOp(const MomentsParam& param, const mxnet::Context& context) : param_(param) {
    RequireDevice(context);
  }

  void Forward(const mxnet::OpContext& ctx, const std::vector<mxnet::TBlob>& in_data,
               const std::vector<mxnet::OpReqType>& req, const std::vector<mxnet::TBlob>& out_data,
               const std::vector<mxnet::TBlob>&) override {
    const bool compute = (ctx.is_train || param_.use_batch_stats) && !param_.use_global_stats;
    const auto p = ToMomentsParams(param_.axis, compute, in_data, req, out_data);
    if (!param_.weighted) return OnDevice(ctx, [&](const auto& device) { Run(device, p); });
    const PositionWeights weights = ToWeights(in_data[kWeights], p.shape, in_data[kData].size(0));
    OnDevice(ctx, [&](const auto& device) { RunWeighted(device, p, weights); });
  }

  void Backward(const mxnet::OpContext& ctx, const std::vector<mxnet::TBlob>& out_grad,
                const std::vector<mxnet::TBlob>& in_data, const std::vector<mxnet::TBlob>& out_data,
                const std::vector<mxnet::OpReqType>& req, const std::vector<mxnet::TBlob>& in_grad,
                const std::vector<mxnet::TBlob>&) override {
    const mxnet::TBlob& x = out_data[kOutput];
    MomentsBackwardParams p{};
    p.type = ToDataType(x.type_flag_);
    p.shape = ToFeatureShape(x.shape_, param_.axis);
    p.g = out_grad[kOutput].dptr_;
    p.x = x.dptr_;
    p.backward_sums = out_grad[kStatistics].dptr<double>();
    p.backward_context = out_grad[kBackwardContext].dptr<double>();
    p.dx_mode = ToWriteMode(req[0]);
    p.dx = in_grad[0].dptr_;
    PreferHugePages(in_grad[0]);
    if (!param_.weighted) return OnDevice(ctx, [&](const auto& device) { Run(device, p); });
    if (req[kWeights] != mxnet::kNullOp) {
      Raise("SyncBatchNorm: weights have no gradient; pass them through BlockGrad.");
    }
    const PositionWeights weights = ToWeights(in_data[kWeights], p.shape, x.size(0));
    OnDevice(ctx, [&](const auto& device) { RunWeighted(device, p, weights); });
  }

 private:
  // MomentsProperty::InferShape has checked the shape.
  static PositionWeights ToWeights(const mxnet::TBlob& weights, const FeatureShape& shape,
                                   nnvm::dim_t samples) {
    if (LayoutOfCall::Get() != nullptr) throw LayoutDeclined();
    PositionWeights w;
    w.values = weights.dptr_;
    if (weights.shape_.ndim() == 1 && shape.count() != weights.Size()) {
      w.outer_per_sample = shape.outer / static_cast<std::size_t>(samples);
    }
    return w;
  }

  const MomentsParam param_;
};

class MomentsProperty : public MomentsPropertyBase<MomentsProperty, MomentsParam> {
 public:
  std::string TypeString() const override { return "_syncbn_moments"; }
  mxnet::Operator* CreateOperator(mxnet::Context context) const override {
    return new MomentsOp(param_, context);
  }
  std::size_t ContextSize(std::size_t channels) const override {
    return BackwardContextSize(channels);
  }

  std::vector<std::string> ListArguments() const override {
    if (param_.weighted) return {"data", "weights"};
    return {"data"};
  }

  bool InferShape(mxnet::ShapeVector* in, mxnet::ShapeVector* out,
                  mxnet::ShapeVector* aux) const override {
    if (mxnet::ndim_is_known(in->at(kData))) {
      CheckSpatialDims(param_.spatial_dims, in->at(kData).ndim());
    }
    const bool known = MomentsPropertyBase::InferShape(in, out, aux);
    if (param_.weighted && known) CheckWeights(in->at(kData), in->at(kWeights));
    return known && (!param_.weighted || mxnet::shape_is_known(in->at(kWeights)));
  }

  bool InferType(std::vector<int>* in, std::vector<int>* out,
                 std::vector<int>* aux) const override {
    if (!MomentsPropertyBase::InferType(in, out, aux)) return false;
    if (param_.weighted) {
      const int type = ParameterType(in->at(kData));
      int& weights = in->at(kWeights);
      if (weights == -1) weights = type;
      if (weights != type) {
        Raise(
            "SyncBatchNorm: weights must be float32, or float64 with float64 data; convert them, ",
            "for example with weights.astype('float32').");
      }
    }
    return true;
  }

  std::vector<int> DeclareBackwardDependency(const std::vector<int>& out_grad,
                                             const std::vector<int>& in_data,
                                             const std::vector<int>& out_data) const override {
    auto needed = MomentsPropertyBase::DeclareBackwardDependency(out_grad, in_data, out_data);
    if (param_.weighted) needed.push_back(in_data[kWeights]);
    return needed;
  }

  // As in batch_norm_property.h, where there is a second argument.
  std::vector<std::pair<int, void*>> BackwardInplaceOption(
      const std::vector<int>& out_grad, const std::vector<int>&, const std::vector<int>&,
      const std::vector<void*>& in_grad) const override {
    return {{out_grad[kOutput], in_grad[param_.weighted ? 1 : 0]}};
  }

 private:
  void CheckWeights(const mxnet::TShape& data, const mxnet::TShape& weights) const {
    if (!mxnet::shape_is_known(weights)) return;
    const int axis = ChannelAxis(param_.axis, data.ndim());
    mxnet::TShape samples(1, data[0]), with_channel = data;
    with_channel[axis] = 1;
    mxnet::TShape positions(data.ndim() - 1, 1);
    for (int i = 0, to = 0; i < data.ndim(); ++i) {
      if (i != axis) positions[to++] = data[i];
    }
    const bool per_sample = axis > 0 && weights == samples;
    if (per_sample || weights == positions || weights == with_channel) return;
    Raise("SyncBatchNorm: weights of shape ", weights, " do not fit data of shape ", data,
          "; give one for each sample, ", samples, ", or one for each position, ", positions,
          " or ", with_channel, ".");
  }
};

DMLC_REGISTER_PARAMETER(MomentsParam);

using mxnet::OperatorPropertyReg;
MXNET_REGISTER_OP_PROPERTY(_syncbn_moments, MomentsProperty)
    .describe("Part of gluon_syncbn's synchronized batch normalization: local moments.")
    .add_argument("data", "NDArray-or-Symbol", "The input, of 2 or more dimensions.")
    .add_argument("weights", "NDArray-or-Symbol", "With weighted only: per sample or position.")
    .add_arguments(MomentsParam::__FIELDS__());

}  // namespace
}  // namespace gluon_syncbn
