// The one registry of keys of this process.
#pragma once

#include <memory>

#include "exchange/key_barrier.h"

namespace gluon_syncbn {

// Its timeout is GLUON_SYNCBN_TIMEOUT seconds, by default 120.  GLUON_SYNCBN_LOG, a path or
// "stderr", is where it logs every round; by default it does not.  Ownership is shared, because
// what uses it may be freed after the process's static objects have been destroyed.
std::shared_ptr<KeyBarrier> ProcessBarrier();

}  // namespace gluon_syncbn
