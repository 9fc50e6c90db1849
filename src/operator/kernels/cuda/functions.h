// What libgluon_syncbn_cuda.so offers, as C functions: to libgluon_syncbn.so (cuda_library.h), and
// to tests and benchmarks, which call it on arrays of PyTorch's or CuPy's.
//
// Every function returns null, or a message that says what failed.  The message stays until this
// thread's next call.
#pragma once

#include <cstddef>

#include "kernels/batch_norm_kernels.h"

#define GLUON_SYNCBN_CUDA(name, ...) \
  extern "C" __attribute__((visibility("default"))) const char* GluonSyncBNCuda##name(__VA_ARGS__)

// Run and RunAlone of batch_norm_kernels.h.
GLUON_SYNCBN_CUDA(MomentsForward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::MomentsForward* kernel);
GLUON_SYNCBN_CUDA(NormalizeForward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::NormalizeForward* kernel);
GLUON_SYNCBN_CUDA(NormalizeBackward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::NormalizeBackward* kernel);
GLUON_SYNCBN_CUDA(MomentsBackward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::MomentsBackward* kernel);
GLUON_SYNCBN_CUDA(ForwardAlone, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::NormalizeForward* kernel, double* statistics);
GLUON_SYNCBN_CUDA(BackwardAlone, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::NormalizeBackward* kernel);

// Brings `count` numbers to the host, on a stream of the calling thread's own, and returns at once.
// `done(data, values, count, error)` is called when they are there, from a thread of CUDA's that
// may not call CUDA; the values are gone when it returns.  `from` must be ready, and stay.
// Where something on the device failed, `values` is null and `error` says so.  When this function
// itself fails, `done` is not called.
using GluonSyncBNValuesRead = void (*)(void* data, const double* values, std::size_t count,
                                       const char* error);
GLUON_SYNCBN_CUDA(ReadValues, int device, gluon_syncbn::DataType type, const void* from,
                  std::size_t count, GluonSyncBNValuesRead done, void* data);
// Brings numbers to the device, and returns when they are there.
GLUON_SYNCBN_CUDA(WriteValues, const gluon_syncbn::Gpu* gpu, gluon_syncbn::DataType type,
                  gluon_syncbn::Request request, const double* from, std::size_t count, void* to);
