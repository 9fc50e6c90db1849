// A call of an asynchronous operator, from its start to its completion.
//
// Its result is written, and the call completed, in an operation of its own that is queued to the
// device's worker: only after the call has returned, because MXNet looks at its own record of the
// call then, and a graph that is freed as soon as its result is there would take the record away.
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
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "device_values.h"

namespace gluon_syncbn {

class AsynchronousCall : public std::enable_shared_from_this<AsynchronousCall> {
 public:
  AsynchronousCall(const mxnet::OpContext& ctx, mxnet::OpReqType req, const mxnet::TBlob& to)
      : context_(ctx.run_ctx.ctx), on_complete_(ctx.async_on_complete), req_(req), to_(to) {}

  // On a GPU, before a thread of CUDA's may end the call: the engine starts a device's worker when
  // its first operation is queued, and waits until that has set up CUDA.
  void NeedWorker() {
    static std::mutex mutex;
    static std::set<int> started;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!started.insert(context_.dev_id).second) return;
    const auto nothing = [](void*, void* done, void*) {
      (*static_cast<mxnet::engine::CallbackOnComplete*>(done))();
    };
    MXEnginePushAsync(nothing, nullptr, nullptr, &context_, nullptr, 0, nullptr, 0);
  }

  // One of these three, once; the first two from any thread.
  void Succeed(std::vector<double> result) {
    result_ = std::move(result);
    if (state_.exchange(kReady) == kLeft) Queue();
  }
  void Fail(const std::string& error) {
    error_ = error;
    if (state_.exchange(kReady) == kLeft) Queue();
  }

  // On a CPU and from the call's own thread: the call is complete when this returns.  For calls
  // after which whoever comes next needs this thread, so that nobody can be ahead of it.
  void SucceedNow(const std::vector<double>& result) {
    WriteValues({context_, nullptr, nullptr, false}, result, req_, to_);
    state_ = kComplete;
    on_complete_();
  }

  // From the call's thread, at its end.  Where the result is about to come it stays a moment: a
  // worker that goes to sleep and is woken again takes longer than most rounds.  Nobody depends on
  // its staying, so nothing can deadlock.
  void Leave(bool linger) {
    if (linger) {
      const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
      while (state_.load() == kInside && std::chrono::steady_clock::now() < end) {
        std::this_thread::yield();
      }
    }
    left_at_ = std::chrono::steady_clock::now();
    if (state_.exchange(kLeft) == kReady) Queue();
  }

 private:
  enum State { kInside, kLeft, kReady, kComplete };

  void Queue() {
    using Self = std::shared_ptr<AsynchronousCall>;
    auto self = std::make_unique<Self>(shared_from_this());
    const int failed = MXEnginePushAsync(
        [](void* run, void* done, void* self) {
          (*static_cast<Self*>(self))->Complete(static_cast<mxnet::RunContext*>(run));
          (*static_cast<mxnet::engine::CallbackOnComplete*>(done))();
        },
        self.get(),
        // When the process ends, the engine no longer runs what is queued, but deletes it.
        [](void* self) {
          const std::unique_ptr<Self> call(static_cast<Self*>(self));
          (*call)->Complete(nullptr);
        },
        &context_, nullptr, 0, nullptr, 0);
    if (failed == 0) {
      self.release();  // the engine deletes it
    } else {
      error_ = MXGetLastError();
      Complete(nullptr);
    }
  }

  // `run`: null where nobody will see the result.
  void Complete(const mxnet::RunContext* run) {
    if (state_.exchange(kComplete) == kComplete) return;
    // On another worker of the device (a GPU has two) the call may be just about to return.
    const auto returned = left_at_ + std::chrono::microseconds(50);
    while (run != nullptr && std::this_thread::get_id() != caller_ &&
           std::chrono::steady_clock::now() < returned) {
      std::this_thread::yield();
    }
    try {
      if (run != nullptr && error_.empty()) WriteValues(*run, result_, req_, to_);
    } catch (const std::exception& e) {
      error_ = e.what();
    }
    if (error_.empty()) return on_complete_();
    // The engine keeps a list of failures without a lock; see KeyBarrier::Fail.
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const dmlc::Error failure(error_);
    on_complete_(&failure);
  }

  mxnet::Context context_;
  const mxnet::engine::CallbackOnComplete on_complete_;
  const mxnet::OpReqType req_;
  const mxnet::TBlob to_;
  const std::thread::id caller_ = std::this_thread::get_id();
  std::chrono::steady_clock::time_point left_at_;
  std::vector<double> result_;
  std::string error_;
  std::atomic<State> state_{kInside};
};

}  // namespace gluon_syncbn
