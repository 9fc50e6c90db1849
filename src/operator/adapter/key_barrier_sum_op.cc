// The key-barrier sum as MXNet operators, the only asynchronous ones.
//
//   _contrib_KeyBarrierSum   for users: the sum over all devices, in any mode, differentiable
//   _syncbn_sum              for SyncBatchNorm: only in training, in order
//
// Both return at once and complete when the round does.  They run in whichever thread finds them
// ready, so they must be cheap: they send a small array into the barrier, and a sum comes out of
// it.
#include <algorithm>
#include <exception>
#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "adapter/asynchronous_call.h"
#include "adapter/host_copy.h"
#include "adapter/operator_device.h"
#include "adapter/operator_property.h"
#include "adapter/operator_util.h"
#include "adapter/passes.h"
#include "exchange/process_barrier.h"

namespace gluon_syncbn {
namespace {

struct KeyBarrierSumParam : public dmlc::Parameter<KeyBarrierSumParam> {
  std::string key;
  int num_devices;
  int call;
  DMLC_DECLARE_PARAMETER(KeyBarrierSumParam) {
    DMLC_DECLARE_FIELD(key).describe(
        "The name under which the devices meet. Calls on one device must come in the same order "
        "on every device.");
    DMLC_DECLARE_FIELD(num_devices)
        .set_default(0)
        .set_lower_bound(0)
        .describe(
            "How many devices take part; it must be given. (In _syncbn_sum 0 is what "
            "ModelDataParallel says, outside of one the number of visible GPUs, or 1.)");
    DMLC_DECLARE_FIELD(call).set_default(0).describe(
        "Tells apart several uses of one key in one graph, which may run in any order. Where a "
        "Block is traced they are numbered; in a symbol of your own, number them.");
  }
};

const char* Kind(const mxnet::Context& context) { return OnGpu(context) ? "gpu" : "cpu"; }

std::string ContextName(const mxnet::Context& context) {
  std::ostringstream os;
  os << Kind(context) << '(' << context.dev_id << ')';
  return os.str();
}

int NumDevices(const KeyBarrierSumParam& param) {
  return param.num_devices > 0 ? param.num_devices : std::max(VisibleGpus(), 1);
}

// What the program is told of a round that failed: the cause, where it is known, comes first.
std::string Explain(const Result& result, const std::string& kind) {
  if (!result.expired) return result.error;
  const std::string checks =
      "that every device runs this layer equally often in every step and that num_devices is the "
      "number of devices that do. A longer deadline: GLUON_SYNCBN_TIMEOUT or "
      "gluon_syncbn.set_timeout.";
  if (!result.shared_sender || kind != "cpu") return result.error + " Check " + checks;
  return "One thread ran several CPU devices that wait for each other, which can last for ever: "
         "MXNet's CPU contexts share temporary space within a thread. Call the network through "
         "ModelDataParallel and take gradients with parallel_backward, which have a thread for "
         "each "
         "device (or start with MXNET_CPU_TEMP_COPY=1000 in the environment, which costs "
         "memory). " +
         result.error + " If that is not the cause, check " + checks;
}

// NaiveEngine runs everything in the thread that pushes it, and aborts the process when an operator
// does not complete before it returns.
bool NaiveEngine() {
  static const bool naive = dmlc::GetEnv("MXNET_ENGINE_TYPE", std::string()) == "NaiveEngine";
  return naive;
}
constexpr char kUnsetNaive[] = "unset MXNET_ENGINE_TYPE";

// `only_counted`: merge statistics, as SyncBatchNorm has them, where they were measured at all.
class KeyBarrierSumOp : public mxnet::Operator {
 public:
  KeyBarrierSumOp(const KeyBarrierSumParam& param, const mxnet::Context& context, bool only_counted)
      : param_(param),
        participant_(Participant(context)),
        kind_(Kind(context)),
        name_(ContextName(context)),
        only_counted_(only_counted) {
    RequireDevice(context);
    const std::hash<std::thread::id> number;
    barrier_->SetSender(param_.key, participant_, number(std::this_thread::get_id()));
    // Made where the program calls it, run when its input is ready: the ticket keeps the order of
    // the program.  An executor is bound long before it runs, if ever, so it takes no ticket, and a
    // layer's calls are kept in order by the engine, see SyncBNSumProperty.
    const CallScope& call = CurrentCall();
    if (only_counted_ || !call.active) return;
    pass_ = call.pass;
    ticket_ = barrier_->TakeTicket(param_.key, param_.call, participant_);
  }
  ~KeyBarrierSumOp() override {
    if (ticket_ != 0) barrier_->ReturnTicket(param_.key, param_.call, participant_, ticket_);
  }

  void Forward(const mxnet::OpContext& ctx, const std::vector<mxnet::TBlob>& in_data,
               const std::vector<mxnet::OpReqType>& req, const std::vector<mxnet::TBlob>& out_data,
               const std::vector<mxnet::TBlob>&) override {
    Exchange(ctx, in_data[0], req[0], out_data[0], true);
  }

  void Backward(const mxnet::OpContext& ctx, const std::vector<mxnet::TBlob>& out_grad,
                const std::vector<mxnet::TBlob>&, const std::vector<mxnet::TBlob>&,
                const std::vector<mxnet::OpReqType>& req, const std::vector<mxnet::TBlob>& in_grad,
                const std::vector<mxnet::TBlob>&) override {
    Exchange(ctx, out_grad[0], req[0], in_grad[0], false);
  }

 private:
  // The engine keeps this operator, and the memory of `from` and `to`, until the completion.
  void Exchange(const mxnet::OpContext& ctx, const mxnet::TBlob& from, mxnet::OpReqType req,
                const mxnet::TBlob& to, bool forward) {
    const bool gpu = OnGpu(ctx.run_ctx.ctx), training = ctx.is_train;
    if (gpu && NaiveEngine())
      Raise("On a GPU, gluon_syncbn needs MXNet's threads; ", kUnsetNaive, ".");
    if (forward) BeginForward();
    const int num_devices = round_devices_;
    const auto call = std::make_shared<AsynchronousCall>(ctx, req, to);
    if (gpu) call->StartWorker();
    ReadValues(ctx.run_ctx.ctx, from, [=](std::vector<double> values, const std::string& error) {
      if (!error.empty()) return call->Fail(error);
      // In inference nobody waits, also where a layer measures its batch (use_batch_stats).
      if (forward) exchanged_ = (training || !only_counted_) && IsExchanged(values, num_devices);
      if (!exchanged_) return call->Succeed(std::move(values));
      if (forward) {
        ArriveForward(std::move(values), call);
      } else {
        ArriveBackward(std::move(values), call);
      }
    });
    static const int cores = static_cast<int>(std::thread::hardware_concurrency());
    call->Return(!gpu && num_devices <= cores);  // with more, the others need this core
    // `this` may be gone now.
  }

  void BeginForward() {
    round_devices_ = NumDevices(param_);
    if (!only_counted_) {
      if (ticket_ == 0) pass_ = 0;  // made in an earlier pass: a graph with static_shape
      return;
    }
    const Pass pass = barrier_->PassOf(param_.key, participant_);
    pass_ = pass.id;
    if (pass.id != 0) round_devices_ = pass.expected;
  }

  bool IsExchanged(const std::vector<double>& values, int num_devices) const {
    if (only_counted_ && !HasStatistics(values.back())) return false;
    if (!NaiveEngine()) return true;
    if (num_devices == 1) return false;
    Raise("NaiveEngine runs one operator at a time, so ", num_devices, " devices can never meet; ",
          kUnsetNaive, ", or use num_devices=1.");
  }

  Arrival NewArrival(std::vector<double> values) const {
    Arrival arrival;
    arrival.key = param_.key;
    arrival.call = param_.call;
    arrival.pass = pass_;
    arrival.participant = participant_;
    arrival.kind = kind_;
    arrival.name = name_;
    arrival.num_devices = round_devices_;
    arrival.values = std::move(values);
    return arrival;
  }

  void ArriveForward(std::vector<double> values, const std::shared_ptr<AsynchronousCall>& call) {
    Arrival arrival = NewArrival(std::move(values));
    // A bare KeyBarrierSum may have been made in a pass on one device and before it on another.
    arrival.phase = only_counted_ ? pass_ : 0;
    arrival.ticket = ticket_;
    ticket_ = 0;
    if (only_counted_) arrival.merge = Merge::kMoments;
    barrier_->Arrive(std::move(arrival), [this, call](const Result& result) {
      round_ = result.round;
      round_devices_ = result.num_devices;
      Finish(call, result);
    });
  }

  void ArriveBackward(std::vector<double> values, const std::shared_ptr<AsynchronousCall>& call) {
    Arrival arrival = NewArrival(std::move(values));
    arrival.phase = round_;
    arrival.backward = true;
    barrier_->Arrive(std::move(arrival),
                     [this, call](const Result& result) { Finish(call, result); });
  }

  void Finish(const std::shared_ptr<AsynchronousCall>& call, const Result& result) const {
    if (result.total == nullptr) return call->Fail(Explain(result, kind_));
    call->Succeed(*result.total);
  }

  const std::shared_ptr<KeyBarrier> barrier_ = ProcessBarrier();
  const KeyBarrierSumParam param_;
  const std::uint64_t participant_;
  const char* const kind_;
  const std::string name_;
  const bool only_counted_;
  // What the last forward was, for its backward: with the devices that took part, and no others.
  // The engine never runs two calls of one operator state at a time.
  bool exchanged_ = true;
  std::uint64_t ticket_ = 0;  // until the first forward has used it
  std::uint64_t pass_ = 0;
  std::uint64_t round_ = 0;
  int round_devices_ = 0;
};

template <typename Self>
class BarrierProperty : public ParameterizedProperty<Self, KeyBarrierSumParam> {
 public:
  void Init(const std::vector<std::pair<std::string, std::string>>& kwargs) override {
    this->param_.Init(kwargs);
    if (this->param_.key.empty()) {
      throw dmlc::ParamError("KeyBarrierSum: key must not be empty; give every exchange a name");
    }
  }
  mxnet::ExecType exec_type() const override { return mxnet::ExecType::kAsync; }

  bool InferShape(mxnet::ShapeVector* in, mxnet::ShapeVector* out,
                  mxnet::ShapeVector*) const override {
    out->resize(1);
    Unify(&in->at(0), &out->at(0), "data");
    return mxnet::shape_is_known(in->at(0));
  }

  bool InferType(std::vector<int>* in, std::vector<int>* out, std::vector<int>*) const override {
    out->resize(1, -1);
    int& type = in->at(0);
    Unify(&type, &out->at(0), "data");
    if (type == -1) return false;
    if (type != mshadow::kFloat32 && type != mshadow::kFloat64) {
      Raise(
          "KeyBarrierSum takes float32 or float64 data; convert the input first, for example "
          "with x.astype('float32').");
    }
    return true;
  }

  std::vector<int> DeclareBackwardDependency(const std::vector<int>& out_grad,
                                             const std::vector<int>&,
                                             const std::vector<int>&) const override {
    return {out_grad[0]};
  }
};

class KeyBarrierSumProperty : public BarrierProperty<KeyBarrierSumProperty> {
 public:
  void Init(const std::vector<std::pair<std::string, std::string>>& kwargs) override {
    BarrierProperty::Init(kwargs);
    if (param_.num_devices == 0) {
      throw dmlc::ParamError("KeyBarrierSum: num_devices must say how many devices take part");
    }
  }
  std::string TypeString() const override { return "_contrib_KeyBarrierSum"; }
  mxnet::Operator* CreateOperator(mxnet::Context context) const override {
    return new KeyBarrierSumOp(param_, context, false);
  }
};

// The moving mean is an auxiliary state that this operator does not touch.  It is there so that
// the engine keeps the calls of one layer on one device in order.  (A graph with static_shape hides
// from the engine that auxiliary states are written; there, `call` tells a layer's uses apart.)
class SyncBNSumProperty : public BarrierProperty<SyncBNSumProperty> {
 public:
  std::string TypeString() const override { return "_syncbn_sum"; }
  mxnet::Operator* CreateOperator(mxnet::Context context) const override {
    return new KeyBarrierSumOp(param_, context, true);
  }
  std::vector<std::string> ListArguments() const override { return {"statistics"}; }
  std::vector<std::string> ListAuxiliaryStates() const override { return {"moving_mean"}; }

  bool InferShape(mxnet::ShapeVector* in, mxnet::ShapeVector* out,
                  mxnet::ShapeVector* aux) const override {
    if (!BarrierProperty::InferShape(in, out, aux)) return false;
    mxnet::TShape channels(1, static_cast<nnvm::dim_t>((in->at(0).Size() - 1) / 2));
    aux->resize(1);
    Unify(&channels, &aux->at(0), "moving_mean");
    return true;
  }

  bool InferType(std::vector<int>* in, std::vector<int>* out,
                 std::vector<int>* aux) const override {
    aux->resize(1, -1);  // _syncbn_normalize, which writes it, says which type
    return BarrierProperty::InferType(in, out, aux);
  }
};

DMLC_REGISTER_PARAMETER(KeyBarrierSumParam);

using mxnet::OperatorPropertyReg;
MXNET_REGISTER_OP_PROPERTY(_contrib_KeyBarrierSum, KeyBarrierSumProperty)
    .describe(R"doc(Sum over all devices that call this operator with the same key.

Every one of `num_devices` devices brings an array of the same shape and gets the sum over all of
them. The call is asynchronous: no thread waits, so devices may come in any order. The sum is taken
in float64 and in a fixed order of devices, so it is the same on every run. Its gradient is the sum
of the gradients. A device that does not come within the deadline (`GLUON_SYNCBN_TIMEOUT` seconds,
default 120) fails the call on every device that did.)doc")
    .add_argument("data", "NDArray-or-Symbol", "What this device brings: float32 or float64.")
    .add_arguments(KeyBarrierSumParam::__FIELDS__());

MXNET_REGISTER_OP_PROPERTY(_syncbn_sum, SyncBNSumProperty)
    .describe("Part of gluon_syncbn's synchronized batch normalization: the exchange.")
    .add_argument("statistics", "NDArray-or-Symbol", "What _syncbn_moments measured.")
    .add_argument("moving_mean", "NDArray-or-Symbol", "Orders the calls of a layer.")
    .add_arguments(KeyBarrierSumParam::__FIELDS__());

}  // namespace
}  // namespace gluon_syncbn
