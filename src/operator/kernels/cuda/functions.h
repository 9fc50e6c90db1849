// The C functions of libgluon_syncbn_cuda.so, for libgluon_syncbn.so (adapter/cuda_library.h) and
// for tests and benchmarks, which call them on PyTorch's arrays.
//
// Every function returns null, or a message that says what failed, which is valid until the next
// call of this thread.
#pragma once

#include <cstddef>

#include "kernels/batch_norm_kernels.h"
#include "kernels/moving_average_kernels.h"
#include "kernels/weighted_moments.h"

#define GLUON_SYNCBN_CUDA(name, ...) \
  extern "C" __attribute__((visibility("default"))) const char* GluonSyncBNCuda##name(__VA_ARGS__)

// Run and RunLocal of batch_norm_kernels.h.
GLUON_SYNCBN_CUDA(MomentsForward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::MomentsForwardParams* params);
GLUON_SYNCBN_CUDA(NormalizeForward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::NormalizeForwardParams* params);
GLUON_SYNCBN_CUDA(NormalizeBackward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::NormalizeBackwardParams* params);
GLUON_SYNCBN_CUDA(MomentsBackward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::MomentsBackwardParams* params);
GLUON_SYNCBN_CUDA(WeightedMomentsForward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::MomentsForwardParams* params,
                  const gluon_syncbn::PositionWeights* weights);
GLUON_SYNCBN_CUDA(WeightedMomentsBackward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::MomentsBackwardParams* params,
                  const gluon_syncbn::PositionWeights* weights);
GLUON_SYNCBN_CUDA(LocalForward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::NormalizeForwardParams* params, double* statistics);
GLUON_SYNCBN_CUDA(LocalBackward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::LocalBackwardParams* params);

// Run of moving_average_kernels.h.
GLUON_SYNCBN_CUDA(MovingAverageForward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::MovingAverageForwardParams* params);
GLUON_SYNCBN_CUDA(MovingAverageSums, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::MovingAverageSumsParams* params);
GLUON_SYNCBN_CUDA(MovingAverageBackward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::MovingAverageBackwardParams* params);

// Copies `count` numbers, float32 or float64, to the host and converts them to float64.  The copy
// is queued on a stream of the calling thread's own, and the function returns at once.  `from` must
// be complete, and stay valid until `done(data, values, count, error)` is called, from a thread of
// CUDA's that must not call CUDA.  `values` is valid during that call.  If something on the device
// has failed, `values` is null and `error` says so.  If this function itself fails, `done` is not
// called.
using GluonSyncBNValuesRead = void (*)(void* data, const double* values, std::size_t count,
                                       const char* error);
GLUON_SYNCBN_CUDA(ReadValues, int device, gluon_syncbn::DataType type, const void* from,
                  std::size_t count, GluonSyncBNValuesRead done, void* data);
// Converts `count` numbers to float32 or float64, copies them to the device, and returns when they
// are there.
GLUON_SYNCBN_CUDA(WriteValues, const gluon_syncbn::Gpu* gpu, gluon_syncbn::DataType type,
                  gluon_syncbn::WriteMode mode, const double* from, std::size_t count, void* to);
