// Whether MXNet may still be in its own code around a call that has returned.
//
// Once a call is complete, its graph may be freed.  But after an asynchronous operator has
// returned, MXNet writes to its record of the call once more, and does not say when it has.  What
// is known depends on where the record is:
//
//   imperative call   The record is a local variable of the calling thread and outlives the write,
//                     so the call may complete at any time.  (On a GPU, MXNet then reads a number
//                     that may be gone, to decide whether to wait for a stream.)
//   call in a graph   The record belongs to the graph.  The call runs on a worker of its device,
//                     which took it from the device's queue.  The worker has left the call once it
//                     takes one of our operations from the queue, or makes another call.
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
  // Call it in the operator, with the context object that MXNet passes (not a copy).
  explicit CallFrame(const mxnet::OpContext& context)
      : record_is_local_(OnThisStack(&context)), visits_(VisitsOfThisThread()), visit_(Visit()) {}

  bool RecordIsLocal() const { return record_is_local_; }
  // May be called from any thread.  What the calling thread did in the frame happened before.
  bool Left() const { return record_is_local_ || visits_->load() != visit_; }

  // Call it in an operation of ours that this thread has taken from its device's queue.
  static std::uint64_t Visit() { return ++*VisitsOfThisThread(); }

 private:
  // How often a thread has entered our code.  Shared, because calls may outlive their thread.
  using Visits = std::shared_ptr<std::atomic<std::uint64_t>>;

  static const Visits& VisitsOfThisThread() {
    static thread_local const auto visits = std::make_shared<std::atomic<std::uint64_t>>(0);
    return visits;
  }

  // Whether `variable` is a local variable of one of our callers.
  static bool OnThisStack(const void* variable) {
    static thread_local const std::uintptr_t end = EndOfThisStack();
    const auto address = reinterpret_cast<std::uintptr_t>(variable);
    const auto here = reinterpret_cast<std::uintptr_t>(__builtin_frame_address(0));
    constexpr std::size_t kCallers = 256 << 10;  // far more than MXNet's frames in between
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
