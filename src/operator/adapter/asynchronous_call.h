// A call of an asynchronous operator, from its start to its completion.
//
// It must not complete before MXNet has left its own code around the call (call_frame.h).  So in a
// graph, an operation of our own is queued to the workers of the call's device, which writes the
// result and completes the call.  The worker that made the call has left it when it takes the
// operation; another worker queues it again until the first has been seen outside.  A CPU context
// has one worker, or MXNET_CPU_WORKER_NTHREADS; a GPU has two.
// (MXEnginePushSync would not do: MXNet might bulk the operation with those that wait for it.)
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

  // Starts the GPU's workers.  Call it before a thread of CUDA's may end the call: the engine
  // starts them when their first operation is queued, and then waits for them to initialize CUDA,
  // which a callback of CUDA's must not do.
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

  // Call one of these two, once, from any thread.  The call does not complete before Return.
  void Succeed(std::vector<double> result) {
    result_ = std::move(result);
    if (state_.exchange(kReady) == kReturned && !Deliver()) Complete(nullptr);
  }
  void Fail(const std::string& error) {
    error_ = error;
    if (state_.exchange(kReady) == kReturned && !Deliver()) Complete(nullptr);
  }

  // Call it at the end of the call, from its thread.  With `spin` it waits up to 50 us for the
  // result, because to put a worker to sleep and wake it again takes longer than most rounds.
  // Nothing depends on this wait, so it cannot deadlock.  Throws if the engine accepts no operation
  // any more; the engine then completes the call with this error.
  void Return(bool spin) {
    if (spin) SpinUntil([this] { return state_.load() != kRunning; });
    if (state_.exchange(kReturned) == kReady && !Deliver()) throw dmlc::Error(error_);
  }

  // After a fork; see fork_handlers.cc.
  static void EngineHasNewWorkers() {
    const std::lock_guard<std::mutex> lock(All().starting);
    All().started.clear();
  }
  static void RestartInChild() {
    new (&All()) Shared;  // not destroyed first: a thread that the child lacks may hold its locks
  }

 private:
  // Shared by all calls of the process.
  struct Shared {
    std::mutex failing;     // held while the engine is told of a failure
    std::mutex starting;    // guards `started`
    std::set<int> started;  // GPUs with running workers
  };
  static Shared& All() {
    static Shared shared;
    return shared;
  }

  enum State { kRunning, kReturned, kReady };

  // A completion in the engine's queue, which owns it.
  struct Queued {
    std::shared_ptr<AsynchronousCall> call;
    int times;  // how often it was queued again
    bool taken = false;

    static void Run(void* run, void* done, void* self) {
      auto& queued = *static_cast<Queued*>(self);
      queued.taken = true;
      queued.call->Taken(static_cast<mxnet::RunContext*>(run), queued.times);
      (*static_cast<mxnet::engine::CallbackOnComplete*>(done))();
    }
    // When the process ends, the engine deletes queued operations without running them.
    static void Delete(void* self) {
      const std::unique_ptr<Queued> queued(static_cast<Queued*>(self));
      if (queued->taken) return;
      if (self == Pushed()) {
        Pushed() = nullptr;
      } else {
        queued->call->Taken(nullptr, queued->times);
      }
    }
    // What this thread is pushing; null once it has been deleted.  That happens inside the push if
    // the push fails, and also if a worker discards the operation meanwhile, because then the
    // pushing thread holds the last copy.
    static void*& Pushed() {
      static thread_local void* pushed = nullptr;
      return pushed;
    }
  };

  template <typename Predicate>
  static void SpinUntil(const Predicate& predicate) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
    while (!predicate() && std::chrono::steady_clock::now() < end) std::this_thread::yield();
  }

  // Called once both Return and a result have come.  Returns false if it failed and the call is
  // still to be completed.
  bool Deliver() {
    // On a GPU, results are written on the stream of a worker.
    if (!frame_.RecordIsLocal() || OnGpu(context_)) return Queue(0);
    const mxnet::RunContext here{context_, nullptr, nullptr, false};
    Complete(&here);
    return true;
  }

  bool Queue(int times) {
    for (;;) {
      auto queued = std::make_unique<Queued>(Queued{shared_from_this(), times});
      void* const outer = std::exchange(Queued::Pushed(), queued.get());
      // The engine takes ownership even if this fails.
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

  // Called by a worker of the device.  `run` is null if the result cannot be written any more.
  void Taken(const mxnet::RunContext* run, int times) {
    CallFrame::Visit();
    if (frame_.Left() || !Queue(times + 1)) return Complete(run);
    // Give the worker that made the call time to take the operation.  If it is busy with something
    // else, that may be long.
    if (times < 4) {
      SpinUntil([this] { return frame_.Left(); });
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
    // The engine appends each failure to a list that has no lock
    // (ThreadedEngine::AddToGlobalExceptions), so we report ours one at a time.  Operations that
    // depend on a failed result only search the list, since the failure is in it.
    const std::lock_guard<std::mutex> lock(All().failing);
    // On another worker they may be searching for the previous failure: give them time.
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
