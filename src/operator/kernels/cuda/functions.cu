// See functions.h.
#include <exception>
#include <string>

#include "kernels/cuda/functions.h"
#include "kernels/cuda/pinned_copy.cuh"

namespace {

template <typename Function>
const char* Guarded(Function function) {
  static thread_local std::string last_error;
  try {
    function();
    return nullptr;
  } catch (const std::exception& e) {
    last_error = e.what();
    return last_error.c_str();
  }
}

}  // namespace

using gluon_syncbn::Run;
using gluon_syncbn::RunLocal;
using gluon_syncbn::RunWeighted;

GLUON_SYNCBN_CUDA(MomentsForward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::MomentsForwardParams* params) {
  return Guarded([=] { Run(*gpu, *params); });
}

GLUON_SYNCBN_CUDA(NormalizeForward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::NormalizeForwardParams* params) {
  return Guarded([=] { Run(*gpu, *params); });
}

GLUON_SYNCBN_CUDA(NormalizeBackward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::NormalizeBackwardParams* params) {
  return Guarded([=] { Run(*gpu, *params); });
}

GLUON_SYNCBN_CUDA(MomentsBackward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::MomentsBackwardParams* params) {
  return Guarded([=] { Run(*gpu, *params); });
}

GLUON_SYNCBN_CUDA(WeightedMomentsForward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::MomentsForwardParams* params,
                  const gluon_syncbn::PositionWeights* weights) {
  return Guarded([=] { RunWeighted(*gpu, *params, *weights); });
}

GLUON_SYNCBN_CUDA(WeightedMomentsBackward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::MomentsBackwardParams* params,
                  const gluon_syncbn::PositionWeights* weights) {
  return Guarded([=] { RunWeighted(*gpu, *params, *weights); });
}

GLUON_SYNCBN_CUDA(LocalForward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::NormalizeForwardParams* params, double* statistics) {
  return Guarded([=] { RunLocal(*gpu, *params, statistics); });
}

GLUON_SYNCBN_CUDA(LocalBackward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::LocalBackwardParams* params) {
  return Guarded([=] { RunLocal(*gpu, *params); });
}

GLUON_SYNCBN_CUDA(MovingAverageForward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::MovingAverageForwardParams* params) {
  return Guarded([=] { Run(*gpu, *params); });
}

GLUON_SYNCBN_CUDA(MovingAverageSums, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::MovingAverageSumsParams* params) {
  return Guarded([=] { Run(*gpu, *params); });
}

GLUON_SYNCBN_CUDA(MovingAverageBackward, const gluon_syncbn::Gpu* gpu,
                  const gluon_syncbn::MovingAverageBackwardParams* params) {
  return Guarded([=] { Run(*gpu, *params); });
}

GLUON_SYNCBN_CUDA(ReadValues, int device, gluon_syncbn::DataType type, const void* from,
                  std::size_t count, GluonSyncBNValuesRead done, void* data) {
  return Guarded([=] { gluon_syncbn::ReadDeviceValues(device, type, from, count, done, data); });
}

GLUON_SYNCBN_CUDA(WriteValues, const gluon_syncbn::Gpu* gpu, gluon_syncbn::DataType type,
                  gluon_syncbn::WriteMode mode, const double* from, std::size_t count, void* to) {
  return Guarded([=] { gluon_syncbn::WriteDeviceValues(*gpu, type, mode, from, count, to); });
}
