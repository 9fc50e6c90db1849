// Passes of networks over several devices (see Pass in key_barrier.h), in the order of MXNet's
// engine.
//
// An operator has to learn the pass of a call when it runs, not when it is created: a graph with
// static_shape creates its operators once.  So a pass is set by an operation in the engine's queue,
// between the operators that used the layer before and those that use it next.
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

// The number of a device in the exchange, which determines the order of sums: CPUs before GPUs,
// then by device id.
std::uint64_t Participant(const mxnet::Context& context);

// Sets the pass of the next exchanges of these keys on one device.  Every operator that takes part
// in them reads one of the `order` arrays, which are all on that device.  Outside of a pass (id 0)
// nothing is queued unless there was a pass before.
void BeginPass(const std::vector<std::string>& keys, const Arrays& order, const Pass& pass);

// Makes later users of `written` wait for `read`.  With static_shape, MXNet does not tell its
// engine that a graph writes auxiliary states.
void Fence(const Arrays& read, const Arrays& written);

// What the current thread is doing while it creates operators.
struct CallScope {
  bool active = false;     // calling a network, whose exchanges keep the order of their creation
  std::uint64_t pass = 0;  // the pass of that call; 0: none
};
CallScope& CurrentCall();

}  // namespace gluon_syncbn
