#include "kernels/cpu/worker_pool.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <system_error>
#include <thread>
#include <utility>

namespace gluon_syncbn {
namespace {

constexpr std::chrono::microseconds kSpin{50};

// Spins until `ready()`, but not longer than kSpin.
template <typename Ready>
void SpinUntil(const Ready& ready) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point end = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  } while (Clock::now() < end);
}

}  // namespace

std::shared_ptr<WorkerPool>& WorkerPool::Slot() {
  static auto pool = std::make_shared<WorkerPool>();
  return pool;
}

std::shared_ptr<WorkerPool> WorkerPool::OfProcess() { return Slot(); }

// The parent's pool stays as it is in the child's memory, for the references of its threads are
// never given up there.
void WorkerPool::RestartInChild() { Slot() = std::make_shared<WorkerPool>(); }

void WorkerPool::Run(int helpers, void (*work)(void*), void* data) {
  Job job{work, data, helpers, {}, {}};
  int to_wake = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (threads_ < helpers) {
      try {
        StartThread();
      } catch (const std::system_error&) {
        break;  // with fewer helpers, then
      }
    }
    jobs_.push_back(&job);
    ++posts_;
    to_wake = ToWake(job);
  }
  Wake(to_wake);
  work(data);
  std::unique_lock<std::mutex> lock(mutex_);
  jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), &job), jobs_.end());  // no more may join
  if (job.running == 0) return;
  lock.unlock();
  SpinUntil([&job] { return job.running == 0; });
  lock.lock();  // a helper that has left may still hold it, and read the job
  job.left.wait(lock, [&job] { return job.running == 0; });
}

// Each thread wakes two others at most, which wake further ones: with many threads, all of them are
// awake sooner than if one thread woke them all.
int WorkerPool::ToWake(const Job& job) const { return std::min({job.wanted, sleeping_, 2}); }

void WorkerPool::Wake(int count) {
  for (int i = 0; i < count; ++i) posted_.notify_one();
}

void WorkerPool::StartThread() {
  std::thread(Serve, shared_from_this()).detach();
  ++threads_;
}

void WorkerPool::Serve(std::shared_ptr<WorkerPool> pool) {
#if defined(__linux__)
  pthread_setname_np(pthread_self(), "syncbn-worker");  // for those who look at a process's threads
#endif
  std::unique_lock<std::mutex> lock(pool->mutex_);
  while (true) {
    if (pool->jobs_.empty()) {
      const unsigned posts = pool->posts_;
      lock.unlock();
      SpinUntil([&] { return pool->posts_ != posts; });
      lock.lock();
      ++pool->sleeping_;
      pool->posted_.wait(lock, [&] { return !pool->jobs_.empty(); });
      --pool->sleeping_;
    }
    Job& job = *pool->jobs_.front();
    if (--job.wanted == 0) pool->jobs_.pop_front();
    ++job.running;
    const int to_wake = pool->ToWake(job);
    lock.unlock();
    pool->Wake(to_wake);
    job.work(job.data);
    lock.lock();
    if (--job.running == 0) job.left.notify_one();
  }
}

}  // namespace gluon_syncbn
