// _syncbn_normalize: normalization, the moving statistics, and the sums of the backward pass.
//
//   forward   data, statistics over all devices, gamma, beta -> output; moves the moving statistics
//   backward  dy -> dy handed through, this device's part of the backward sums, A and the mean,
//             and the gradients of gamma and beta
//
// With use_global_stats it stands alone: data, gamma, beta -> output, by the moving statistics.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "operator_property.h"
#include "operator_util.h"

namespace gluon_syncbn {
namespace {

enum AuxiliaryStates { kMovingMean, kMovingVar };

struct NormalizeParam : public dmlc::Parameter<NormalizeParam> {
  int axis;
  double eps;
  double momentum;
  bool fix_gamma;
  bool use_global_stats;
  DMLC_DECLARE_PARAMETER(NormalizeParam) {
    DMLC_DECLARE_FIELD(axis).set_default(1).describe("The channel axis; negative from the end.");
    DMLC_DECLARE_FIELD(eps).set_default(1e-5).describe("Added to the variance.");
    DMLC_DECLARE_FIELD(momentum).set_default(0.9).describe(
        "How much the moving statistics keep of what they were.");
    DMLC_DECLARE_FIELD(fix_gamma).set_default(false).describe("Treat gamma as 1.");
    DMLC_DECLARE_FIELD(use_global_stats)
        .set_default(false)
        .describe("Stand alone: normalize by the moving statistics.");
  }
};

// Where the arguments are: standing alone, there are no statistics and no coefficients.
struct Arguments {
  explicit Arguments(bool alone)
      : statistics(alone ? -1 : 1),
        coefficients(alone ? -1 : 2),
        gamma(alone ? 1 : 3),
        beta(alone ? 2 : 4) {}
  static constexpr int data = 0;
  int statistics, coefficients, gamma, beta;
};

class NormalizeOp : public mxnet::Operator {
 public:
  NormalizeOp(const NormalizeParam& param, const mxnet::Context& context)
      : param_(param), at_(param.use_global_stats) {
    NeedCpu(context);
  }

  void Forward(const mxnet::OpContext&, const std::vector<mxnet::TBlob>& in_data,
               const std::vector<mxnet::OpReqType>& req, const std::vector<mxnet::TBlob>& out_data,
               const std::vector<mxnet::TBlob>& aux) override {
    const mxnet::TBlob& x = in_data[at_.data];
    NormalizeForward k{};
    k.type = ToDataType(x.type_flag_);
    k.shape = ToFeatureShape(x.shape_, param_.axis);
    k.epsilon = param_.eps;
    k.momentum = param_.momentum;
    k.fix_gamma = param_.fix_gamma;
    k.x = x.dptr_;
    k.statistics = Statistics(in_data);
    k.gamma = in_data[at_.gamma].dptr_;
    k.beta = in_data[at_.beta].dptr_;
    k.moving_mean = aux[kMovingMean].dptr_;
    k.moving_var = aux[kMovingVar].dptr_;
    k.y_request = ToRequest(req[0]);
    k.y = out_data[0].dptr_;
    Run(Cpu(), k);
  }

  void Backward(const mxnet::OpContext&, const std::vector<mxnet::TBlob>& out_grad,
                const std::vector<mxnet::TBlob>& in_data, const std::vector<mxnet::TBlob>&,
                const std::vector<mxnet::OpReqType>& req, const std::vector<mxnet::TBlob>& in_grad,
                const std::vector<mxnet::TBlob>& aux) override {
    const mxnet::TBlob& x = in_data[at_.data];
    NormalizeBackward k{};
    k.type = ToDataType(x.type_flag_);
    k.shape = ToFeatureShape(x.shape_, param_.axis);
    k.epsilon = param_.eps;
    k.fix_gamma = param_.fix_gamma;
    k.dy = out_grad[0].dptr_;
    k.x = x.dptr_;
    k.statistics = Statistics(in_data);
    k.gamma = in_data[at_.gamma].dptr_;
    k.moving_mean = aux[kMovingMean].dptr_;
    k.moving_var = aux[kMovingVar].dptr_;
    k.dx_request = ToRequest(req[at_.data]);
    k.dx = in_grad[at_.data].dptr_;
    if (!param_.use_global_stats) {
      // What _syncbn_moments gets back has one consumer, so nothing is ever added to it.
      k.statistics_grad = Plain(req[at_.statistics], in_grad[at_.statistics]);
      k.coefficients_grad = Plain(req[at_.coefficients], in_grad[at_.coefficients]);
      if (k.dx_request == Request::kAdd) Raise("_syncbn_normalize: its data have one consumer.");
    }
    k.gamma_request = ToRequest(req[at_.gamma]);
    k.gamma_grad = in_grad[at_.gamma].dptr_;
    k.beta_request = ToRequest(req[at_.beta]);
    k.beta_grad = in_grad[at_.beta].dptr_;
    Run(Cpu(), k);
  }

 private:
  const double* Statistics(const std::vector<mxnet::TBlob>& in_data) const {
    return param_.use_global_stats ? nullptr : in_data[at_.statistics].dptr<double>();
  }

  static double* Plain(mxnet::OpReqType req, const mxnet::TBlob& grad) {
    if (req == mxnet::kAddTo) Raise("_syncbn_normalize: its statistics have one consumer.");
    return req == mxnet::kNullOp ? nullptr : grad.dptr<double>();
  }

  const NormalizeParam param_;
  const Arguments at_;
};

class NormalizeProperty : public ParameterizedProperty<NormalizeProperty, NormalizeParam> {
 public:
  std::string TypeString() const override { return "_syncbn_normalize"; }
  mxnet::Operator* CreateOperator(mxnet::Context context) const override {
    return new NormalizeOp(param_, context);
  }

  std::vector<std::string> ListArguments() const override {
    if (param_.use_global_stats) return {"data", "gamma", "beta"};
    return {"data", "statistics", "coefficients", "gamma", "beta"};
  }
  std::vector<std::string> ListAuxiliaryStates() const override {
    return {"moving_mean", "moving_var"};
  }

  bool InferShape(mxnet::ShapeVector* in, mxnet::ShapeVector* out,
                  mxnet::ShapeVector* aux) const override {
    const Arguments at(param_.use_global_stats);
    out->resize(1);
    aux->resize(2);
    mxnet::TShape& data = in->at(at.data);
    Unify(&data, &out->at(0), "data");
    if (!mxnet::ndim_is_known(data)) return false;
    const auto channels = data[ChannelAxis(param_.axis, data.ndim())];
    if (!mxnet::dim_size_is_known(channels)) return false;
    mxnet::TShape per_channel(1, channels);
    Unify(&per_channel, &in->at(at.gamma), "gamma");
    Unify(&per_channel, &in->at(at.beta), "beta");
    Unify(&per_channel, &aux->at(kMovingMean), "moving_mean");
    Unify(&per_channel, &aux->at(kMovingVar), "moving_var");
    if (!param_.use_global_stats) {
      const auto c = static_cast<std::size_t>(channels);
      mxnet::TShape statistics = VectorShape(StatisticsSize(c));
      mxnet::TShape coefficients = VectorShape(CoefficientsSize(c));
      Unify(&statistics, &in->at(at.statistics), "statistics");
      Unify(&coefficients, &in->at(at.coefficients), "coefficients");
    }
    return mxnet::shape_is_known(data);
  }

  bool InferType(std::vector<int>* in, std::vector<int>* out,
                 std::vector<int>* aux) const override {
    const Arguments at(param_.use_global_stats);
    out->resize(1, -1);
    aux->resize(2, -1);
    int& data = in->at(at.data);
    Unify(&data, &out->at(0), "data");
    if (!param_.use_global_stats) {
      in->at(at.statistics) = mshadow::kFloat64;
      in->at(at.coefficients) = mshadow::kFloat64;
    }
    if (data == -1) return false;
    int parameter = ParameterType(data);
    Unify(&parameter, &in->at(at.gamma), "gamma");
    Unify(&parameter, &in->at(at.beta), "beta");
    Unify(&parameter, &aux->at(kMovingMean), "moving_mean");
    Unify(&parameter, &aux->at(kMovingVar), "moving_var");
    return true;
  }

  std::vector<int> DeclareBackwardDependency(const std::vector<int>& out_grad,
                                             const std::vector<int>& in_data,
                                             const std::vector<int>&) const override {
    const Arguments at(param_.use_global_stats);
    std::vector<int> needed{out_grad[0], in_data[at.data], in_data[at.gamma]};
    if (!param_.use_global_stats) needed.push_back(in_data[at.statistics]);
    return needed;
  }

  std::vector<std::pair<int, void*>> ForwardInplaceOption(
      const std::vector<int>& in_data, const std::vector<void*>& out_data) const override {
    return {{in_data[0], out_data[0]}};
  }

  // dy becomes the gradient of data.  MXNet 1.9.1 gives the first of several arguments the number
  // of the last, and all others 0 (OpBackInplaceOption in src/nnvm/legacy_op_util.cc), so the
  // gradient that it takes for argument 0 is the second here.
  std::vector<std::pair<int, void*>> BackwardInplaceOption(
      const std::vector<int>& out_grad, const std::vector<int>&, const std::vector<int>&,
      const std::vector<void*>& in_grad) const override {
    return {{out_grad[0], in_grad[1]}};
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
