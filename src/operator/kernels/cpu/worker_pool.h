// Threads of our own that help the kernels, and sleep soon when there is nothing to do.
//
// The helper threads of GCC's OpenMP spin for a millisecond and more after a parallel region.
// MXNet's engine runs each operator in a thread that it wakes, often on the very core where such a
// helper spins; the two then share that core for a slice of the scheduler's, and a kernel of 3 ms
// takes 8.  These threads spin for some microseconds, which bridges the gap between the kernels of
// a layer, and then sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>

namespace gluon_syncbn {

// All functions may be called from any thread.
class WorkerPool : public std::enable_shared_from_this<WorkerPool> {
 public:
  // The pool of this process.  Its threads hold it as well, so that it outlives static objects.
  static std::shared_ptr<WorkerPool> OfProcess();
  // Gives a forked child, which has none of the threads, a pool of its own.
  static void RestartInChild();

  // Calls work(data) in this thread and, as far as they are free, in up to `helpers` others.
  // Returns when all these calls have returned.  `work` must not throw, and a single call of it
  // must do everything that there is to do.
  void Run(int helpers, void (*work)(void*), void* data);

 private:
  struct Job {
    void (*work)(void*);
    void* data;
    int wanted;                   // helpers that may still join; guarded by mutex_
    std::atomic<int> running{0};  // helpers that have joined and not left; written under mutex_
    std::condition_variable left;
  };

  static std::shared_ptr<WorkerPool>& Slot();
  static void Serve(std::shared_ptr<WorkerPool> pool);
  void StartThread();
  int ToWake(const Job& job) const;
  void Wake(int count);

  std::mutex mutex_;
  std::condition_variable posted_;
  std::atomic<unsigned> posts_{0};  // jobs so far; a thread that spins looks at it
  // Guarded by mutex_:
  std::deque<Job*> jobs_;  // those that want helpers
  int threads_ = 0;
  int sleeping_ = 0;
};

}  // namespace gluon_syncbn
