// _syncbn_mabn_moments: step 1 of forward, and step 2 of backward, of moving average batch
// normalization.
//
//   forward   data -> data, statistics of this device's shard, backward_context (not written)
//   backward  dy, gz of all devices, and what _syncbn_mabn_normalize knows of the iteration
//             -> gradient of data; updates buffer_gz
//
// As _syncbn_moments, but that backward changes an auxiliary state: buffer_gz has to hold the gz of
// all devices, which is known only here, after the exchange.  (MXNet tells its engine that an
// operator's backward writes its auxiliary states, OpBackMutateInputs in
// src/nnvm/legacy_op_util.cc.)
#include <string>
#include <vector>

#include "adapter/huge_pages.h"
#include "adapter/moments_property.h"
#include "adapter/moving_average_parameters.h"
#include "adapter/operator_device.h"

namespace gluon_syncbn {
namespace {

struct MovingAverageMomentsParam : public dmlc::Parameter<MovingAverageMomentsParam> {
  static constexpr int axis = kMovingAverageAxis;
  int buffer_size;
  int warmup_iters;
  int ndim;
  DMLC_DECLARE_PARAMETER(MovingAverageMomentsParam) {
    GLUON_SYNCBN_DECLARE_MOVING_AVERAGES();
    DMLC_DECLARE_FIELD(ndim).set_default(0).set_lower_bound(0).describe(
        "The number of dimensions that data must have; 0: 2 or more.");
  }
};

class MovingAverageMomentsOp : public mxnet::Operator {
 public:
  MovingAverageMomentsOp(const MovingAverageMomentsParam& param, const mxnet::Context& context)
      : param_(param) {
    RequireDevice(context);
  }

  void Forward(const mxnet::OpContext& ctx, const std::vector<mxnet::TBlob>& in_data,
               const std::vector<mxnet::OpReqType>& req, const std::vector<mxnet::TBlob>& out_data,
               const std::vector<mxnet::TBlob>&) override {
    const auto p = ToMomentsParams(param_.axis, ctx.is_train, in_data, req, out_data);
    OnDevice(ctx, [&](const auto& device) { Run(device, p); });
  }

  void Backward(const mxnet::OpContext& ctx, const std::vector<mxnet::TBlob>& out_grad,
                const std::vector<mxnet::TBlob>&, const std::vector<mxnet::TBlob>& out_data,
                const std::vector<mxnet::OpReqType>& req, const std::vector<mxnet::TBlob>& in_grad,
                const std::vector<mxnet::TBlob>& aux) override {
    const mxnet::TBlob& x = out_data[kOutput];
    MovingAverageBackwardParams p{};
    p.type = ToDataType(x.type_flag_);
    p.shape = ToFeatureShape(x.shape_, param_.axis);
    p.averages = ToMovingAverages(param_);
    p.dy = out_grad[kOutput].dptr_;
    p.x = x.dptr_;
    p.backward_sums = out_grad[kStatistics].dptr<double>();
    p.backward_context = out_grad[kBackwardContext].dptr<double>();
    p.buffer_gz = aux[0].dptr_;
    p.dx_mode = ToWriteMode(req[0]);
    p.dx = in_grad[0].dptr_;
    PreferHugePages(in_grad[0]);
    OnDevice(ctx, [&](const auto& device) { Run(device, p); });
  }

 private:
  const MovingAverageMomentsParam param_;
};

class MovingAverageMomentsProperty
    : public MomentsPropertyBase<MovingAverageMomentsProperty, MovingAverageMomentsParam> {
 public:
  std::string TypeString() const override { return "_syncbn_mabn_moments"; }
  mxnet::Operator* CreateOperator(mxnet::Context context) const override {
    return new MovingAverageMomentsOp(param_, context);
  }
  std::size_t ContextSize(std::size_t channels) const override {
    return MovingAverageContextSize(channels);
  }
  std::vector<std::string> ListAuxiliaryStates() const override { return {"buffer_gz"}; }

  bool InferShape(mxnet::ShapeVector* in, mxnet::ShapeVector* out,
                  mxnet::ShapeVector* aux) const override {
    mxnet::TShape buffer = aux->empty() ? mxnet::TShape() : aux->at(0);
    const bool known = MomentsPropertyBase::InferShape(in, out, aux);
    const mxnet::TShape& data = in->at(0);
    if (mxnet::ndim_is_known(data)) {
      if (param_.ndim != 0 && data.ndim() != param_.ndim) {
        Raise("MABN2d takes an input of ", param_.ndim, " dimensions, (batch, channels, height, ",
              "width), but got ", data.ndim(), "; reshape it, or use SyncBatchNorm.");
      }
      const auto channels = data[ChannelAxis(param_.axis, data.ndim())];
      if (mxnet::dim_size_is_known(channels)) {
        mxnet::TShape needed = BufferShape(param_.buffer_size, channels);
        Unify(&needed, &buffer, "buffer_gz");
      }
    }
    aux->assign(1, buffer);
    return known;
  }

  bool InferType(std::vector<int>* in, std::vector<int>* out,
                 std::vector<int>* aux) const override {
    int buffer = aux->empty() ? -1 : aux->at(0);
    const bool known = MomentsPropertyBase::InferType(in, out, aux);
    if (known) {
      int needed = ParameterType(in->at(0));
      Unify(&needed, &buffer, "buffer_gz");
    }
    aux->assign(1, buffer);
    return known;
  }
};

DMLC_REGISTER_PARAMETER(MovingAverageMomentsParam);

using mxnet::OperatorPropertyReg;
MXNET_REGISTER_OP_PROPERTY(_syncbn_mabn_moments, MovingAverageMomentsProperty)
    .describe("Part of gluon_syncbn's moving average batch normalization: local moments.")
    .add_argument("data", "NDArray-or-Symbol", "The input, with channels as axis 1.")
    .add_argument("buffer_gz", "NDArray-or-Symbol", "Of the last iterations; set in backward.")
    .add_arguments(MovingAverageMomentsParam::__FIELDS__());

}  // namespace
}  // namespace gluon_syncbn
