// _syncbn_moments: step 1 of forward, and step 2 of backward.
//
//   forward   data -> data, statistics of this device's shard, backward_context (not written)
//   backward  g, the backward sums of all devices, gamma * invstd and the mean -> gradient of data
//
// _syncbn_normalize computes its gradients first, and passes on to this operator what it needs, as
// the gradients of its outputs.  Data are passed through in order to receive g; backward_context
// is an output for the sake of its gradient alone, which brings the numbers that are not exchanged.
// docs/architecture.md has the picture.
#include <string>
#include <utility>
#include <vector>

#include "adapter/huge_pages.h"
#include "adapter/operator_device.h"
#include "adapter/operator_property.h"
#include "adapter/operator_util.h"

namespace gluon_syncbn {
namespace {

enum Outputs { kOutput, kStatistics, kBackwardContext };

struct MomentsParam : public dmlc::Parameter<MomentsParam> {
  int axis;
  bool use_batch_stats;
  int spatial_dims;
  DMLC_DECLARE_PARAMETER(MomentsParam) {
    DMLC_DECLARE_FIELD(axis).set_default(1).describe("The channel axis; negative from the end.");
    DMLC_DECLARE_FIELD(use_batch_stats)
        .set_default(false)
        .describe("Compute statistics in inference as well, where nothing is exchanged.");
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

  // backward_context is not written, because nothing reads it.
  void Forward(const mxnet::OpContext& ctx, const std::vector<mxnet::TBlob>& in_data,
               const std::vector<mxnet::OpReqType>& req, const std::vector<mxnet::TBlob>& out_data,
               const std::vector<mxnet::TBlob>&) override {
    const mxnet::TBlob& x = in_data[0];
    MomentsForwardParams p{};
    p.type = ToDataType(x.type_flag_);
    p.shape = ToFeatureShape(x.shape_, param_.axis);
    p.x = x.dptr_;
    p.copy = req[kOutput] == mxnet::kNullOp ? nullptr : out_data[kOutput].dptr_;
    p.compute_statistics = ctx.is_train || param_.use_batch_stats;
    p.statistics = out_data[kStatistics].dptr<double>();
    PreferHugePages(out_data[kOutput]);
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

class MomentsProperty : public ParameterizedProperty<MomentsProperty, MomentsParam> {
 public:
  std::string TypeString() const override { return "_syncbn_moments"; }
  mxnet::Operator* CreateOperator(mxnet::Context context) const override {
    return new MomentsOp(param_, context);
  }

  std::vector<std::string> ListOutputs() const override {
    return {"output", "statistics", "backward_context"};
  }

  bool InferShape(mxnet::ShapeVector* in, mxnet::ShapeVector* out,
                  mxnet::ShapeVector* aux) const override {
    out->resize(3);
    aux->clear();
    mxnet::TShape& data = in->at(0);
    Unify(&data, &out->at(kOutput), "data");
    if (!mxnet::ndim_is_known(data)) return false;
    CheckSpatialDims(param_.spatial_dims, data.ndim());
    const auto channels = data[ChannelAxis(param_.axis, data.ndim())];
    if (mxnet::dim_size_is_known(channels)) {
      const auto c = static_cast<std::size_t>(channels);
      out->at(kStatistics) = StatisticsShape(c);
      out->at(kBackwardContext) = VectorShape(BackwardContextSize(c));
    }
    return mxnet::shape_is_known(data);
  }

  bool InferType(std::vector<int>* in, std::vector<int>* out,
                 std::vector<int>* aux) const override {
    out->resize(3, -1);
    aux->clear();
    Unify(&in->at(0), &out->at(kOutput), "data");
    out->at(kStatistics) = mshadow::kFloat64;
    out->at(kBackwardContext) = mshadow::kFloat64;
    if (in->at(0) == -1) return false;
    ToDataType(in->at(0));  // throws for integers
    return true;
  }

  // Backward reads the output instead of the data, so that both can share memory.
  std::vector<int> DeclareBackwardDependency(const std::vector<int>& out_grad,
                                             const std::vector<int>&,
                                             const std::vector<int>& out_data) const override {
    return {out_grad[kOutput], out_grad[kStatistics], out_grad[kBackwardContext],
            out_data[kOutput]};
  }

  std::vector<std::pair<int, void*>> ForwardInplaceOption(
      const std::vector<int>& in_data, const std::vector<void*>& out_data) const override {
    if (!AliasInput()) return {};
    return {{in_data[0], out_data[kOutput]}};
  }

  // MXNet numbers the entries wrongly if there are several (see batch_norm_property.h), but the
  // first output gradient and the only argument get the right numbers.
  std::vector<std::pair<int, void*>> BackwardInplaceOption(
      const std::vector<int>& out_grad, const std::vector<int>&, const std::vector<int>&,
      const std::vector<void*>& in_grad) const override {
    return {{out_grad[kOutput], in_grad[0]}};
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
