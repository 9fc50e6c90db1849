// The kernels of moving average batch normalization: Yan et al., "Towards Stabilizing Batch
// Statistics in Backward Propagation of Batch Normalization", ICLR 2020,
// https://arxiv.org/abs/2001.06838, algorithm 1 and the code published with it.
//
// Per channel, in the notation of batch_norm_kernels.h, with averages over the channel's elements
// on all devices, and with averages over the last K iterations, which each keep theirs in a buffer
// of K slots:
//
//   forward    x2  = average of x^2 = mean^2 + M2 / n         in slot (iteration mod K) of
//   buffer_x2
//              var = average of buffer_x2
//              z   = x * s                 s = 1 / sqrt(var + epsilon)
//              y   = gamma * r * z + beta  r = sqrt((var + epsilon) / (running_var + epsilon)),
//                                              clipped
//              running_var = momentum * running_var + (1 - momentum) * var
//   backward   g   = gamma * r * dy        gz = average of g * z, in its slot of buffer_gz
//              dx  = s * (g - z * average of buffer_gz)
//              dgamma = r * sum(dy * z), dbeta = sum(dy)      (over this device's elements alone)
//   inference  y   = gamma * x / sqrt(running_var + epsilon) + beta
//
// In the first K or warmup_iters iterations, x2 and gz take the place of their averages; in the
// first max(1000, warmup_iters), r is 1.
//
// The loops over elements are those of batch normalization about a mean of 0, and so is step 1 of
// forward, MomentsForwardParams; moving_average_math.h has what is done per channel in between.
#pragma once

#include <cstddef>

#include "kernels/batch_norm_kernels.h"

namespace gluon_syncbn {

// What tells how far an iteration's averages go.
struct MovingAverages {
  std::size_t buffer_size;  // K
  std::size_t warmup_iters;
};

// What backward needs of its forward, as later ones change the states: [s: C] [r: C] [iteration].
// The iteration is 0 where running_var was used.
inline std::size_t MovingAverageScalesSize(std::size_t channels) { return 2 * channels + 1; }

// What step 2 of backward needs besides the sums: [gamma * r * s: C] [s: C] [iteration].
inline std::size_t MovingAverageContextSize(std::size_t channels) { return 2 * channels + 1; }

// Step 2 of forward: y, from the statistics of all devices.  Without statistics (kNoStatistics, or
// no device had an element) it uses running_var and leaves the states alone.
struct MovingAverageForwardParams {
  DataType type;
  FeatureShape shape;
  MovingAverages averages;
  double epsilon;
  double momentum;
  bool fix_gamma;  // gamma is taken to be 1
  const void* x;
  const double* statistics;
  const void* gamma;
  const void* beta;
  void* running_var;
  void* buffer_x2;  // [K][C]
  void* iters;      // the number of iterations so far
  double* scales;
  WriteMode y_mode;
  void* y;  // may be x
};

// Step 1 of backward: this device's part of gz, and the gradients of gamma and beta.  The sums are
// [0: C] [gz: C] [0].
struct MovingAverageSumsParams {
  DataType type;
  FeatureShape shape;
  bool fix_gamma;  // the gradient of gamma is 0
  const void* dy;
  const void* x;
  const double* statistics;
  const void* gamma;
  const double* scales;
  void* dy_copy;             // gets a copy of dy; dy itself or null: no copy
  double* backward_sums;     // null: not needed
  double* backward_context;  // null: not needed
  WriteMode gamma_grad_mode;
  void* gamma_grad;
  WriteMode beta_grad_mode;
  void* beta_grad;
};

// Step 2 of backward: dx, from the gz of all devices, which goes into its slot of buffer_gz unless
// it is not finite: a gradient that overflows (as those of mixed precision do at times) costs one
// step then, not K.
struct MovingAverageBackwardParams {
  DataType type;
  FeatureShape shape;
  MovingAverages averages;
  const void* dy;
  const void* x;
  const double* backward_sums;
  const double* backward_context;
  void* buffer_gz;  // [K][C]
  WriteMode dx_mode;
  void* dx;  // may be dy
};

void Run(Cpu, const MovingAverageForwardParams& params);
void Run(Cpu, const MovingAverageSumsParams& params);
void Run(Cpu, const MovingAverageBackwardParams& params);
void Run(const Gpu&, const MovingAverageForwardParams& params);
void Run(const Gpu&, const MovingAverageSumsParams& params);
void Run(const Gpu&, const MovingAverageBackwardParams& params);

}  // namespace gluon_syncbn
