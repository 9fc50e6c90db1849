// The one registry of keys of this process.
#pragma once

#include "key_barrier.h"

namespace gluon_syncbn {

// The deadline comes from GLUON_SYNCBN_TIMEOUT (seconds); the default is 120.
KeyBarrier& ProcessBarrier();

}  // namespace gluon_syncbn
