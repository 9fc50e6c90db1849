// Distributes the work of a kernel over threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#ifdef __SANITIZE_THREAD__
#include <thread>
#include <vector>
#endif

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
  int threads() const { return threads_; }

 private:
  static inline std::atomic<int> kernels_running_{0};
  const int threads_;
};

// Calls body(0) ... body(count - 1), in no particular order.  Serial for a single item, or inside
// another parallel region.
#ifdef __SANITIZE_THREAD__
// ThreadSanitizer does not understand OpenMP's synchronization, but that of plain threads.
template <typename Body>
void ParallelFor(std::size_t count, const Body& body) {
  static thread_local bool inside = false;
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    inside = true;
    for (std::size_t i = next++; i < count; i = next++) body(i);
    inside = false;
  };
  if (count <= 1 || inside) {
    for (std::size_t i = 0; i < count; ++i) body(i);
    return;
  }
  std::thread helper(work);
  work();
  helper.join();
}
#else
template <typename Body>
void ParallelFor(std::size_t count, const Body& body) {
  if (count == 0) return;
  if (count == 1 || omp_in_parallel()) {
    for (std::size_t i = 0; i < count; ++i) body(i);
    return;
  }
  const ThreadBudget budget;
  // Dynamic, so that a core that is busy with something else takes fewer items.
#pragma omp parallel for schedule(dynamic) num_threads(budget.threads())
  for (std::size_t i = 0; i < count; ++i) body(i);
}
#endif

}  // namespace gluon_syncbn
