// The C functions that Python calls: registration with MXNet, the exchange, passes.
//
// Every function that can fail returns 0, or -1 and leaves the reason in GluonSyncBNLastError.
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "adapter/cuda_library.h"
#include "adapter/fork_handlers.h"
#include "adapter/mkldnn_dispatch.h"
#include "adapter/passes.h"
#include "exchange/key_barrier.h"
#include "exchange/process_barrier.h"
#include "exchange/refusing_transport.h"

#define GLUON_SYNCBN_API extern "C" __attribute__((visibility("default")))

namespace mxnet {
namespace op {
// Exported by libmxnet.so, but declared in no header: makes operators of all registered
// OperatorProperty classes, except for those that have one already.
void RegisterLegacyOpProp();
}  // namespace op
}  // namespace mxnet

namespace gluon_syncbn {

namespace {

thread_local std::string last_error;

template <typename Function>
int Guarded(Function function) {
  try {
    function();
    return 0;
  } catch (const std::exception& e) {
    last_error = e.what();
    return -1;
  }
}

std::vector<std::string> Strings(const char* const* strings, int count) {
  return std::vector<std::string>(strings, strings + count);
}

Arrays ToArrays(void* const* handles, int count) {
  Arrays arrays;
  for (int i = 0; i < count; ++i) {
    arrays.push_back(static_cast<const mxnet::NDArray*>(handles[i]));
  }
  return arrays;
}

}  // namespace
}  // namespace gluon_syncbn

using gluon_syncbn::Guarded;
using gluon_syncbn::KeyBarrier;
using gluon_syncbn::ProcessBarrier;
using gluon_syncbn::Strings;
using gluon_syncbn::ToArrays;

GLUON_SYNCBN_API const char* GluonSyncBNLastError() { return gluon_syncbn::last_error.c_str(); }

GLUON_SYNCBN_API int GluonSyncBNRegisterOperators() {
  return Guarded([] {
    gluon_syncbn::InstallForkHandlers();
    mxnet::op::RegisterLegacyOpProp();
    gluon_syncbn::WhyNoMkldnnLayouts();
  });
}

// Why the operators do not take feature maps in MKL-DNN's layouts; empty if they do.
GLUON_SYNCBN_API const char* GluonSyncBNWhyNoMkldnnLayouts() {
  return gluon_syncbn::WhyNoMkldnnLayouts().c_str();
}

// Fails if there is no CUDA side; the error says what to do.
GLUON_SYNCBN_API int GluonSyncBNNeedCuda() {
  return Guarded([] { gluon_syncbn::RequireCudaLibrary(); });
}

// The following functions take a barrier; null stands for that of the process (process_barrier.h).
using Barrier = KeyBarrier*;

static KeyBarrier& Get(Barrier barrier) {
  return barrier == nullptr ? *ProcessBarrier() : *barrier;
}

GLUON_SYNCBN_API Barrier GluonSyncBNBarrierCreate(double timeout_seconds) {
  return std::make_unique<KeyBarrier>(timeout_seconds).release();
}

GLUON_SYNCBN_API void GluonSyncBNBarrierFree(Barrier barrier) {
  std::unique_ptr<KeyBarrier>{barrier};
}

// See KeyBarrier::Arrive.  On failure `total` is null and `error` is the message.
using DoneCallback = void (*)(void* data, const double* total, unsigned long long round,
                              int num_devices, const char* error);

// `round`: 0 for a forward exchange; for a backward exchange, the id of the forward round.
// `merge`: 0 for a sum, 1 for moments.
GLUON_SYNCBN_API int GluonSyncBNBarrierArrive(Barrier barrier, const char* key,
                                              unsigned long long pass, unsigned long long round,
                                              unsigned long long participant, const char* kind,
                                              const char* name, int num_devices, int merge,
                                              const double* values, size_t count, DoneCallback done,
                                              void* data) {
  return Guarded([=] {
    gluon_syncbn::Arrival arrival;
    arrival.key = key;
    arrival.phase = round != 0 ? round : pass;
    arrival.backward = round != 0;
    arrival.pass = pass;
    arrival.participant = participant;
    arrival.kind = kind;
    arrival.name = name;
    arrival.num_devices = num_devices;
    arrival.merge = static_cast<gluon_syncbn::Merge>(merge);
    arrival.values.assign(values, values + count);
    Get(barrier).Arrive(std::move(arrival), [done, data](const gluon_syncbn::Result& result) {
      const std::string& cause = result.diagnosis.text;
      const std::string error = cause.empty() ? result.error : cause + ' ' + result.error;
      done(data, result.total == nullptr ? nullptr : result.total->data(), result.round,
           result.num_devices, error.c_str());
    });
  });
}

GLUON_SYNCBN_API unsigned long long GluonSyncBNBarrierNewPass(Barrier barrier) {
  return Get(barrier).NewPass();
}

GLUON_SYNCBN_API int GluonSyncBNBarrierAbort(Barrier barrier, const unsigned long long* passes,
                                             int count, const char* why) {
  return Guarded([=] { Get(barrier).Abort({passes, passes + count}, why); });
}

GLUON_SYNCBN_API int GluonSyncBNBarrierClose(Barrier barrier, const char* why) {
  return Guarded([=] { Get(barrier).Close(why); });
}

GLUON_SYNCBN_API void GluonSyncBNBarrierSetTimeout(Barrier barrier, double seconds) {
  Get(barrier).SetTimeout(seconds);
}

GLUON_SYNCBN_API double GluonSyncBNBarrierTimeout(Barrier barrier) {
  return Get(barrier).Timeout();
}

// How many rounds of these keys have failed so far; of all keys if `keys` is null.
GLUON_SYNCBN_API unsigned long long GluonSyncBNBarrierFailures(Barrier barrier,
                                                               const char* const* keys, int count) {
  if (keys == nullptr) return Get(barrier).Failures();
  unsigned long long failures = 0;
  for (const auto& key : Strings(keys, count)) failures += Get(barrier).Failures(key);
  return failures;
}

// Sets what carries these keys' rounds on to other processes: a std::shared_ptr<Transport>; null:
// they end here.
GLUON_SYNCBN_API int GluonSyncBNBarrierConnect(Barrier barrier, const char* const* keys, int count,
                                               const void* transport) {
  return Guarded([=] {
    std::shared_ptr<gluon_syncbn::Transport> connection;
    if (transport != nullptr) {
      connection = *static_cast<const std::shared_ptr<gluon_syncbn::Transport>*>(transport);
    }
    for (const auto& key : Strings(keys, count)) Get(barrier).SetTransport(key, connection);
  });
}

// Fails all rounds of these keys from now on.
GLUON_SYNCBN_API int GluonSyncBNBarrierRefuse(Barrier barrier, const char* const* keys, int count,
                                              const char* why) {
  return Guarded([=] {
    const auto refusing = std::make_shared<gluon_syncbn::RefusingTransport>(why);
    for (const auto& key : Strings(keys, count)) Get(barrier).SetTransport(key, refusing);
  });
}

// What happened so far, or since the last time with `reset` (round_records.h), as arrays.  The
// devices are those of the first key, then those of the second, and so on.  Times are seconds of
// std::chrono::steady_clock.  Strings are valid until the records are freed.
struct KeyRow {
  const char* key;
  unsigned long long rounds, failures;
  double elsewhere;
  int num_devices;
};
struct DeviceRow {
  const char* name;
  unsigned long long rounds, last;
  double held, waited, longest;
};
struct ArrivalRow {
  const char* key;
  unsigned long long round;
  const char *name, *last;
  double came, complete, ended;
  int call, backward, succeeded;
};
struct Records {
  const KeyRow* keys;
  const DeviceRow* devices;
  const ArrivalRow* arrivals;
  int num_keys, num_arrivals;
};

namespace gluon_syncbn {
namespace {

struct OwnedRecords : Records {
  explicit OwnedRecords(RoundRecords::Copy records) : copy_(std::move(records)) {
    const auto name = [this](std::uint64_t participant) {
      return copy_.names.at(participant).c_str();
    };
    const auto seconds = [](Clock::time_point time) { return Seconds(time.time_since_epoch()); };
    for (const auto& key : copy_.keys) {
      key_rows_.push_back({key.key.c_str(), key.rounds, key.failures, key.elsewhere,
                           static_cast<int>(key.devices.size())});
      for (const auto& [participant, device] : key.devices) {
        device_rows_.push_back({name(participant), device.rounds, device.last, device.held,
                                device.waited, device.longest});
      }
    }
    for (const auto& past : copy_.past) {
      arrival_rows_.push_back({past.key->key.c_str(), past.round, name(past.participant),
                               name(past.last), seconds(past.came), seconds(past.complete),
                               seconds(past.ended), past.call, past.backward, past.succeeded});
    }
    keys = key_rows_.data();
    devices = device_rows_.data();
    arrivals = arrival_rows_.data();
    num_keys = static_cast<int>(key_rows_.size());
    num_arrivals = static_cast<int>(arrival_rows_.size());
  }

 private:
  RoundRecords::Copy copy_;  // has the strings
  std::vector<KeyRow> key_rows_;
  std::vector<DeviceRow> device_rows_;
  std::vector<ArrivalRow> arrival_rows_;
};

}  // namespace
}  // namespace gluon_syncbn

// Null if there is no memory.
GLUON_SYNCBN_API const Records* GluonSyncBNBarrierRecords(Barrier barrier, int reset) {
  const Records* records = nullptr;
  Guarded([&] {
    auto copy = Get(barrier).Records(reset != 0);
    records = std::make_unique<gluon_syncbn::OwnedRecords>(std::move(copy)).release();
  });
  return records;
}

GLUON_SYNCBN_API void GluonSyncBNRecordsFree(const Records* records) {
  const std::unique_ptr<const gluon_syncbn::OwnedRecords> owned(
      static_cast<const gluon_syncbn::OwnedRecords*>(records));
}

// The following functions use the barrier of the process; arrays are MXNet's NDArrayHandles.

// See passes.h for these two.
GLUON_SYNCBN_API int GluonSyncBNBeginPass(const char* const* keys, int count, void* const* order,
                                          int arrays, unsigned long long pass, int expected) {
  return Guarded([=] {
    gluon_syncbn::BeginPass(Strings(keys, count), ToArrays(order, arrays), {pass, expected});
  });
}

GLUON_SYNCBN_API int GluonSyncBNFence(void* const* read, int num_read, void* const* written,
                                      int num_written) {
  return Guarded(
      [=] { gluon_syncbn::Fence(ToArrays(read, num_read), ToArrays(written, num_written)); });
}

// Exchanges that the calling thread creates until LeaveCall run in the order of their creation, and
// belong to this pass (0: to none).  Returns the argument for LeaveCall.
GLUON_SYNCBN_API unsigned long long GluonSyncBNEnterCall(unsigned long long pass) {
  auto& call = gluon_syncbn::CurrentCall();
  const unsigned long long before = call.active ? call.pass + 1 : 0;
  call = {true, pass};
  return before;
}

GLUON_SYNCBN_API void GluonSyncBNLeaveCall(unsigned long long before) {
  gluon_syncbn::CurrentCall() = {before != 0, before != 0 ? before - 1 : 0};
}
