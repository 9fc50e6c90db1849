// _syncbn_normalize: normalization, the moving statistics, and the sums of the backward pass.
//
//   forward   data, statistics over all devices, gamma, beta -> output; moves the moving statistics
//   backward  dy -> dy handed through, this device's part of the backward sums, A and the mean,
//             and the gradients of gamma and beta
#include <string>
#include <vector>

#include "adapter/batch_norm_property.h"
#include "adapter/operator_device.h"

namespace gluon_syncbn {
namespace {

enum Arguments { kData, kStatistics, kCoefficients, kGamma, kBeta };

struct NormalizeParam : public dmlc::Parameter<NormalizeParam> {
  int axis;
  double eps;
  double momentum;
  bool cumulative_average;
  bool fix_gamma;
  bool use_batch_stats;
  DMLC_DECLARE_PARAMETER(NormalizeParam) {
    DMLC_DECLARE_FIELD(axis).set_default(1).describe("The channel axis; negative from the end.");
    DMLC_DECLARE_FIELD(eps).set_default(1e-5).describe("Added to the variance.");
    DMLC_DECLARE_FIELD(momentum).set_default(0.9).describe(
        "How much the moving statistics keep of what they were.");
    DMLC_DECLARE_FIELD(cumulative_average)
        .set_default(false)
        .describe(
            "Let the moving statistics be the average over all batches so far, which a third "
            "auxiliary state counts, whatever the momentum.");
    DMLC_DECLARE_FIELD(fix_gamma).set_default(false).describe("Treat gamma as 1.");
    DMLC_DECLARE_FIELD(use_batch_stats)
        .set_default(false)
        .describe(
            "Normalize by the batch's own statistics in inference, too, and leave the moving "
            "statistics as they are.");
  }
};

class NormalizeOp : public mxnet::Operator {
 public:
  NormalizeOp(const NormalizeParam& param, const mxnet::Context& context) : param_(param) {
    NeedDevice(context);
  }

  void Forward(const mxnet::OpContext& ctx, const Blobs& in_data, const Requests& req,
               const Blobs& out_data, const Blobs& aux) override {
    NormalizeForward k = ForwardKernel(param_, in_data, req, out_data, aux);
    k.statistics = in_data[kStatistics].dptr<double>();
    OnDevice(ctx, [&](const auto& device) { Run(device, k); });
  }

  void Backward(const mxnet::OpContext& ctx, const Blobs& out_grad, const Blobs& in_data,
                const Blobs&, const Requests& req, const Blobs& in_grad,
                const Blobs& aux) override {
    NormalizeBackward k = BackwardKernel(param_, out_grad, in_data, req, in_grad, aux);
    // What _syncbn_moments gets back has one consumer, so nothing is ever added to it.
    if (k.dx_request == Request::kAdd) Raise("_syncbn_normalize: its data have one consumer.");
    k.statistics = in_data[kStatistics].dptr<double>();
    k.statistics_grad = Plain(req[kStatistics], in_grad[kStatistics]);
    k.coefficients_grad = Plain(req[kCoefficients], in_grad[kCoefficients]);
    OnDevice(ctx, [&](const auto& device) { Run(device, k); });
  }

 private:
  static double* Plain(mxnet::OpReqType req, const mxnet::TBlob& grad) {
    if (req == mxnet::kAddTo) Raise("_syncbn_normalize: its statistics have one consumer.");
    return req == mxnet::kNullOp ? nullptr : grad.dptr<double>();
  }

  const NormalizeParam param_;
};

class NormalizeProperty : public BatchNormProperty<NormalizeProperty, NormalizeParam> {
 public:
  std::string TypeString() const override { return "_syncbn_normalize"; }
  mxnet::Operator* CreateOperator(mxnet::Context context) const override {
    return new NormalizeOp(param_, context);
  }

  std::vector<std::string> ListArguments() const override {
    return {"data", "statistics", "coefficients", "gamma", "beta"};
  }

  bool InferShape(mxnet::ShapeVector* in, mxnet::ShapeVector* out,
                  mxnet::ShapeVector* aux) const override {
    const bool known = BatchNormProperty::InferShape(in, out, aux);
    if (mxnet::shape_is_known(in->at(kGamma))) {
      const auto channels = static_cast<std::size_t>(in->at(kGamma)[0]);
      mxnet::TShape statistics = StatisticsShape(channels);
      mxnet::TShape coefficients = VectorShape(CoefficientsSize(channels));
      Unify(&statistics, &in->at(kStatistics), "statistics");
      Unify(&coefficients, &in->at(kCoefficients), "coefficients");
    }
    return known;
  }

  bool InferType(std::vector<int>* in, std::vector<int>* out,
                 std::vector<int>* aux) const override {
    in->at(kStatistics) = mshadow::kFloat64;
    in->at(kCoefficients) = mshadow::kFloat64;
    return BatchNormProperty::InferType(in, out, aux);
  }

  std::vector<int> DeclareBackwardDependency(const std::vector<int>& out_grad,
                                             const std::vector<int>& in_data,
                                             const std::vector<int>&) const override {
    return {out_grad[0], in_data[kData], in_data[kGamma], in_data[kStatistics]};
  }
};

DMLC_REGISTER_PARAMETER(NormalizeParam);

using mxnet::OperatorPropertyReg;
MXNET_REGISTER_OP_PROPERTY(_syncbn_normalize, NormalizeProperty)
    .describe("Part of gluon_syncbn's synchronized batch normalization: normalization.")
    .add_argument("data", "NDArray-or-Symbol", "What _syncbn_moments hands through.")
    .add_argument("statistics", "NDArray-or-Symbol", "The statistics, summed over all devices.")
    .add_argument("coefficients", "NDArray-or-Symbol", "The way back around the exchange.")
    .add_argument("gamma", "NDArray-or-Symbol", "The scale, per channel.")
    .add_argument("beta", "NDArray-or-Symbol", "The shift, per channel.")
    .add_argument("moving_mean", "NDArray-or-Symbol", "The moving mean.")
    .add_argument("moving_var", "NDArray-or-Symbol", "The moving variance (biased).")
    .add_argument("num_batches_tracked", "NDArray-or-Symbol", "With cumulative_average only.")
    .add_arguments(NormalizeParam::__FIELDS__());

}  // namespace
}  // namespace gluon_syncbn
