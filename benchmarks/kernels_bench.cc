// The benchmarks without MXNet: the four kernels, and a plain copy as their lower bound.
#include <cstddef>
#include <cstring>
#include <vector>

#include "kernels/batch_norm_kernels.h"

#define BENCH_API extern "C" __attribute__((visibility("default")))

using namespace gluon_syncbn;

// A plain copy with all OpenMP threads.
static void PlainCopy(const float* from, float* to, std::size_t count) {
  const long long n = static_cast<long long>(count);
#pragma omp parallel for simd schedule(static)
  for (long long i = 0; i < n; ++i) to[i] = from[i];
}

// Eight passes over arrays of `bytes`: x to y and dy to dx, each read and written, twice.
BENCH_API void BenchFloor(std::size_t bytes, const void* x, void* y, const void* dy, void* dx) {
  const std::size_t count = bytes / sizeof(float);
  for (int i = 0; i < 2; ++i) {
    PlainCopy(static_cast<const float*>(x), static_cast<float*>(y), count);
    PlainCopy(static_cast<const float*>(dy), static_cast<float*>(dx), count);
  }
}

// The four kernels one after the other, in place: x is its own copy, and dx overwrites dy.
// `which`: 0 for all, or 1 to 4 for one of them.
BENCH_API void BenchKernels(int which, int type, std::size_t outer, std::size_t channels,
                            std::size_t inner, void* x, void* y, void* dy, const void* gamma,
                            const void* beta, void* moving_mean, void* moving_var, void* gamma_grad,
                            void* beta_grad, double* statistics, double* backward_sums,
                            double* backward_context) {
  const DataType t = static_cast<DataType>(type);
  const FeatureShape shape{outer, channels, inner};
  const double epsilon = 1e-5, momentum = 0.9;
  if (which == 0 || which == 1) Run(Cpu(), MomentsForwardParams{t, shape, x, x, true, statistics});
  if (which == 0 || which == 2) {
    Run(Cpu(), NormalizeForwardParams{t, shape, epsilon, momentum, false, x, statistics, gamma,
                                      beta, moving_mean, moving_var, WriteMode::kWrite, y});
  }
  if (which == 0 || which == 3) {
    Run(Cpu(),
        NormalizeBackwardParams{t, shape, epsilon, false, dy, x, statistics, gamma, moving_mean,
                                moving_var, dy, backward_sums, backward_context, WriteMode::kWrite,
                                gamma_grad, WriteMode::kWrite, beta_grad});
  }
  if (which == 0 || which == 4) {
    Run(Cpu(), MomentsBackwardParams{t, shape, dy, x, backward_sums, backward_context,
                                     WriteMode::kWrite, dy});
  }
}
