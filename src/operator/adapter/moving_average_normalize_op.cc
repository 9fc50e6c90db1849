// _syncbn_mabn_normalize: step 2 of forward, and step 1 of backward, of moving average batch
// normalization.
//
//   forward   data, statistics of all devices, backward_context (not read), gamma, beta -> output,
//             scales (hidden); updates running_var, buffer_x2 and iters
//   backward  dy -> dy as the gradient of data, this device's part of gz as that of the statistics,
//             what belongs to the iteration as that of backward_context, and the gradients of gamma
//             and beta
#include <string>
#include <utility>
#include <vector>

#include "adapter/huge_pages.h"
#include "adapter/moving_average_parameters.h"
#include "adapter/operator_device.h"
#include "adapter/operator_property.h"
#include "adapter/operator_util.h"

namespace gluon_syncbn {
namespace {

using Blobs = std::vector<mxnet::TBlob>;
using Requests = std::vector<mxnet::OpReqType>;

enum Arguments { kData, kStatistics, kBackwardContext, kGamma, kBeta };
enum Outputs { kOutput, kScales };
enum States { kRunningVar, kBufferX2, kIters };

struct MovingAverageNormalizeParam : public dmlc::Parameter<MovingAverageNormalizeParam> {
  static constexpr int axis = kMovingAverageAxis;
  double eps;
  double momentum;
  bool fix_gamma;
  int buffer_size;
  int warmup_iters;
  DMLC_DECLARE_PARAMETER(MovingAverageNormalizeParam) {
    DMLC_DECLARE_FIELD(eps).set_default(1e-5).describe("Added to the second moment.");
    DMLC_DECLARE_FIELD(momentum).set_default(0.98).describe(
        "The weight of the old running_var in the new one.");
    DMLC_DECLARE_FIELD(fix_gamma).set_default(false).describe("Treat gamma as 1.");
    GLUON_SYNCBN_DECLARE_MOVING_AVERAGES();
  }
};

class MovingAverageNormalizeOp : public mxnet::Operator {
 public:
  MovingAverageNormalizeOp(const MovingAverageNormalizeParam& param, const mxnet::Context& context)
      : param_(param) {
    RequireDevice(context);
  }

  void Forward(const mxnet::OpContext& ctx, const Blobs& in_data, const Requests& req,
               const Blobs& out_data, const Blobs& aux) override {
    MovingAverageForwardParams p{};
    p.type = ToDataType(in_data[kData].type_flag_);
    p.shape = ToFeatureShape(in_data[kData].shape_, param_.axis);
    p.averages = ToMovingAverages(param_);
    p.epsilon = param_.eps;
    p.momentum = param_.momentum;
    p.fix_gamma = param_.fix_gamma;
    p.x = in_data[kData].dptr_;
    p.statistics = in_data[kStatistics].dptr<double>();
    p.gamma = in_data[kGamma].dptr_;
    p.beta = in_data[kBeta].dptr_;
    p.running_var = aux[kRunningVar].dptr_;
    p.buffer_x2 = aux[kBufferX2].dptr_;
    p.iters = aux[kIters].dptr_;
    p.scales = out_data[kScales].dptr<double>();
    p.y_mode = ToWriteMode(req[kOutput]);
    p.y = out_data[kOutput].dptr_;
    PreferHugePages(out_data[kOutput]);
    OnDevice(ctx, [&](const auto& device) { Run(device, p); });
  }

  void Backward(const mxnet::OpContext& ctx, const Blobs& out_grad, const Blobs& in_data,
                const Blobs& out_data, const Requests& req, const Blobs& in_grad,
                const Blobs&) override {
    MovingAverageSumsParams p{};
    p.type = ToDataType(in_data[kData].type_flag_);
    p.shape = ToFeatureShape(in_data[kData].shape_, param_.axis);
    p.fix_gamma = param_.fix_gamma;
    p.dy = out_grad[0].dptr_;
    p.x = in_data[kData].dptr_;
    p.statistics = in_data[kStatistics].dptr<double>();
    p.gamma = in_data[kGamma].dptr_;
    p.scales = out_data[kScales].dptr<double>();
    p.dy_copy = ToWrite(req[kData], in_grad[kData]);
    p.backward_sums = static_cast<double*>(ToWrite(req[kStatistics], in_grad[kStatistics]));
    p.backward_context =
        static_cast<double*>(ToWrite(req[kBackwardContext], in_grad[kBackwardContext]));
    p.gamma_grad_mode = ToWriteMode(req[kGamma]);
    p.gamma_grad = in_grad[kGamma].dptr_;
    p.beta_grad_mode = ToWriteMode(req[kBeta]);
    p.beta_grad = in_grad[kBeta].dptr_;
    PreferHugePages(in_grad[kData]);
    OnDevice(ctx, [&](const auto& device) { Run(device, p); });
  }

 private:
  // As in normalize_op.cc: no other operator reads these outputs of _syncbn_mabn_moments.
  static void* ToWrite(mxnet::OpReqType req, const mxnet::TBlob& grad) {
    if (req == mxnet::kAddTo) {
      Raise(
          "_syncbn_mabn_normalize: data, statistics and backward_context must have no other "
          "consumer.");
    }
    return req == mxnet::kNullOp ? nullptr : grad.dptr_;
  }

  const MovingAverageNormalizeParam param_;
};

class MovingAverageNormalizeProperty
    : public ParameterizedProperty<MovingAverageNormalizeProperty, MovingAverageNormalizeParam> {
 public:
  std::string TypeString() const override { return "_syncbn_mabn_normalize"; }
  mxnet::Operator* CreateOperator(mxnet::Context context) const override {
    return new MovingAverageNormalizeOp(param_, context);
  }

  std::vector<std::string> ListArguments() const override {
    return {"data", "statistics", "backward_context", "gamma", "beta"};
  }
  std::vector<std::string> ListOutputs() const override { return {"output", "scales"}; }
  int NumVisibleOutputs() const override { return 1; }
  std::vector<std::string> ListAuxiliaryStates() const override {
    return {"running_var", "buffer_x2", "iters"};
  }

  bool InferShape(mxnet::ShapeVector* in, mxnet::ShapeVector* out,
                  mxnet::ShapeVector* aux) const override {
    out->resize(2);
    aux->resize(3);
    mxnet::TShape& data = in->at(kData);
    Unify(&data, &out->at(kOutput), "data");
    if (!mxnet::ndim_is_known(data)) return false;
    const auto channels = data[ChannelAxis(param_.axis, data.ndim())];
    if (!mxnet::dim_size_is_known(channels)) return false;
    const auto c = static_cast<std::size_t>(channels);
    const auto set = [](mxnet::TShape needed, mxnet::TShape* shape, const char* what) {
      Unify(&needed, shape, what);
    };
    set(StatisticsShape(c), &in->at(kStatistics), "statistics");
    set(VectorShape(MovingAverageContextSize(c)), &in->at(kBackwardContext), "backward_context");
    set(mxnet::TShape(1, channels), &in->at(kGamma), "gamma");
    set(mxnet::TShape(1, channels), &in->at(kBeta), "beta");
    set(mxnet::TShape(1, channels), &aux->at(kRunningVar), "running_var");
    set(BufferShape(param_.buffer_size, channels), &aux->at(kBufferX2), "buffer_x2");
    set(mxnet::TShape(1, 1), &aux->at(kIters), "iters");
    out->at(kScales) = VectorShape(MovingAverageScalesSize(c));
    return mxnet::shape_is_known(data);
  }

  bool InferType(std::vector<int>* in, std::vector<int>* out,
                 std::vector<int>* aux) const override {
    out->resize(2, -1);
    aux->resize(3, -1);
    RequireFloat64(&in->at(kStatistics), "statistics");
    RequireFloat64(&in->at(kBackwardContext), "backward_context");
    out->at(kScales) = mshadow::kFloat64;
    int& data = in->at(kData);
    Unify(&data, &out->at(kOutput), "data");
    if (data == -1) return false;
    int parameter = ParameterType(data);
    Unify(&parameter, &in->at(kGamma), "gamma");
    Unify(&parameter, &in->at(kBeta), "beta");
    Unify(&parameter, &aux->at(kRunningVar), "running_var");
    Unify(&parameter, &aux->at(kBufferX2), "buffer_x2");
    Unify(&parameter, &aux->at(kIters), "iters");
    return true;
  }

  std::vector<int> DeclareBackwardDependency(const std::vector<int>& out_grad,
                                             const std::vector<int>& in_data,
                                             const std::vector<int>& out_data) const override {
    return {out_grad[0], in_data[kData], in_data[kGamma], in_data[kStatistics], out_data[kScales]};
  }

  std::vector<std::pair<int, void*>> ForwardInplaceOption(
      const std::vector<int>& in_data, const std::vector<void*>& out_data) const override {
    return {{in_data[kData], out_data[kOutput]}};
  }

  // The second gradient stands for data; batch_norm_property.h says why.
  std::vector<std::pair<int, void*>> BackwardInplaceOption(
      const std::vector<int>& out_grad, const std::vector<int>&, const std::vector<int>&,
      const std::vector<void*>& in_grad) const override {
    return {{out_grad[0], in_grad[1]}};
  }
};

DMLC_REGISTER_PARAMETER(MovingAverageNormalizeParam);

using mxnet::OperatorPropertyReg;
MXNET_REGISTER_OP_PROPERTY(_syncbn_mabn_normalize, MovingAverageNormalizeProperty)
    .describe("Part of gluon_syncbn's moving average batch normalization: normalization.")
    .add_argument("data", "NDArray-or-Symbol", "The first output of _syncbn_mabn_moments.")
    .add_argument("statistics", "NDArray-or-Symbol", "The statistics of all devices.")
    .add_argument("backward_context", "NDArray-or-Symbol",
                  "Takes numbers back to _syncbn_mabn_moments in backward.")
    .add_argument("gamma", "NDArray-or-Symbol", "The scale, per channel.")
    .add_argument("beta", "NDArray-or-Symbol", "The shift, per channel.")
    .add_argument("running_var", "NDArray-or-Symbol", "The running second moment.")
    .add_argument("buffer_x2", "NDArray-or-Symbol", "The second moments of the last iterations.")
    .add_argument("iters", "NDArray-or-Symbol", "The number of iterations so far.")
    .add_arguments(MovingAverageNormalizeParam::__FIELDS__());

}  // namespace
}  // namespace gluon_syncbn
