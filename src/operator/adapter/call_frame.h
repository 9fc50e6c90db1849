// Whether MXNet may still be inside of its code around a call that has returned.
//
// A call that completes lets its graph be freed by anyone, but after an asynchronous operator has
// returned, MXNet writes to its own record of the call once more, and nothing tells when it has
// done so.  Where the record is decides what is known:
//
//   an imperative call   The record is a local variable of the thread that calls.  Nobody can take
//                        it away, so the call may complete at any time.  (On a GPU MXNet then reads
//                        one number that may be gone; it decides whether to wait for a stream.)
//   a call of a graph    The record is the graph's.  Such a call always runs on a worker of its
//                        device, which took it from the device's queue.  Once that thread comes to
//                        an operation of ours from the queue again, or to another call, it has
//                        left.
#pragma once

#include <mxnet/operator.h>
#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace gluon_syncbn {

class CallFrame {
 public:
  // From the thread that is called, with the very context that MXNet gives.
  explicit CallFrame(const mxnet::OpContext& context)
      : record_is_local_(OnThisStack(&context)), visits_(VisitsOfThisThread()), visit_(Visit()) {}

  bool RecordIsLocal() const { return record_is_local_; }
  // From any thread.  What the caller's thread did in the frame happened before.
  bool Left() const { return record_is_local_ || visits_->load() != visit_; }

  // From an operation of ours that this thread has taken from its device's queue.
  static std::uint64_t Visit() { return ++*VisitsOfThisThread(); }

 private:
  // How often a thread has come to us.  Shared, because calls may outlive their thread.
  using Visits = std::shared_ptr<std::atomic<std::uint64_t>>;

  static const Visits& VisitsOfThisThread() {
    static thread_local const auto visits = std::make_shared<std::atomic<std::uint64_t>>(0);
    return visits;
  }

  // Whether it is a local variable of one of our callers.
  static bool OnThisStack(const void* variable) {
    static thread_local const std::uintptr_t end = EndOfThisStack();
    const auto address = reinterpret_cast<std::uintptr_t>(variable);
    const auto here = reinterpret_cast<std::uintptr_t>(__builtin_frame_address(0));
    constexpr std::size_t kCallers = 256 << 10;  // far more than MXNet's frames up to there take
    return address >= here && address - here < kCallers && address < end;
  }

  static std::uintptr_t EndOfThisStack() {
    std::uintptr_t end = UINTPTR_MAX;
    pthread_attr_t attributes;
    if (pthread_getattr_np(pthread_self(), &attributes) != 0) return end;
    void* lowest = nullptr;
    std::size_t size = 0;
    if (pthread_attr_getstack(&attributes, &lowest, &size) == 0) {
      end = reinterpret_cast<std::uintptr_t>(lowest) + size;
    }
    pthread_attr_destroy(&attributes);
    return end;
  }

  const bool record_is_local_;
  const Visits visits_;
  const std::uint64_t visit_;
};

}  // namespace gluon_syncbn
