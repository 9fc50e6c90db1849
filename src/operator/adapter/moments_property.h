// What the operators with which a synchronized layer begins, _syncbn_moments and
// _syncbn_mabn_moments, have in common: data in; data, statistics and backward_context out.
//
// Data are passed through in order to receive g, their gradient after normalization;
// backward_context is an output for the sake of its gradient alone, and is not written in forward,
// because nothing reads it.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "adapter/huge_pages.h"
#include "adapter/operator_property.h"
#include "adapter/operator_util.h"

namespace gluon_syncbn {

enum MomentsOutputs { kOutput, kStatistics, kBackwardContext };

inline MomentsForwardParams ToMomentsParams(int axis, bool compute_statistics,
                                            const std::vector<mxnet::TBlob>& in_data,
                                            const std::vector<mxnet::OpReqType>& req,
                                            const std::vector<mxnet::TBlob>& out_data) {
  const mxnet::TBlob& x = in_data[0];
  MomentsForwardParams p{};
  p.type = ToDataType(x.type_flag_);
  p.shape = ToFeatureShape(x.shape_, axis);
  p.x = x.dptr_;
  p.copy = req[kOutput] == mxnet::kNullOp ? nullptr : out_data[kOutput].dptr_;
  p.compute_statistics = compute_statistics;
  p.statistics = out_data[kStatistics].dptr<double>();
  PreferHugePages(out_data[kOutput]);
  return p;
}

// `Param` has axis.
template <typename Self, typename Param>
class MomentsPropertyBase : public ParameterizedProperty<Self, Param> {
 public:
  // The size of backward_context.
  virtual std::size_t ContextSize(std::size_t channels) const = 0;

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
    const auto channels = data[ChannelAxis(this->param_.axis, data.ndim())];
    if (mxnet::dim_size_is_known(channels)) {
      const auto c = static_cast<std::size_t>(channels);
      out->at(kStatistics) = StatisticsShape(c);
      out->at(kBackwardContext) = VectorShape(ContextSize(c));
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

}  // namespace gluon_syncbn
