// The exchange as MXNet operators, the only asynchronous ones.
//
//   _contrib_KeyBarrierSum   for users: the sum over all devices, in any mode, differentiable
//   _syncbn_sum              for SyncBatchNorm: merges statistics in training, passes them on
//                            otherwise
//
// Both return at once, and complete when their round does.  MXNet runs them in whichever thread
// finds them ready, so they do little: they send a small array to the barrier and write the result.
#include <algorithm>
#include <atomic>
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
        "The name of the exchange. Its calls must have the same order on every device.");
    DMLC_DECLARE_FIELD(num_devices)
        .set_default(0)
        .set_lower_bound(0)
        .describe(
            "How many devices take part; required. (In _syncbn_sum, 0 stands for the number of "
            "devices of the ModelDataParallel; outside of one, for 1 if the layer is synchronized "
            "over processes, and else for the number of visible GPUs, or 1 if there is none.)");
    DMLC_DECLARE_FIELD(call).set_default(0).describe(
        "Tells apart several uses of one key in one graph, which may run in any order. They are "
        "numbered when a Block is traced; in a symbol of your own, number them.");
  }
};

const char* Kind(const mxnet::Context& context) { return OnGpu(context) ? "gpu" : "cpu"; }

std::string ContextName(const mxnet::Context& context) {
  std::ostringstream os;
  os << Kind(context) << '(' << context.dev_id << ')';
  return os.str();
}

int NumDevices(const KeyBarrierSumParam& param, const KeyBarrier& barrier) {
  if (param.num_devices > 0) return param.num_devices;
  return barrier.HasTransport(param.key) ? 1 : std::max(VisibleGpus(), 1);
}

// What to do about the likeliest cause of a deadline.
std::string Advice(Cause cause) {
  const std::string longer =
      "for a longer deadline, set GLUON_SYNCBN_TIMEOUT or call gluon_syncbn.set_timeout.";
  switch (cause) {
    case Cause::kOneSender:
      return "CPU contexts of one thread can deadlock, because they share temporary space. Call "
             "the network through ModelDataParallel and take gradients with parallel_backward, "
             "which use a thread per device (or start with MXNET_CPU_TEMP_COPY=1000 in the "
             "environment, which costs memory). If it is only slow: " +
             longer;
    case Cause::kDifferentKeys:
      return "If that is meant to be one layer: let all devices use one network, initialized with "
             "ctx=ctx_list, not one network each; and give a KeyBarrierSum the same key on every "
             "device.";
    case Cause::kDifferentPaths:
      return "In a step, every device must run the same layers: let no branch depend on the device "
             "or on its data.";
    case Cause::kNoBackward:
      return "Give the losses of all devices to one call of parallel_backward. "
             "(autograd.backward runs them in one thread, which can deadlock on CPU contexts.) If "
             "that is so: " +
             longer;
    case Cause::kTooFew:
      return "Set num_devices to the number of devices that run this layer; or leave it out, and "
             "call the network through ModelDataParallel. If the others are only slow: " +
             longer;
    case Cause::kNotThisKey:
      return "Run this layer on them as well, or set num_devices to the number of devices that "
             "run it.";
    case Cause::kLate:
      return "After a failure, begin the step anew on every device.";
    case Cause::kEarlierCall:
      return "Look at what that call waits for, since a device's calls run in the program's order. "
             "If it is only slow: " +
             longer;
    case Cause::kSlow:
      return "It is still running; " + longer;
    case Cause::kStopped:
      return "Look at what that device does: whether it failed, waits for something, or runs this "
             "layer less often than the others. If it is only slow: " +
             longer;
    case Cause::kUnknown:
      break;
  }
  return "Check that every device runs this layer equally often in every step and that num_devices "
         "is the number of devices that do; " +
         longer;
}

// The message of a round that failed, with advice in the terms of MXNet and of the layer, which the
// exchange does not know.  The cause comes before the symptom.
std::string Explain(const Result& result) {
  switch (result.failure) {
    case Failure::kDifferentMerge:
      return result.error + " Give a KeyBarrierSum and a SyncBatchNorm layer different keys.";
    case Failure::kDifferentLength:
      return result.error + " For a SyncBatchNorm layer: the same number of channels.";
    case Failure::kProcessDeadline:
      return result.error +
             " For a longer deadline, set GLUON_SYNCBN_TIMEOUT or call gluon_syncbn.set_timeout.";
    case Failure::kDeadline:
      if (result.diagnosis.text.empty()) return result.error + ' ' + Advice(Cause::kUnknown);
      return result.diagnosis.text + ' ' + Advice(result.diagnosis.cause) + ' ' + result.error;
    default:
      return result.error;
  }
}

// NaiveEngine runs every operation in the thread that pushes it, and aborts the process if an
// operator has not completed when it returns.
bool NaiveEngine() {
  static const bool naive = dmlc::GetEnv("MXNET_ENGINE_TYPE", std::string()) == "NaiveEngine";
  return naive;
}
constexpr char kUnsetNaive[] = "unset MXNET_ENGINE_TYPE";

// `merge`: kSum for _contrib_KeyBarrierSum, kMoments for _syncbn_sum.
class KeyBarrierSumOp : public mxnet::Operator {
 public:
  KeyBarrierSumOp(const KeyBarrierSumParam& param, const mxnet::Context& context, Merge merge)
      : param_(param),
        participant_(Participant(context)),
        kind_(Kind(context)),
        name_(ContextName(context)),
        merge_(merge) {
    RequireDevice(context);
    const auto called = barrier_->NoteCall(param_.key, participant_, name_, Sender());
    // The operator is created when the program calls it, and runs when its input is ready: the
    // ticket keeps the program's order.  An executor may run long after it is bound, if ever, so it
    // takes no ticket; the engine keeps the calls of a layer in order (SyncBNSumProperty).
    const CallScope& call = CurrentCall();
    if (call.active) called_ = called;
    if (ForLayer() || !call.active) return;
    pass_ = call.pass;
    ticket_ = barrier_->TakeTicket(param_.key, param_.call, participant_, pass_);
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
  // The thread that calls.  GPUs have temporary space of their own, so those of one thread do not
  // wait for each other.
  std::uint64_t Sender() const {
    static std::atomic<std::uint64_t> threads{0};
    static thread_local const std::uint64_t number = ++threads;  // the system's ids are used again
    return kind_ == std::string("gpu") ? participant_ : number;
  }

  bool ForLayer() const { return merge_ == Merge::kMoments; }

  // The engine keeps this operator and the memory of `from` and `to` until the call completes.
  void Exchange(const mxnet::OpContext& ctx, const mxnet::TBlob& from, mxnet::OpReqType req,
                const mxnet::TBlob& to, bool forward) {
    const bool gpu = OnGpu(ctx.run_ctx.ctx), training = ctx.is_train;
    if (gpu && NaiveEngine())
      Raise("On a GPU, gluon_syncbn needs MXNet's threads; ", kUnsetNaive, ".");
    if (forward) BeginForward();
    const int num_devices = round_devices_;
    const bool may_spin = MaySpin();
    const auto call = std::make_shared<AsynchronousCall>(ctx, req, to);
    if (gpu) call->StartWorker();
    ReadValues(ctx.run_ctx.ctx, from, [=](std::vector<double> values, const std::string& error) {
      if (!error.empty()) return call->Fail(error);
      // A layer exchanges nothing in inference, even if it computes statistics (use_batch_stats).
      if (forward) exchanged_ = (training || !ForLayer()) && IsExchanged(values, num_devices);
      if (!exchanged_) return call->Succeed(std::move(values));
      if (forward) {
        ArriveForward(std::move(values), call);
      } else {
        ArriveBackward(std::move(values), call);
      }
    });
    call->Return(may_spin);
    // `this` may be gone now.
  }

  // With more devices than cores, the others need this one.
  bool MaySpin() const {
    static const int cores = static_cast<int>(std::thread::hardware_concurrency());
    return kind_ == std::string("cpu") && round_devices_ <= cores;
  }

  void BeginForward() {
    round_devices_ = NumDevices(param_, *barrier_);
    if (!ForLayer()) {
      if (ticket_ == 0) pass_ = 0;  // created in an earlier pass: a graph with static_shape
      return;
    }
    const Pass pass = barrier_->PassOf(param_.key, participant_);
    pass_ = pass.id;
    if (pass.id != 0) round_devices_ = pass.expected;
  }

  bool IsExchanged(const std::vector<double>& values, int num_devices) const {
    if (ForLayer() && !HasStatistics(values.back())) return false;
    if (!NaiveEngine()) return true;
    if (num_devices == 1 && !barrier_->HasTransport(param_.key)) return false;
    Raise("NaiveEngine runs one operator at a time, so ", num_devices,
          " devices cannot exchange anything, nor can processes; ", kUnsetNaive,
          ", or use num_devices=1.");
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
    arrival.merge = Merge::kSum;
    arrival.spin = MaySpin();
    return arrival;
  }

  void ArriveForward(std::vector<double> values, const std::shared_ptr<AsynchronousCall>& call) {
    Arrival arrival = NewArrival(std::move(values));
    // A bare KeyBarrierSum may have been created in a pass on one device and before it on another.
    arrival.phase = ForLayer() ? pass_ : 0;
    arrival.ticket = ticket_;
    ticket_ = 0;
    arrival.called = called_;
    called_ = {};
    arrival.merge = merge_;
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
    if (result.total == nullptr) return call->Fail(Explain(result));
    call->Succeed(*result.total);
  }

  const std::shared_ptr<KeyBarrier> barrier_ = ProcessBarrier();
  const KeyBarrierSumParam param_;
  const std::uint64_t participant_;
  const char* const kind_;
  const std::string name_;
  const Merge merge_;
  // Of the last forward, for its backward, which joins the same devices.  The engine never runs two
  // calls of one operator state at a time.
  bool exchanged_ = true;
  std::uint64_t ticket_ = 0;    // until the first forward has used it
  Clock::time_point called_{};  // when, known until then
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
    return new KeyBarrierSumOp(param_, context, Merge::kSum);
  }
};

// The moving mean is an auxiliary state that this operator does not touch.  To the engine it is
// written, so the calls of a layer on one device run one after the other, in the program's order.
// (With static_shape, MXNet does not tell the engine of auxiliary states that a graph writes;
// there, `call` tells a layer's uses apart.)
class SyncBNSumProperty : public BarrierProperty<SyncBNSumProperty> {
 public:
  std::string TypeString() const override { return "_syncbn_sum"; }
  mxnet::Operator* CreateOperator(mxnet::Context context) const override {
    return new KeyBarrierSumOp(param_, context, Merge::kMoments);
  }
  std::vector<std::string> ListArguments() const override { return {"statistics"}; }
  std::vector<std::string> ListAuxiliaryStates() const override { return {"moving_mean"}; }

  bool InferShape(mxnet::ShapeVector* in, mxnet::ShapeVector* out,
                  mxnet::ShapeVector* aux) const override {
    if (!BarrierProperty::InferShape(in, out, aux)) return false;
    const std::size_t size = in->at(0).Size();
    if (size % 2 == 0) {
      Raise("SyncBatchNorm: statistics are an odd number of values, but ", size, " were given.");
    }
    mxnet::TShape channels(1, static_cast<nnvm::dim_t>(size / 2));
    aux->resize(1);
    Unify(&channels, &aux->at(0), "moving_mean");
    return true;
  }

  bool InferType(std::vector<int>* in, std::vector<int>* out,
                 std::vector<int>* aux) const override {
    aux->resize(1, -1);  // its type is inferred from _syncbn_normalize
    return BarrierProperty::InferType(in, out, aux);
  }
};

DMLC_REGISTER_PARAMETER(KeyBarrierSumParam);

using mxnet::OperatorPropertyReg;
MXNET_REGISTER_OP_PROPERTY(_contrib_KeyBarrierSum, KeyBarrierSumProperty)
    .describe(R"doc(Sum over all devices that call this operator with the same key.

An all-reduce: each of `num_devices` devices contributes an array of the same shape and gets the sum
of all. The call is asynchronous: no thread waits, so devices may arrive in any order. The sum is
taken in float64 and in a fixed order of devices, so it is the same, bit for bit, on every run. Its
gradient is the sum of the gradients. If a device does not arrive within the timeout
(`GLUON_SYNCBN_TIMEOUT` seconds, by default 120), the call fails on every device that did.)doc")
    .add_argument("data", "NDArray-or-Symbol", "This device's contribution: float32 or float64.")
    .add_arguments(KeyBarrierSumParam::__FIELDS__());

MXNET_REGISTER_OP_PROPERTY(_syncbn_sum, SyncBNSumProperty)
    .describe("Part of gluon_syncbn's synchronized batch normalization: the exchange.")
    .add_argument("statistics", "NDArray-or-Symbol", "The statistics from _syncbn_moments.")
    .add_argument("moving_mean", "NDArray-or-Symbol",
                  "Not used; it keeps the calls of a layer in order.")
    .add_arguments(KeyBarrierSumParam::__FIELDS__());

}  // namespace
}  // namespace gluon_syncbn
