// _syncbn_normalize: step 2 of forward, and step 1 of backward.
//
//   forward   data, statistics of all devices, backward_context (not read), gamma, beta, possibly a
//             residual -> output, possibly with an activation; updates the moving statistics
//   backward  dy -> g, the gradient before the activation, as the gradient of data, this device's
//             backward sums as that of the statistics, gamma * invstd and the mean as that of
//             backward_context, and the gradients of gamma, beta and the residual
#include <string>
#include <vector>

#include "adapter/batch_norm_property.h"
#include "adapter/operator_device.h"

namespace gluon_syncbn {
namespace {

enum Arguments { kData, kStatistics, kBackwardContext, kGamma, kBeta };

struct NormalizeParam : public BatchNormFields<NormalizeParam> {
  DMLC_DECLARE_PARAMETER(NormalizeParam) { Declare(manager); }
};

class NormalizeOp : public mxnet::Operator {
 public:
  NormalizeOp(const NormalizeParam& param, const mxnet::Context& context) : param_(param) {
    RequireDevice(context);
  }

  void Forward(const mxnet::OpContext& ctx, const Blobs& in_data, const Requests& req,
               const Blobs& out_data, const Blobs& aux) override {
    auto p = ToForwardParams(param_, kGamma, in_data, req, out_data, aux);
    p.statistics = in_data[kStatistics].dptr<double>();
    OnDevice(ctx, [&](const auto& device) { Run(device, p); });
  }

  void Backward(const mxnet::OpContext& ctx, const Blobs& out_grad, const Blobs& in_data,
                const Blobs& out_data, const Requests& req, const Blobs& in_grad,
                const Blobs& aux) override {
    auto p = ToBackwardParams<NormalizeBackwardParams>(param_, kGamma, out_grad, in_data, out_data,
                                                       req, in_grad, aux);
    p.statistics = in_data[kStatistics].dptr<double>();
    p.g = ToWrite(req[kData], in_grad[kData]);
    p.backward_sums = static_cast<double*>(ToWrite(req[kStatistics], in_grad[kStatistics]));
    p.backward_context =
        static_cast<double*>(ToWrite(req[kBackwardContext], in_grad[kBackwardContext]));
    OnDevice(ctx, [&](const auto& device) { Run(device, p); });
  }

 private:
  // The gradient's memory, or null if MXNet does not want it.  These arguments are outputs of
  // _syncbn_moments and _syncbn_sum that have no other consumer, so MXNet never accumulates here.
  static void* ToWrite(mxnet::OpReqType req, const mxnet::TBlob& grad) {
    if (req == mxnet::kAddTo) {
      Raise(
          "_syncbn_normalize: data, statistics and backward_context must have no other consumer.");
    }
    return req == mxnet::kNullOp ? nullptr : grad.dptr_;
  }

  const NormalizeParam param_;
};

class NormalizeProperty : public BatchNormProperty<NormalizeProperty, NormalizeParam, kGamma> {
 public:
  std::string TypeString() const override { return "_syncbn_normalize"; }
  mxnet::Operator* CreateOperator(mxnet::Context context) const override {
    return new NormalizeOp(param_, context);
  }

  std::vector<std::string> ListArguments() const override {
    return WithResidual({"data", "statistics", "backward_context", "gamma", "beta"});
  }
  std::vector<std::string> ListOutputs() const override { return WithCorrection({"output"}); }

  bool InferShape(mxnet::ShapeVector* in, mxnet::ShapeVector* out,
                  mxnet::ShapeVector* aux) const override {
    const bool known = BatchNormProperty::InferShape(in, out, aux);
    if (mxnet::shape_is_known(in->at(kGamma))) {
      const auto channels = static_cast<std::size_t>(in->at(kGamma)[0]);
      mxnet::TShape statistics = StatisticsShape(channels);
      mxnet::TShape context = VectorShape(BackwardContextSize(channels));
      Unify(&statistics, &in->at(kStatistics), "statistics");
      Unify(&context, &in->at(kBackwardContext), "backward_context");
    }
    return known;
  }

  bool InferType(std::vector<int>* in, std::vector<int>* out,
                 std::vector<int>* aux) const override {
    RequireFloat64(&in->at(kStatistics), "statistics");
    RequireFloat64(&in->at(kBackwardContext), "backward_context");
    return BatchNormProperty::InferType(in, out, aux);
  }

  std::vector<int> DeclareBackwardDependency(const std::vector<int>& out_grad,
                                             const std::vector<int>& in_data,
                                             const std::vector<int>& out_data) const override {
    std::vector<int> needed{out_grad[0], in_data[kData], in_data[kGamma], in_data[kStatistics]};
    AddOptionalDependencies(in_data, out_data, &needed);
    return needed;
  }
};

DMLC_REGISTER_PARAMETER(NormalizeParam);

using mxnet::OperatorPropertyReg;
MXNET_REGISTER_OP_PROPERTY(_syncbn_normalize, NormalizeProperty)
    .describe("Part of gluon_syncbn's synchronized batch normalization: normalization.")
    .add_argument("data", "NDArray-or-Symbol", "The first output of _syncbn_moments.")
    .add_argument("statistics", "NDArray-or-Symbol", "The statistics of all devices.")
    .add_argument("backward_context", "NDArray-or-Symbol",
                  "Takes numbers back to _syncbn_moments in backward.")
    .add_argument("gamma", "NDArray-or-Symbol", "The scale, per channel.")
    .add_argument("beta", "NDArray-or-Symbol", "The shift, per channel.")
    .add_argument("residual", "NDArray-or-Symbol", "With add only: of the shape of data.")
    .add_argument("moving_mean", "NDArray-or-Symbol", "The moving mean.")
    .add_argument("moving_var", "NDArray-or-Symbol", "The moving variance (biased).")
    .add_argument("num_batches_tracked", "NDArray-or-Symbol", "With cumulative_average only.")
    .add_argument("renorm_mean", "NDArray-or-Symbol", "With renorm only: the average mean.")
    .add_argument("renorm_stddev", "NDArray-or-Symbol",
                  "With renorm only: of sqrt(variance + eps).")
    .add_arguments(NormalizeParam::__FIELDS__());

}  // namespace
}  // namespace gluon_syncbn
