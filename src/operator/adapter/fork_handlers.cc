// See fork_handlers.h.
//
// MXNet installed its handlers when it was loaded, before us.  So before a fork ours run first, and
// MXNet's then waits for exchanges that are under way: we must not hold a lock, not even to copy a
// consistent state.  After a fork ours run last, when the engine has its new workers.
#include "adapter/fork_handlers.h"

#include <pthread.h>

#include <cerrno>
#include <system_error>

#include "adapter/asynchronous_call.h"
#include "exchange/process_barrier.h"
#include "kernels/cpu/worker_pool.h"

namespace gluon_syncbn {
namespace {

thread_local double timeout = 0.0;  // of the child that is about to be forked

void BeforeFork() { timeout = ProcessBarrier()->Timeout(); }

void InParent() { AsynchronousCall::EngineHasNewWorkers(); }

void InChild() {
  ProcessBarrier()->RestartInChild(timeout);
  AsynchronousCall::RestartInChild();
  WorkerPool::RestartInChild();
}

}  // namespace

void InstallForkHandlers() {
  // Constructed here, so that no fork can interrupt their construction.
  ProcessBarrier();
  WorkerPool::OfProcess();
  const int error = pthread_atfork(BeforeFork, InParent, InChild);
  if (error != 0) throw std::system_error(error, std::generic_category(), "pthread_atfork");
}

}  // namespace gluon_syncbn
