// See fork_handlers.h.
//
// MXNet has installed its handlers when it was loaded, which was before us.  So before a fork ours
// run first: exchanges are still under way, and MXNet waits for them next.  We must hold no lock
// then. After a fork ours run last: the engine has its new workers.
#include "adapter/fork_handlers.h"

#include <pthread.h>

#include <cerrno>
#include <system_error>

#include "adapter/asynchronous_call.h"
#include "exchange/process_barrier.h"

namespace gluon_syncbn {
namespace {

thread_local double timeout = 0.0;  // of the child that comes

void BeforeFork() { timeout = ProcessBarrier()->Timeout(); }

void InParent() { AsynchronousCall::EngineHasNewWorkers(); }

void InChild() {
  ProcessBarrier()->RestartInChild(timeout);
  AsynchronousCall::RestartInChild();
}

}  // namespace

void InstallForkHandlers() {
  ProcessBarrier();  // made here, so that no fork comes upon it half made
  const int error = pthread_atfork(BeforeFork, InParent, InChild);
  if (error != 0) throw std::system_error(error, std::generic_category(), "pthread_atfork");
}

}  // namespace gluon_syncbn
