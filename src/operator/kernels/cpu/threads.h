// Distributes the work of a kernel over threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstddef>

#include "kernels/cpu/worker_pool.h"

namespace gluon_syncbn {

// The number of threads for a kernel: what OpenMP offers to the calling thread (MXNet sets that for
// its workers, and OMP_NUM_THREADS limits it), divided by the number of kernels that run at this
// time.  With several CPU contexts, each one's worker would otherwise use all cores.
class ThreadBudget {
 public:
  ThreadBudget() : threads_(std::max(1, omp_get_max_threads() / ++kernels_running_)) {}
  ~ThreadBudget() { --kernels_running_; }
  ThreadBudget(const ThreadBudget&) = delete;
  ThreadBudget& operator=(const ThreadBudget&) = delete;
  std::size_t threads() const { return static_cast<std::size_t>(threads_); }

 private:
  static inline std::atomic<int> kernels_running_{0};
  const int threads_;
};

// The items of one ParallelFor, taken one by one, so that a core that is busy with something else
// takes fewer of them.
template <typename Body>
class ParallelItems {
 public:
  ParallelItems(std::size_t count, const Body& body) : count_(count), body_(body) {}
  static void Work(void* items) { static_cast<ParallelItems*>(items)->Work(); }

 private:
  void Work() {
    for (std::size_t i = next_++; i < count_; i = next_++) body_(i);
  }

  const std::size_t count_;
  const Body& body_;
  std::atomic<std::size_t> next_{0};
};

inline bool& InsideParallelFor() {
  static thread_local bool inside = false;
  return inside;
}

// Calls body(0) ... body(count - 1), in no particular order.  `elements` is how many the bodies
// process together: to wake a thread for a few takes longer than to process them.  Serial inside
// another ParallelFor.
template <typename Body>
void ParallelFor(std::size_t count, std::size_t elements, const Body& body) {
  constexpr std::size_t kElementsPerThread = 32768;
  const auto serial = [&] {
    for (std::size_t i = 0; i < count; ++i) body(i);
  };
  const std::size_t wanted = std::min(count, 1 + elements / kElementsPerThread);
  // Not counted as a kernel that runs: the body may be one that wants threads.
  if (wanted <= 1 || InsideParallelFor()) return serial();
  const ThreadBudget budget;
  const std::size_t threads = std::min(wanted, budget.threads());
  if (threads <= 1) return serial();
  const auto inside = [&](std::size_t i) {
    InsideParallelFor() = true;
    body(i);
    InsideParallelFor() = false;
  };
  ParallelItems<decltype(inside)> items(count, inside);
  WorkerPool::OfProcess()->Run(static_cast<int>(threads) - 1, items.Work, &items);
}

}  // namespace gluon_syncbn
