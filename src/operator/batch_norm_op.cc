// _syncbn_batch_norm: the whole layer where there is nobody to meet.
//
//   forward   data, gamma, beta -> output; moves the moving statistics
//   backward  dy -> the gradients of data, gamma and beta
//
// For one device, and for layers that normalize by their moving statistics in training, too
// (use_global_stats).  Between its passes over the data it waits for nothing, so it is faster than
// the three operators around an exchange; the results agree.
#include <string>
#include <vector>

#include "batch_norm_property.h"
#include "huge_pages.h"

namespace gluon_syncbn {
namespace {

enum Arguments { kData, kGamma, kBeta };

struct BatchNormParam : public dmlc::Parameter<BatchNormParam> {
  int axis;
  double eps;
  double momentum;
  bool fix_gamma;
  bool use_global_stats;
  DMLC_DECLARE_PARAMETER(BatchNormParam) {
    DMLC_DECLARE_FIELD(axis).set_default(1).describe("The channel axis; negative from the end.");
    DMLC_DECLARE_FIELD(eps).set_default(1e-5).describe("Added to the variance.");
    DMLC_DECLARE_FIELD(momentum).set_default(0.9).describe(
        "How much the moving statistics keep of what they were.");
    DMLC_DECLARE_FIELD(fix_gamma).set_default(false).describe("Treat gamma as 1.");
    DMLC_DECLARE_FIELD(use_global_stats)
        .set_default(false)
        .describe("Normalize by the moving statistics in training, too.");
  }
};

class BatchNormOp : public mxnet::Operator {
 public:
  BatchNormOp(const BatchNormParam& param, const mxnet::Context& context) : param_(param) {
    NeedCpu(context);
  }

  void Forward(const mxnet::OpContext& ctx, const std::vector<mxnet::TBlob>& in_data,
               const std::vector<mxnet::OpReqType>& req, const std::vector<mxnet::TBlob>& out_data,
               const std::vector<mxnet::TBlob>& aux) override {
    const mxnet::TBlob& x = in_data[kData];
    BatchNormForward k{};
    k.type = ToDataType(x.type_flag_);
    k.shape = ToFeatureShape(x.shape_, param_.axis);
    k.epsilon = param_.eps;
    k.momentum = param_.momentum;
    k.fix_gamma = param_.fix_gamma;
    k.x = x.dptr_;
    k.gamma = in_data[kGamma].dptr_;
    k.beta = in_data[kBeta].dptr_;
    k.moving_mean = aux[kMovingMean].dptr_;
    k.moving_var = aux[kMovingVar].dptr_;
    k.y_request = ToRequest(req[0]);
    k.y = out_data[0].dptr_;
    PreferHugePages(out_data[0]);
    const bool measure = ctx.is_train && !param_.use_global_stats;
    if (measure && x.Size() == 0) RaiseEmpty(x.shape_);
    statistics_.resize(measure ? LocalStatisticsSize(k.shape.channels) : 0);
    k.statistics = measure ? statistics_.data() : nullptr;
    Run(Cpu(), k);
  }

  void Backward(const mxnet::OpContext&, const std::vector<mxnet::TBlob>& out_grad,
                const std::vector<mxnet::TBlob>& in_data, const std::vector<mxnet::TBlob>&,
                const std::vector<mxnet::OpReqType>& req, const std::vector<mxnet::TBlob>& in_grad,
                const std::vector<mxnet::TBlob>& aux) override {
    const mxnet::TBlob& x = in_data[kData];
    BatchNormBackward k{};
    k.type = ToDataType(x.type_flag_);
    k.shape = ToFeatureShape(x.shape_, param_.axis);
    k.epsilon = param_.eps;
    k.fix_gamma = param_.fix_gamma;
    k.dy = out_grad[0].dptr_;
    k.x = x.dptr_;
    k.statistics = statistics_.empty() ? nullptr : statistics_.data();
    k.gamma = in_data[kGamma].dptr_;
    k.moving_mean = aux[kMovingMean].dptr_;
    k.moving_var = aux[kMovingVar].dptr_;
    k.dx_request = ToRequest(req[kData]);
    k.dx = in_grad[kData].dptr_;
    PreferHugePages(in_grad[kData]);
    k.gamma_request = ToRequest(req[kGamma]);
    k.gamma_grad = in_grad[kGamma].dptr_;
    k.beta_request = ToRequest(req[kBeta]);
    k.beta_grad = in_grad[kBeta].dptr_;
    Run(Cpu(), k);
  }

 private:
  const BatchNormParam param_;
  // Of the last forward, for its backward; empty: it normalized by the moving statistics.
  std::vector<double> statistics_;
};

class BatchNormOpProperty : public BatchNormProperty<BatchNormOpProperty, BatchNormParam> {
 public:
  std::string TypeString() const override { return "_syncbn_batch_norm"; }
  mxnet::Operator* CreateOperator(mxnet::Context context) const override {
    return new BatchNormOp(param_, context);
  }

  std::vector<std::string> ListArguments() const override { return {"data", "gamma", "beta"}; }

  std::vector<int> DeclareBackwardDependency(const std::vector<int>& out_grad,
                                             const std::vector<int>& in_data,
                                             const std::vector<int>&) const override {
    return {out_grad[0], in_data[kData], in_data[kGamma]};
  }
};

DMLC_REGISTER_PARAMETER(BatchNormParam);

using mxnet::OperatorPropertyReg;
MXNET_REGISTER_OP_PROPERTY(_syncbn_batch_norm, BatchNormOpProperty)
    .describe("Part of gluon_syncbn's synchronized batch normalization: one device alone.")
    .add_argument("data", "NDArray-or-Symbol", "The input, of 2 or more dimensions.")
    .add_argument("gamma", "NDArray-or-Symbol", "The scale, per channel.")
    .add_argument("beta", "NDArray-or-Symbol", "The shift, per channel.")
    .add_argument("moving_mean", "NDArray-or-Symbol", "The moving mean.")
    .add_argument("moving_var", "NDArray-or-Symbol", "The moving variance (biased).")
    .add_arguments(BatchNormParam::__FIELDS__());

}  // namespace
}  // namespace gluon_syncbn
