// _syncbn_moments: step 1 of forward, and step 2 of backward.
//
//   forward   data -> data, statistics of this device's shard, backward_context (not written)
//   backward  g, the backward sums of all devices, gamma * invstd and the mean -> gradient of data
//
// _syncbn_normalize computes its gradients first, and passes on to this operator what it needs, as
// the gradients of its outputs (see moments_property.h).
// docs/architecture.md has the picture.
#include <string>
#include <vector>

#include "adapter/huge_pages.h"
#include "adapter/moments_property.h"
#include "adapter/operator_device.h"

namespace gluon_syncbn {
namespace {

struct MomentsParam : public dmlc::Parameter<MomentsParam> {
  int axis;
  bool use_batch_stats;
  DMLC_DECLARE_PARAMETER(MomentsParam) {
    DMLC_DECLARE_FIELD(axis).set_default(1).describe("The channel axis; negative from the end.");
    DMLC_DECLARE_FIELD(use_batch_stats)
        .set_default(false)
        .describe("Compute statistics in inference as well, where nothing is exchanged.");
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
    const auto p = ToMomentsParams(param_.axis, ctx.is_train || param_.use_batch_stats, in_data,
                                   req, out_data);
    OnDevice(ctx, [&](const auto& device) { Run(device, p); });
  }

  void Backward(const mxnet::OpContext& ctx, const std::vector<mxnet::TBlob>& out_grad,
                const std::vector<mxnet::TBlob>&, const std::vector<mxnet::TBlob>& out_data,
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
    OnDevice(ctx, [&](const auto& device) { Run(device, p); });
  }

 private:
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
};

DMLC_REGISTER_PARAMETER(MomentsParam);

using mxnet::OperatorPropertyReg;
MXNET_REGISTER_OP_PROPERTY(_syncbn_moments, MomentsProperty)
    .describe("Part of gluon_syncbn's synchronized batch normalization: local moments.")
    .add_argument("data", "NDArray-or-Symbol", "The input, of 2 or more dimensions.")
    .add_arguments(MomentsParam::__FIELDS__());

}  // namespace
}  // namespace gluon_syncbn
