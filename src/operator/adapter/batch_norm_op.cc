// _syncbn_batch_norm: the unsynchronized layer as a single operator.
//
//   forward   data, gamma, beta and possibly a residual -> output, with an activation if one is
//             wanted, statistics (hidden); updates the moving statistics
//   backward  dy -> the gradients of data, gamma, beta and the residual
//
// It is used on one device, and for layers that use their moving statistics in training as well
// (use_global_stats).  It has no exchange to wait for between its passes over the data, so it is
// faster than the three operators of a synchronized layer; the results agree.
#include <string>
#include <vector>

#include "adapter/batch_norm_property.h"
#include "adapter/operator_device.h"

namespace gluon_syncbn {
namespace {

enum Arguments { kData, kGamma, kBeta };
enum Outputs { kOutput, kStatistics };

struct BatchNormParam : public BatchNormFields<BatchNormParam> {
  bool use_global_stats;
  int spatial_dims;
  DMLC_DECLARE_PARAMETER(BatchNormParam) {
    Declare(manager);
    DMLC_DECLARE_FIELD(use_global_stats)
        .set_default(false)
        .describe("Normalize by the moving statistics in training as well.");
    DMLC_DECLARE_FIELD(spatial_dims)
        .set_default(0)
        .describe(
            "The number of dimensions besides batch and channels that the input must have (with 1, "
            "none is right as well); 0: any number.");
  }
};

class BatchNormOp : public mxnet::Operator {
 public:
  BatchNormOp(const BatchNormParam& param, const mxnet::Context& context) : param_(param) {
    RequireDevice(context);
  }

  void Forward(const mxnet::OpContext& ctx, const Blobs& in_data, const Requests& req,
               const Blobs& out_data, const Blobs& aux) override {
    uses_batch_statistics_ = (ctx.is_train || param_.use_batch_stats) && !param_.use_global_stats;
    const auto p = ToForwardParams(param_, kGamma, in_data, req, out_data, aux);
    double* const statistics = StatisticsOrNull(out_data);
    OnDevice(ctx, [&](const auto& device) { RunLocal(device, p, statistics); });
  }

  void Backward(const mxnet::OpContext& ctx, const Blobs& out_grad, const Blobs& in_data,
                const Blobs& out_data, const Requests& req, const Blobs& in_grad,
                const Blobs& aux) override {
    auto p = ToBackwardParams<LocalBackwardParams>(param_, kGamma, out_grad, in_data, out_data, req,
                                                   in_grad, aux);
    p.statistics = StatisticsOrNull(out_data);
    p.dx_mode = ToWriteMode(req[kData]);
    p.dx = in_grad[kData].dptr_;
    OnDevice(ctx, [&](const auto& device) { RunLocal(device, p); });
  }

 private:
  // Null: the kernels use the moving statistics.
  double* StatisticsOrNull(const Blobs& out_data) const {
    return uses_batch_statistics_ ? out_data[kStatistics].dptr<double>() : nullptr;
  }

  const BatchNormParam param_;
  bool uses_batch_statistics_ = false;  // in the last forward, for its backward
};

class BatchNormOpProperty : public BatchNormProperty<BatchNormOpProperty, BatchNormParam, kGamma> {
 public:
  std::string TypeString() const override { return "_syncbn_batch_norm"; }
  mxnet::Operator* CreateOperator(mxnet::Context context) const override {
    return new BatchNormOp(param_, context);
  }

  std::vector<std::string> ListArguments() const override {
    return WithResidual({"data", "gamma", "beta"});
  }
  std::vector<std::string> ListOutputs() const override {
    return WithCorrection({"output", "statistics"});
  }

  bool InferShape(mxnet::ShapeVector* in, mxnet::ShapeVector* out,
                  mxnet::ShapeVector* aux) const override {
    if (mxnet::ndim_is_known(in->front())) {
      CheckSpatialDims(param_.spatial_dims, in->front().ndim());
    }
    const bool known = BatchNormProperty::InferShape(in, out, aux);
    if (mxnet::shape_is_known(in->at(kGamma))) {
      const auto channels = static_cast<std::size_t>(in->at(kGamma)[0]);
      out->at(kStatistics) = VectorShape(LocalStatisticsSize(channels));
    }
    return known;
  }

  bool InferType(std::vector<int>* in, std::vector<int>* out,
                 std::vector<int>* aux) const override {
    const bool known = BatchNormProperty::InferType(in, out, aux);
    out->at(kStatistics) = mshadow::kFloat64;
    return known;
  }

  std::vector<int> DeclareBackwardDependency(const std::vector<int>& out_grad,
                                             const std::vector<int>& in_data,
                                             const std::vector<int>& out_data) const override {
    std::vector<int> needed{out_grad[kOutput], in_data[kData], in_data[kGamma],
                            out_data[kStatistics]};
    AddOptionalDependencies(in_data, out_data, &needed);
    return needed;
  }
};

DMLC_REGISTER_PARAMETER(BatchNormParam);

using mxnet::OperatorPropertyReg;
MXNET_REGISTER_OP_PROPERTY(_syncbn_batch_norm, BatchNormOpProperty)
    .describe("Part of gluon_syncbn's synchronized batch normalization: the unsynchronized layer.")
    .add_argument("data", "NDArray-or-Symbol", "The input, of 2 or more dimensions.")
    .add_argument("gamma", "NDArray-or-Symbol", "The scale, per channel.")
    .add_argument("beta", "NDArray-or-Symbol", "The shift, per channel.")
    .add_argument("residual", "NDArray-or-Symbol", "With add only: of the shape of data.")
    .add_argument("moving_mean", "NDArray-or-Symbol", "The moving mean.")
    .add_argument("moving_var", "NDArray-or-Symbol", "The moving variance (biased).")
    .add_argument("num_batches_tracked", "NDArray-or-Symbol", "With cumulative_average only.")
    .add_argument("renorm_mean", "NDArray-or-Symbol", "With renorm only: the average mean.")
    .add_argument("renorm_stddev", "NDArray-or-Symbol",
                  "With renorm only: of sqrt(variance + eps).")
    .add_arguments(BatchNormParam::__FIELDS__());

}  // namespace
}  // namespace gluon_syncbn
