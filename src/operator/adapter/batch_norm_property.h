// What the operators that normalize, _syncbn_normalize and _syncbn_batch_norm, have in common:
// their properties for MXNet, and the parameters of their kernels.
//
// Their first argument is data, the last two are gamma and beta, the first output is the result,
// and the auxiliary states are the moving statistics.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "adapter/huge_pages.h"
#include "adapter/operator_property.h"
#include "adapter/operator_util.h"

namespace gluon_syncbn {

// Auxiliary states; the last one exists with cumulative_average only.
enum MovingStatistics { kMovingMean, kMovingVar, kBatches };

using Blobs = std::vector<mxnet::TBlob>;
using Requests = std::vector<mxnet::OpReqType>;

// Sets everything but the statistics.  `Param` has axis, eps, momentum, cumulative_average,
// fix_gamma and use_batch_stats.
template <typename Param>
NormalizeForwardParams ToForwardParams(const Param& param, const Blobs& in_data,
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
  p.gamma = in_data[in_data.size() - 2].dptr_;
  p.beta = in_data.back().dptr_;
  p.moving_mean = aux[kMovingMean].dptr_;
  p.moving_var = aux[kMovingVar].dptr_;
  if (param.cumulative_average) p.batches = aux[kBatches].dptr_;
  p.y_mode = ToWriteMode(req[0]);
  p.y = out_data[0].dptr_;
  PreferHugePages(out_data[0]);
  return p;
}

// Sets what NormalizeBackwardParams and LocalBackwardParams have in common, but for the statistics.
template <typename BackwardParams, typename Param>
BackwardParams ToBackwardParams(const Param& param, const Blobs& out_grad, const Blobs& in_data,
                                const Requests& req, const Blobs& in_grad, const Blobs& aux) {
  const mxnet::TBlob& x = in_data.front();
  const std::size_t gamma = in_data.size() - 2, beta = in_data.size() - 1;
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
  return p;
}

// `Param` has axis and cumulative_average.
template <typename Self, typename Param>
class BatchNormProperty : public ParameterizedProperty<Self, Param> {
 public:
  std::vector<std::string> ListAuxiliaryStates() const override {
    if (!this->param_.cumulative_average) return {"moving_mean", "moving_var"};
    return {"moving_mean", "moving_var", "num_batches_tracked"};
  }

  bool InferShape(mxnet::ShapeVector* in, mxnet::ShapeVector* out,
                  mxnet::ShapeVector* aux) const override {
    out->resize(1);
    aux->resize(ListAuxiliaryStates().size());
    mxnet::TShape& data = in->front();
    Unify(&data, &out->at(0), "data");
    if (!mxnet::ndim_is_known(data)) return false;
    const auto channels = data[ChannelAxis(this->param_.axis, data.ndim())];
    if (!mxnet::dim_size_is_known(channels)) return false;
    mxnet::TShape per_channel(1, channels);
    Unify(&per_channel, &in->at(in->size() - 2), "gamma");
    Unify(&per_channel, &in->back(), "beta");
    Unify(&per_channel, &aux->at(kMovingMean), "moving_mean");
    Unify(&per_channel, &aux->at(kMovingVar), "moving_var");
    if (this->param_.cumulative_average) {
      mxnet::TShape one(1, 1);
      Unify(&one, &aux->at(kBatches), "num_batches_tracked");
    }
    return mxnet::shape_is_known(data);
  }

  bool InferType(std::vector<int>* in, std::vector<int>* out,
                 std::vector<int>* aux) const override {
    out->resize(1, -1);
    aux->resize(ListAuxiliaryStates().size(), -1);
    int& data = in->front();
    Unify(&data, &out->at(0), "data");
    if (data == -1) return false;
    int parameter = ParameterType(data);
    Unify(&parameter, &in->at(in->size() - 2), "gamma");
    Unify(&parameter, &in->back(), "beta");
    Unify(&parameter, &aux->at(kMovingMean), "moving_mean");
    Unify(&parameter, &aux->at(kMovingVar), "moving_var");
    if (this->param_.cumulative_average) {
      Unify(&parameter, &aux->at(kBatches), "num_batches_tracked");
    }
    return true;
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
