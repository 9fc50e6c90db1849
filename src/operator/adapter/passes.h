// Passes of networks over several devices, as MXNet's engine sees them.
//
// An operator learns which pass a run belongs to when it runs, not when it is made: a graph with
// static_shape makes its operators once.  So a pass is announced by an operation in the engine's
// own order, between the operators that used the layer before and those that use it now.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "exchange/key_barrier.h"

namespace mxnet {
class NDArray;
struct Context;
}  // namespace mxnet

namespace gluon_syncbn {

using Arrays = std::vector<const mxnet::NDArray*>;

// CPUs before GPUs, then by number: the order of the sums.
std::uint64_t Participant(const mxnet::Context& context);

// Says which pass the next runs of these keys on the arrays' device belong to.  Every operator that
// takes part in one of the exchanges reads one of the `order` arrays, all on one device.
// Outside of a pass (id 0) nothing is queued unless a pass came before.
void BeginPass(const std::vector<std::string>& keys, const Arrays& order, const Pass& pass);

// Lets everybody who uses `written` from now on wait for `read`: a graph with static_shape does not
// tell the engine that it writes auxiliary states.
void Fence(const Arrays& read, const Arrays& written);

// What the calling thread is doing while it makes operators.
struct CallScope {
  bool active = false;     // a call of a program's, whose operators run in its order
  std::uint64_t pass = 0;  // in this pass
};
CallScope& CurrentCall();

}  // namespace gluon_syncbn
