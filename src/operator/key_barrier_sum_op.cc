// The key-barrier sum as MXNet operators, the only asynchronous ones.
//
//   _contrib_KeyBarrierSum   for users: the sum over all devices, in any mode, differentiable
//   _syncbn_sum              for SyncBatchNorm: only where there is something to sum, in order
//
// Both return at once and complete when the round does.  They run in whichever thread finds them
// ready, so they must be cheap: they copy a small array into the barrier, and a sum out of it.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "operator_property.h"
#include "operator_util.h"
#include "process_barrier.h"

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
            "How many devices take part. (In _syncbn_sum 0 is what ModelDataParallel says, outside "
            "of one the number of visible GPUs, or 1.)");
    DMLC_DECLARE_FIELD(call).set_default(0).describe(
        "Tells apart several uses of one key in one graph, which may run in any order.");
  }
};

std::string ContextName(const mxnet::Context& context) {
  std::ostringstream os;
  os << (context.dev_mask() == mxnet::gpu::kDevMask ? "gpu(" : "cpu(") << context.dev_id << ')';
  return os.str();
}

// CPUs before GPUs, then by number: the order of the sum.
std::uint64_t Participant(const mxnet::Context& context) {
  return (static_cast<std::uint64_t>(context.dev_mask()) << 32) |
         static_cast<std::uint32_t>(context.dev_id);
}

int NumDevices(const KeyBarrierSumParam& param) {
  const int members = ProcessBarrier()->Members(param.key);
  if (members > 0) return members;
  return param.num_devices > 0 ? param.num_devices : std::max(VisibleGpus(), 1);
}

// NaiveEngine aborts the process when an operator does not complete before it returns.
void RefuseNaiveEngine(int num_devices) {
  if (num_devices > 1 && dmlc::GetEnv("MXNET_ENGINE_TYPE", std::string()) == "NaiveEngine") {
    Raise("NaiveEngine runs one operator at a time, so ", num_devices,
          " devices can never meet; unset MXNET_ENGINE_TYPE, or use num_devices=1.");
  }
}

template <typename T>
void Write(mxnet::OpReqType req, const std::vector<double>& from, T* to) {
  if (req == mxnet::kNullOp) return;
  const bool add = req == mxnet::kAddTo;
  for (std::size_t i = 0; i < from.size(); ++i) {
    to[i] = static_cast<T>(add ? to[i] + from[i] : from[i]);
  }
}

void Write(mxnet::OpReqType req, const std::vector<double>& from, const mxnet::TBlob& to) {
  if (to.type_flag_ == mshadow::kFloat64) {
    Write(req, from, to.dptr<double>());
  } else {
    Write(req, from, to.dptr<float>());
  }
}

std::vector<double> Read(const mxnet::TBlob& from) {
  if (from.type_flag_ == mshadow::kFloat64) {
    const double* values = from.dptr<double>();
    return std::vector<double>(values, values + from.Size());
  }
  const float* values = from.dptr<float>();
  return std::vector<double>(values, values + from.Size());
}

// Completes a call: only after it has returned, because MXNet looks at its own record of the call
// then, and a graph that is freed as soon as its result is there would take the record away.  So
// the completion is queued behind the call, to the worker of its device, as an operation of its
// own.  (With MXEnginePushSync, MXNet might put it into one bulk with those who wait for it.)
class Handoff {
 public:
  explicit Handoff(const mxnet::OpContext& ctx)
      : context_(ctx.run_ctx.ctx), on_complete_(ctx.async_on_complete) {}

  // From any thread, once: the result is written, or `error` says why not (empty: none).
  void Ready(const std::string& error) {
    error_ = error;
    if (state_.exchange(kReady) == kLeft) Queue();
  }

  // From the call's thread, at its end.  It stays a moment where the others are about to come: a
  // worker that goes to sleep and is woken again takes longer than most rounds.  Nobody depends on
  // its staying, so nothing can deadlock.
  void Leave(int num_devices) {
    static const int cores = static_cast<int>(std::thread::hardware_concurrency());
    if (num_devices <= cores) {  // else the others need this core
      const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
      while (state_.load() != kReady && std::chrono::steady_clock::now() < end) {
        std::this_thread::yield();
      }
    }
    if (state_.exchange(kLeft) == kReady) Queue();
  }

 private:
  enum State { kInside, kLeft, kReady };

  struct Completion {
    mxnet::engine::CallbackOnComplete on_complete;
    std::string error;

    void Call() const {
      if (error.empty()) return on_complete();
      // The engine keeps a list of failures without a lock; see KeyBarrier::Fail.
      static std::mutex one_at_a_time;
      const std::lock_guard<std::mutex> lock(one_at_a_time);
      const dmlc::Error failure(error);
      on_complete(&failure);
    }
  };

  void Queue() {
    auto completion = std::make_unique<Completion>(Completion{on_complete_, std::move(error_)});
    const int failed = MXEnginePushAsync(
        [](void*, void* done, void* completion) {
          static_cast<Completion*>(completion)->Call();
          (*static_cast<mxnet::engine::CallbackOnComplete*>(done))();
        },
        completion.get(), [](void* completion) { delete static_cast<Completion*>(completion); },
        &context_, nullptr, 0, nullptr, 0);
    if (failed != 0) return completion->Call();
    completion.release();  // the engine deletes it
  }

  mxnet::Context context_;
  const mxnet::engine::CallbackOnComplete on_complete_;
  std::string error_;
  std::atomic<State> state_{kInside};
};

// `only_counted`: sum only vectors that end in a count above 0, as SyncBatchNorm's statistics do.
class KeyBarrierSumOp : public mxnet::Operator {
 public:
  KeyBarrierSumOp(const KeyBarrierSumParam& param, const mxnet::Context& context, bool only_counted)
      : param_(param),
        participant_(Participant(context)),
        name_(ContextName(context)),
        only_counted_(only_counted) {
    NeedCpu(context);
    // Created where the program calls it, run when its input is ready: the turn keeps the order of
    // the program.  A layer's calls are kept in order by the engine, see SyncBNSumProperty.
    if (!only_counted_) turn_ = barrier_->Reserve(param_.key, param_.call, participant_);
  }
  ~KeyBarrierSumOp() override {
    if (turn_ != 0) barrier_->Release(param_.key, param_.call, participant_, turn_);
  }

  void Forward(const mxnet::OpContext& ctx, const std::vector<mxnet::TBlob>& in_data,
               const std::vector<mxnet::OpReqType>& req, const std::vector<mxnet::TBlob>& out_data,
               const std::vector<mxnet::TBlob>&) override {
    std::vector<double> values = Read(in_data[0]);
    exchanged_ = !only_counted_ || values.back() > 0;
    if (!exchanged_) return Pass(values, ctx, req[0], out_data[0]);
    const int num_devices = NumDevices(param_);
    RefuseNaiveEngine(num_devices);
    const std::uint64_t turn = turn_;
    turn_ = 0;
    Exchange(
        {param_.key, param_.call, 0, participant_, name_, num_devices, std::move(values), turn},
        ctx, req[0], out_data[0]);
  }

  void Backward(const mxnet::OpContext& ctx, const std::vector<mxnet::TBlob>& out_grad,
                const std::vector<mxnet::TBlob>&, const std::vector<mxnet::TBlob>&,
                const std::vector<mxnet::OpReqType>& req, const std::vector<mxnet::TBlob>& in_grad,
                const std::vector<mxnet::TBlob>&) override {
    std::vector<double> values = Read(out_grad[0]);
    if (!exchanged_) return Pass(values, ctx, req[0], in_grad[0]);
    Exchange({param_.key, param_.call, round_, participant_, name_, round_devices_,
              std::move(values), 0},
             ctx, req[0], in_grad[0]);
  }

 private:
  static void Pass(const std::vector<double>& values, const mxnet::OpContext& ctx,
                   mxnet::OpReqType req, const mxnet::TBlob& to) {
    Write(req, values, to);
    ctx.async_on_complete();
  }

  // The engine keeps this operator, and the output's memory, until the completion is called.
  void Exchange(Arrival arrival, const mxnet::OpContext& ctx, mxnet::OpReqType req,
                const mxnet::TBlob& to) {
    const bool forward = arrival.lane == 0;
    const int num_devices = arrival.num_devices;
    const auto handoff = std::make_shared<Handoff>(ctx);
    barrier_->Arrive(std::move(arrival), [this, forward, req, to, handoff](const Outcome& outcome) {
      if (outcome.total != nullptr) {
        if (forward) {
          round_ = outcome.round;
          round_devices_ = outcome.num_devices;
        }
        Write(req, *outcome.total, to);
      }
      handoff->Ready(outcome.error);
    });
    handoff->Leave(num_devices);  // `this` may be gone now
  }

  const std::shared_ptr<KeyBarrier> barrier_ = ProcessBarrier();
  const KeyBarrierSumParam param_;
  const std::uint64_t participant_;
  const std::string name_;
  const bool only_counted_;
  // What the last forward was, for its backward: with the devices that took part, and no others.
  // The engine never runs two calls of one operator state at a time.
  bool exchanged_ = true;
  std::uint64_t turn_ = 0;  // until the first forward has used it
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
    mxnet::TShape channels(1, (in->at(0)[0] - 1) / 2);
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
