// _syncbn_normalize: normalization, the moving statistics, and the sums of the backward pass.
//
//   forward   data, statistics over all devices, gamma, beta -> output; moves the moving statistics
//   backward  dy -> dy handed through, this device's part of the backward sums, A and the mean,
//             and the gradients of gamma and beta
#include <string>
#include <vector>

#include "batch_norm_property.h"
#include "huge_pages.h"

namespace gluon_syncbn {
namespace {

enum Arguments { kData, kStatistics, kCoefficients, kGamma, kBeta };

struct NormalizeParam : public dmlc::Parameter<NormalizeParam> {
  int axis;
  double eps;
  double momentum;
  bool fix_gamma;
  DMLC_DECLARE_PARAMETER(NormalizeParam) {
    DMLC_DECLARE_FIELD(axis).set_default(1).describe("The channel axis; negative from the end.");
    DMLC_DECLARE_FIELD(eps).set_default(1e-5).describe("Added to the variance.");
    DMLC_DECLARE_FIELD(momentum).set_default(0.9).describe(
        "How much the moving statistics keep of what they were.");
    DMLC_DECLARE_FIELD(fix_gamma).set_default(false).describe("Treat gamma as 1.");
  }
};

class NormalizeOp : public mxnet::Operator {
 public:
  NormalizeOp(const NormalizeParam& param, const mxnet::Context& context) : param_(param) {
    NeedCpu(context);
  }

  void Forward(const mxnet::OpContext&, const std::vector<mxnet::TBlob>& in_data,
               const std::vector<mxnet::OpReqType>& req, const std::vector<mxnet::TBlob>& out_data,
               const std::vector<mxnet::TBlob>& aux) override {
    const mxnet::TBlob& x = in_data[kData];
    NormalizeForward k{};
    k.type = ToDataType(x.type_flag_);
    k.shape = ToFeatureShape(x.shape_, param_.axis);
    k.epsilon = param_.eps;
    k.momentum = param_.momentum;
    k.fix_gamma = param_.fix_gamma;
    k.x = x.dptr_;
    k.statistics = in_data[kStatistics].dptr<double>();
    k.gamma = in_data[kGamma].dptr_;
    k.beta = in_data[kBeta].dptr_;
    k.moving_mean = aux[kMovingMean].dptr_;
    k.moving_var = aux[kMovingVar].dptr_;
    k.y_request = ToRequest(req[0]);
    k.y = out_data[0].dptr_;
    PreferHugePages(out_data[0]);
    Run(Cpu(), k);
  }

  void Backward(const mxnet::OpContext&, const std::vector<mxnet::TBlob>& out_grad,
                const std::vector<mxnet::TBlob>& in_data, const std::vector<mxnet::TBlob>&,
                const std::vector<mxnet::OpReqType>& req, const std::vector<mxnet::TBlob>& in_grad,
                const std::vector<mxnet::TBlob>& aux) override {
    const mxnet::TBlob& x = in_data[kData];
    NormalizeBackward k{};
    k.type = ToDataType(x.type_flag_);
    k.shape = ToFeatureShape(x.shape_, param_.axis);
    k.epsilon = param_.eps;
    k.fix_gamma = param_.fix_gamma;
    k.dy = out_grad[0].dptr_;
    k.x = x.dptr_;
    k.statistics = in_data[kStatistics].dptr<double>();
    k.gamma = in_data[kGamma].dptr_;
    k.moving_mean = aux[kMovingMean].dptr_;
    k.moving_var = aux[kMovingVar].dptr_;
    k.dx_request = ToRequest(req[kData]);
    k.dx = in_grad[kData].dptr_;
    PreferHugePages(in_grad[kData]);
    // What _syncbn_moments gets back has one consumer, so nothing is ever added to it.
    if (k.dx_request == Request::kAdd) Raise("_syncbn_normalize: its data have one consumer.");
    k.statistics_grad = Plain(req[kStatistics], in_grad[kStatistics]);
    k.coefficients_grad = Plain(req[kCoefficients], in_grad[kCoefficients]);
    k.gamma_request = ToRequest(req[kGamma]);
    k.gamma_grad = in_grad[kGamma].dptr_;
    k.beta_request = ToRequest(req[kBeta]);
    k.beta_grad = in_grad[kBeta].dptr_;
    Run(Cpu(), k);
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
      mxnet::TShape statistics = VectorShape(StatisticsSize(channels));
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
    .add_arguments(NormalizeParam::__FIELDS__());

}  // namespace
}  // namespace gluon_syncbn
