// The C functions that Python calls: registration with MXNet, and the process's barrier.
//
// Every function that can fail returns 0, or -1 with the reason in GluonSyncBNLastError.
#include <cmath>
#include <cstdlib>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "cuda_library.h"
#include "key_barrier.h"
#include "process_barrier.h"

#define GLUON_SYNCBN_API extern "C" __attribute__((visibility("default")))

namespace mxnet {
namespace op {
// Exported by libmxnet.so, declared in no header of its own: makes operators of all registered
// OperatorProperty classes and passes over those it has made already.
void RegisterLegacyOpProp();
}  // namespace op
}  // namespace mxnet

namespace gluon_syncbn {

std::shared_ptr<KeyBarrier> ProcessBarrier() {
  static const auto barrier = std::make_shared<KeyBarrier>([] {
    const char* value = std::getenv("GLUON_SYNCBN_TIMEOUT");
    const double seconds = value == nullptr ? 0.0 : std::atof(value);
    return seconds > 0 ? seconds : 120.0;  // Python has refused what is no positive number
  }());
  return barrier;
}

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

}  // namespace
}  // namespace gluon_syncbn

using gluon_syncbn::Guarded;
using gluon_syncbn::KeyBarrier;
using gluon_syncbn::ProcessBarrier;
using gluon_syncbn::Strings;

GLUON_SYNCBN_API const char* GluonSyncBNLastError() { return gluon_syncbn::last_error.c_str(); }

GLUON_SYNCBN_API int GluonSyncBNRegisterOperators() {
  return Guarded([] { mxnet::op::RegisterLegacyOpProp(); });
}

// Fails where there is no CUDA side, and says what to do.
GLUON_SYNCBN_API int GluonSyncBNNeedCuda() {
  return Guarded([] { gluon_syncbn::NeedCudaLibrary(); });
}

// The functions below take a barrier, or null for the process's own.
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

// `merge`: 0 for a sum, 1 for moments; see merge.h.
// `done(data, total, round, num_devices, error)`: total is null and error is set on failure.
using DoneCallback = void (*)(void* data, const double* total, unsigned long long round,
                              int num_devices, const char* error);

GLUON_SYNCBN_API int GluonSyncBNBarrierArrive(Barrier barrier, const char* key,
                                              unsigned long long lane,
                                              unsigned long long participant, const char* kind,
                                              const char* name, int num_devices, int merge,
                                              const double* values, size_t count, DoneCallback done,
                                              void* data) {
  return Guarded([=] {
    Get(barrier).Arrive({key,
                         0,
                         lane,
                         participant,
                         kind,
                         name,
                         num_devices,
                         {values, values + count},
                         0,
                         static_cast<gluon_syncbn::Merge>(merge)},
                        [done, data](const gluon_syncbn::Outcome& outcome) {
                          done(data, outcome.total == nullptr ? nullptr : outcome.total->data(),
                               outcome.round, outcome.num_devices, outcome.error.c_str());
                        });
  });
}

// Sets the members of many keys; returns how many of them had another number, and changes nothing
// when `dry_run` is not 0.  -1 on failure.
GLUON_SYNCBN_API int GluonSyncBNBarrierSetMembers(Barrier barrier, const char* const* keys,
                                                  int count, int num_devices, int dry_run) {
  int changed = 0;
  const int failed = Guarded([&] {
    for (const auto& key : Strings(keys, count)) {
      if (Get(barrier).Members(key) == num_devices) continue;
      ++changed;
      if (dry_run == 0) Get(barrier).SetMembers(key, num_devices);
    }
  });
  return failed != 0 ? -1 : changed;
}

GLUON_SYNCBN_API int GluonSyncBNBarrierAbort(Barrier barrier, const char* const* keys, int count,
                                             const char* why) {
  return Guarded([=] { Get(barrier).Abort(Strings(keys, count), why); });
}

GLUON_SYNCBN_API int GluonSyncBNBarrierResume(Barrier barrier, const char* const* keys, int count) {
  return Guarded([=] { Get(barrier).Resume(Strings(keys, count)); });
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

GLUON_SYNCBN_API unsigned long long GluonSyncBNBarrierFailures(Barrier barrier) {
  return Get(barrier).Failures();
}
