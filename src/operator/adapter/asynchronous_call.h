// A call of an asynchronous operator, from its start to its completion.
//
// It is never completed before MXNet has left its own code around the call (call_frame.h).  Where
// that code is a graph's, the result is written and the call completed in an operation of its own
// that is queued to the workers of the call's device: taken by the worker that made the call, it
// completes it; another one puts it back until the first has been seen outside.  A device has one
// worker on a CPU, unless MXNET_CPU_WORKER_NTHREADS says more, and two on a GPU.
// (With MXEnginePushSync, MXNet might put that operation into one bulk with those who wait for it.)
#pragma once

#include <dmlc/logging.h>
#include <mxnet/c_api.h>
#include <mxnet/operator.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "adapter/call_frame.h"
#include "adapter/host_copy.h"

namespace gluon_syncbn {

class AsynchronousCall : public std::enable_shared_from_this<AsynchronousCall> {
 public:
  AsynchronousCall(const mxnet::OpContext& ctx, mxnet::OpReqType req, const mxnet::TBlob& to)
      : frame_(ctx),
        context_(ctx.run_ctx.ctx),
        on_complete_(ctx.async_on_complete),
        req_(req),
        to_(to) {}

  // On a GPU, before a thread of CUDA's may end the call: the engine starts a device's worker when
  // its first operation is queued, and waits until that has set up CUDA.
  void StartWorker() {
    const std::lock_guard<std::mutex> lock(All().starting);
    if (All().started.count(context_.dev_id) != 0) return;
    const auto nothing = [](void*, void* done, void*) {
      (*static_cast<mxnet::engine::CallbackOnComplete*>(done))();
    };
    if (MXEnginePushAsync(nothing, nullptr, nullptr, &context_, nullptr, 0, nullptr, 0) != 0) {
      throw dmlc::Error(MXGetLastError());
    }
    All().started.insert(context_.dev_id);
  }

  // One of these two, once, from any thread.  The call is not complete before Leave.
  void Succeed(std::vector<double> result) {
    result_ = std::move(result);
    if (state_.exchange(kReady) == kReturned && !Deliver()) Complete(nullptr);
  }
  void Fail(const std::string& error) {
    error_ = error;
    if (state_.exchange(kReady) == kReturned && !Deliver()) Complete(nullptr);
  }

  // From the call's thread, at its end.  Where the result is about to come it stays a moment: a
  // worker that goes to sleep and is woken again takes longer than most rounds.  Nobody depends on
  // its staying, so nothing can deadlock.  Throws where the engine takes no operation any more; the
  // engine then completes the call, with this error.
  void Return(bool spin) {
    if (spin) StayUntil([this] { return state_.load() != kRunning; });
    if (state_.exchange(kReturned) == kReady && !Deliver()) throw dmlc::Error(error_);
  }

  // After a fork; see fork_handlers.cc.
  static void EngineHasNewWorkers() {
    const std::lock_guard<std::mutex> lock(All().starting);
    All().started.clear();
  }
  static void RestartInChild() {
    new (&All()) Shared;
  }  // a lock may be another thread's, left behind

 private:
  // What all calls of the process share.
  struct Shared {
    std::mutex failing;     // held by whoever tells the engine of a failure
    std::mutex starting;    // of a GPU's workers
    std::set<int> started;  // the GPUs whose workers run
  };
  static Shared& All() {
    static Shared shared;
    return shared;
  }

  enum State { kRunning, kReturned, kReady };

  // What the engine owns while a completion is queued.
  struct Queued {
    std::shared_ptr<AsynchronousCall> call;
    int times;  // that it has been put back
    bool taken = false;

    static void Run(void* run, void* done, void* self) {
      auto& queued = *static_cast<Queued*>(self);
      queued.taken = true;
      queued.call->Taken(static_cast<mxnet::RunContext*>(run), queued.times);
      (*static_cast<mxnet::engine::CallbackOnComplete*>(done))();
    }
    // When the process ends, the engine no longer runs what is queued: a worker throws it away.
    static void Delete(void* self) {
      const std::unique_ptr<Queued> queued(static_cast<Queued*>(self));
      if (queued->taken) return;
      if (self == Pushed()) {
        Pushed() = nullptr;
      } else {
        queued->call->Taken(nullptr, queued->times);
      }
    }
    // What this thread is pushing; null once it is gone.  A push that fails deletes it, and so does
    // one during which a worker has thrown it away: MXNet's last copy is the pusher's.
    static void*& Pushed() {
      static thread_local void* pushed = nullptr;
      return pushed;
    }
  };

  template <typename Predicate>
  static void StayUntil(const Predicate& predicate) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
    while (!predicate() && std::chrono::steady_clock::now() < end) std::this_thread::yield();
  }

  // Once both Leave and a result have come.  False: it failed, and the call is still to be
  // completed.
  bool Deliver() {
    // A result on a GPU is written on its worker's stream.
    if (!frame_.RecordIsLocal() || OnGpu(context_)) return Queue(0);
    const mxnet::RunContext here{context_, nullptr, nullptr, false};
    Complete(&here);
    return true;
  }

  bool Queue(int times) {
    for (;;) {
      auto queued = std::make_unique<Queued>(Queued{shared_from_this(), times});
      void* const outer = std::exchange(Queued::Pushed(), queued.get());
      // The engine owns it from here on, whether this fails or not.
      const int failed = MXEnginePushAsync(&Queued::Run, queued.release(), &Queued::Delete,
                                           &context_, nullptr, 0, nullptr, 0);
      const bool gone = std::exchange(Queued::Pushed(), outer) == nullptr;
      if (failed != 0 && error_.empty()) error_ = MXGetLastError();
      if (failed != 0 || !gone) return failed == 0;
      if (frame_.Left()) {
        Complete(nullptr);
        return true;
      }
    }
  }

  // By a worker of the device, from its queue.  `run`: null where nobody will see the result.
  void Taken(const mxnet::RunContext* run, int times) {
    CallFrame::Visit();
    if (frame_.Left() || !Queue(times + 1)) return Complete(run);
    // Let the worker that made the call be the next who takes it.  One that has left but is busy
    // with something else may be so for long.
    if (times < 4) {
      StayUntil([this] { return frame_.Left(); });
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
  }

  void Complete(const mxnet::RunContext* run) {
    try {
      if (run != nullptr && error_.empty()) WriteValues(*run, result_, req_, to_);
    } catch (const std::exception& e) {
      error_ = e.what();
    }
    if (error_.empty()) return on_complete_();
    // The engine adds each failure to a list that has no lock
    // (ThreadedEngine::AddToGlobalExceptions), so ours come one after the other.  What depends on a
    // failed result looks for that failure in the list, finds it, and adds nothing.
    const std::lock_guard<std::mutex> lock(All().failing);
    // They may be looking right now, for the failure before this one, on another worker.
    std::this_thread::sleep_for(std::chrono::microseconds(200));
    const dmlc::Error failure(error_);
    on_complete_(&failure);
  }

  const CallFrame frame_;
  mxnet::Context context_;
  const mxnet::engine::CallbackOnComplete on_complete_;
  const mxnet::OpReqType req_;
  const mxnet::TBlob to_;
  std::vector<double> result_;
  std::string error_;
  std::atomic<State> state_{kRunning};
};

}  // namespace gluon_syncbn
