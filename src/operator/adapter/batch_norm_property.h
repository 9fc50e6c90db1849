// What the operators that normalize, _syncbn_normalize and _syncbn_batch_norm, have in common:
// their properties for MXNet, and the parameters of their kernels.
//
// Their first argument is data, then come others of their own, gamma, beta, and with `add` a
// residual.  The first output is the result, with `renorm` the last (hidden) one is the correction
// for backward, and the auxiliary states are the moving statistics and what `renorm` averages.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "adapter/huge_pages.h"
#include "adapter/operator_property.h"
#include "adapter/operator_util.h"

namespace gluon_syncbn {

// Auxiliary states; the last one exists with cumulative_average only.  Those of `renorm` follow.
enum MovingStatistics { kMovingMean, kMovingVar, kBatches };

using Blobs = std::vector<mxnet::TBlob>;
using Requests = std::vector<mxnet::OpReqType>;

enum ActivationType { kNoActivation, kRelu, kLeakyRelu };

// The parameters of both; `Self` is the derived class, whose declaration calls Declare.
template <typename Self>
struct BatchNormFields : public dmlc::Parameter<Self> {
  int axis;
  double eps;
  double momentum;
  bool cumulative_average;
  bool fix_gamma;
  bool use_batch_stats;
  int activation;
  double slope;
  bool add;
  bool renorm;
  double renorm_momentum;
  double renorm_rmin;
  double renorm_rmax;
  double renorm_dmax;

  std::size_t FirstOfRenorm() const { return cumulative_average ? kBatches + 1 : kBatches; }

  Activation ToActivation() const {
    return {activation != kNoActivation, activation == kLeakyRelu ? slope : 0.0};
  }

 protected:
  void Declare(dmlc::parameter::ParamManagerSingleton<Self>* manager) {
    DMLC_DECLARE_FIELD(axis).set_default(1).describe("The channel axis; negative from the end.");
    DMLC_DECLARE_FIELD(eps).set_default(1e-5).describe("Added to the variance.");
    DMLC_DECLARE_FIELD(momentum).set_default(0.9).describe(
        "The weight of the old moving statistics in the new ones.");
    DMLC_DECLARE_FIELD(cumulative_average)
        .set_default(false)
        .describe(
            "Ignore the momentum: the moving statistics are the average over all batches so far, "
            "which a third auxiliary state counts.");
    DMLC_DECLARE_FIELD(fix_gamma).set_default(false).describe("Treat gamma as 1.");
    DMLC_DECLARE_FIELD(use_batch_stats)
        .set_default(false)
        .describe(
            "Normalize by the batch's own statistics in inference as well, and do not update the "
            "moving statistics.");
    DMLC_DECLARE_FIELD(activation)
        .add_enum("none", kNoActivation)
        .add_enum("relu", kRelu)
        .add_enum("leaky_relu", kLeakyRelu)
        .set_default(kNoActivation)
        .describe("Applied to the result.");
    DMLC_DECLARE_FIELD(slope).set_default(0.01).set_lower_bound(0.0).describe(
        "Of leaky_relu, for negative values.");
    DMLC_DECLARE_FIELD(add).set_default(false).describe(
        "Add one more argument, the residual, before the activation.");
    DMLC_DECLARE_FIELD(renorm).set_default(false).describe(
        "Batch renormalization, https://arxiv.org/abs/1702.03275, by two more auxiliary states.");
    DMLC_DECLARE_FIELD(renorm_momentum)
        .set_default(0.99)
        .describe("With renorm: the weight of the old averages in the new ones.");
    DMLC_DECLARE_FIELD(renorm_rmin)
        .set_default(Renormalization::kNoLimit)
        .describe("With renorm: the least r; -1 for no limit.");
    DMLC_DECLARE_FIELD(renorm_rmax)
        .set_default(Renormalization::kNoLimit)
        .describe("With renorm: the greatest r; -1 for no limit.");
    DMLC_DECLARE_FIELD(renorm_dmax)
        .set_default(Renormalization::kNoLimit)
        .describe("With renorm: the greatest d, and minus the least; -1 for no limit.");
  }
};

// Sets everything but the statistics.  `gamma` is the index of that argument.
template <typename Param>
NormalizeForwardParams ToForwardParams(const Param& param, std::size_t gamma, const Blobs& in_data,
                                       const Requests& req, const Blobs& out_data,
                                       const Blobs& aux) {
  const mxnet::TBlob& x = in_data.front();
  NormalizeForwardParams p{};
  p.type = ToDataType(x.type_flag_);
  p.shape = ToFeatureShape(x.shape_, param.axis);
  p.epsilon = param.eps;
  p.momentum = param.use_batch_stats ? 1.0 : param.momentum;
  p.fix_gamma = param.fix_gamma;
  p.x = x.dptr_;
  p.gamma = in_data[gamma].dptr_;
  p.beta = in_data[gamma + 1].dptr_;
  p.moving_mean = aux[kMovingMean].dptr_;
  p.moving_var = aux[kMovingVar].dptr_;
  if (param.cumulative_average) p.batches = aux[kBatches].dptr_;
  p.y_mode = ToWriteMode(req[0]);
  p.y = out_data[0].dptr_;
  p.activation = param.ToActivation();
  if (param.add) p.residual = in_data[gamma + 2].dptr_;
  if (param.add && p.activation.present && p.y_mode == WriteMode::kAdd) {
    Raise("SyncBatchNorm with add and an activation cannot add to its output (grad_req 'add').");
  }
  if (param.renorm) {
    const std::size_t first = param.FirstOfRenorm();
    p.renorm = {param.renorm_momentum,
                param.renorm_rmin,
                param.renorm_rmax,
                param.renorm_dmax,
                aux[first].dptr_,
                aux[first + 1].dptr_,
                out_data.back().dptr<double>()};
  }
  PreferHugePages(out_data[0]);
  return p;
}

// Sets what NormalizeBackwardParams and LocalBackwardParams have in common, but for the statistics.
template <typename BackwardParams, typename Param>
BackwardParams ToBackwardParams(const Param& param, std::size_t gamma, const Blobs& out_grad,
                                const Blobs& in_data, const Blobs& out_data, const Requests& req,
                                const Blobs& in_grad, const Blobs& aux) {
  const mxnet::TBlob& x = in_data.front();
  const std::size_t beta = gamma + 1, residual = gamma + 2;
  BackwardParams p{};
  p.type = ToDataType(x.type_flag_);
  p.shape = ToFeatureShape(x.shape_, param.axis);
  p.epsilon = param.eps;
  p.fix_gamma = param.fix_gamma;
  p.dy = out_grad[0].dptr_;
  p.x = x.dptr_;
  p.gamma = in_data[gamma].dptr_;
  p.moving_mean = aux[kMovingMean].dptr_;
  p.moving_var = aux[kMovingVar].dptr_;
  PreferHugePages(in_grad[0]);
  p.gamma_grad_mode = ToWriteMode(req[gamma]);
  p.gamma_grad = in_grad[gamma].dptr_;
  p.beta_grad_mode = ToWriteMode(req[beta]);
  p.beta_grad = in_grad[beta].dptr_;
  if (param.renorm) p.correction = out_data.back().dptr<double>();
  p.epilogue.activation = param.ToActivation();
  if (p.epilogue.activation.present) {  // see AddOptionalDependencies
    if (param.add) {
      p.epilogue.y = out_data[0].dptr_;
    } else {
      p.epilogue.beta = in_data[beta].dptr_;
    }
  }
  if (param.add) {
    p.epilogue.residual_grad_mode = ToWriteMode(req[residual]);
    p.epilogue.residual_grad = in_grad[residual].dptr_;
    PreferHugePages(in_grad[residual]);
  }
  return p;
}

// `Param` is derived from BatchNormFields; `gamma` is the index of that argument.
template <typename Self, typename Param, std::size_t gamma>
class BatchNormProperty : public ParameterizedProperty<Self, Param> {
 public:
  std::vector<std::string> ListAuxiliaryStates() const override {
    std::vector<std::string> states{"moving_mean", "moving_var"};
    if (this->param_.cumulative_average) states.push_back("num_batches_tracked");
    if (this->param_.renorm) states.insert(states.end(), {"renorm_mean", "renorm_stddev"});
    return states;
  }

  int NumVisibleOutputs() const override { return 1; }

  bool InferShape(mxnet::ShapeVector* in, mxnet::ShapeVector* out,
                  mxnet::ShapeVector* aux) const override {
    out->resize(this->ListOutputs().size());
    aux->resize(ListAuxiliaryStates().size());
    mxnet::TShape& data = in->front();
    Unify(&data, &out->at(0), "data");
    if (this->param_.add) UnifyResidual(&data, &in->at(gamma + 2));
    if (!mxnet::ndim_is_known(data)) return false;
    const auto channels = data[ChannelAxis(this->param_.axis, data.ndim())];
    if (!mxnet::dim_size_is_known(channels)) return false;
    mxnet::TShape per_channel(1, channels);
    Unify(&per_channel, &in->at(gamma), "gamma");
    Unify(&per_channel, &in->at(gamma + 1), "beta");
    Unify(&per_channel, &aux->at(kMovingMean), "moving_mean");
    Unify(&per_channel, &aux->at(kMovingVar), "moving_var");
    if (this->param_.cumulative_average) {
      mxnet::TShape one(1, 1);
      Unify(&one, &aux->at(kBatches), "num_batches_tracked");
    }
    if (this->param_.renorm) {
      const std::size_t first = this->param_.FirstOfRenorm();
      Unify(&per_channel, &aux->at(first), "renorm_mean");
      Unify(&per_channel, &aux->at(first + 1), "renorm_stddev");
      out->back() = VectorShape(CorrectionSize(static_cast<std::size_t>(channels)));
    }
    return mxnet::shape_is_known(data);
  }

  bool InferType(std::vector<int>* in, std::vector<int>* out,
                 std::vector<int>* aux) const override {
    out->resize(this->ListOutputs().size(), -1);
    aux->resize(ListAuxiliaryStates().size(), -1);
    if (this->param_.renorm) out->back() = mshadow::kFloat64;
    int& data = in->front();
    Unify(&data, &out->at(0), "data");
    if (data == -1) return false;
    int parameter = ParameterType(data);
    Unify(&parameter, &in->at(gamma), "gamma");
    Unify(&parameter, &in->at(gamma + 1), "beta");
    if (this->param_.add) {
      int& residual = in->at(gamma + 2);
      if (residual == -1) residual = data;
      if (residual != data) {
        Raise(
            "SyncBatchNorm: add has another dtype than the data; convert it, for example with "
            "add.astype(data.dtype).");
      }
    }
    Unify(&parameter, &aux->at(kMovingMean), "moving_mean");
    Unify(&parameter, &aux->at(kMovingVar), "moving_var");
    if (this->param_.cumulative_average) {
      Unify(&parameter, &aux->at(kBatches), "num_batches_tracked");
    }
    if (this->param_.renorm) {
      const std::size_t first = this->param_.FirstOfRenorm();
      Unify(&parameter, &aux->at(first), "renorm_mean");
      Unify(&parameter, &aux->at(first + 1), "renorm_stddev");
    }
    return true;
  }

  // What backward reads of renormalization and of what came after normalization.
  void AddOptionalDependencies(const std::vector<int>& in_data, const std::vector<int>& out_data,
                               std::vector<int>* dependency) const {
    if (this->param_.renorm) dependency->push_back(out_data.back());
    if (!this->param_.ToActivation().present) return;
    dependency->push_back(this->param_.add ? out_data[0] : in_data[gamma + 1]);
  }

  std::vector<std::string> WithCorrection(std::vector<std::string> outputs) const {
    if (this->param_.renorm) outputs.push_back("correction");
    return outputs;
  }

  static void UnifyResidual(mxnet::TShape* data, mxnet::TShape* residual) {
    if (mxnet::shape_is_known(*data) && mxnet::shape_is_known(*residual) && *data != *residual) {
      Raise("SyncBatchNorm: add has the shape ", *residual, ", but must have that of the data, ",
            *data, "; it does not broadcast.");
    }
    Unify(data, residual, "add");
  }

  std::vector<std::string> WithResidual(std::vector<std::string> arguments) const {
    if (this->param_.add) arguments.push_back("residual");
    return arguments;
  }

  std::vector<std::pair<int, void*>> ForwardInplaceOption(
      const std::vector<int>& in_data, const std::vector<void*>& out_data) const override {
    return {{in_data[0], out_data[0]}};
  }

  // The gradient of data may share memory with dy.  MXNet 1.9.1 numbers the gradients wrongly if
  // there are several: the first gets the number of the last, and all others get 0
  // (OpBackInplaceOption in src/nnvm/legacy_op_util.cc), so the second one here stands for data.
  std::vector<std::pair<int, void*>> BackwardInplaceOption(
      const std::vector<int>& out_grad, const std::vector<int>&, const std::vector<int>&,
      const std::vector<void*>& in_grad) const override {
    return {{out_grad[0], in_grad[1]}};
  }
};

}  // namespace gluon_syncbn
