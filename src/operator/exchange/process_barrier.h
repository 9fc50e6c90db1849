// The one registry of keys of this process.
#pragma once

#include <memory>

#include "exchange/key_barrier.h"

namespace gluon_syncbn {

// The deadline comes from GLUON_SYNCBN_TIMEOUT (seconds); the default is 120.  Shared, because
// MXNet may free an operator when the process's own objects are gone already.
std::shared_ptr<KeyBarrier> ProcessBarrier();

}  // namespace gluon_syncbn
