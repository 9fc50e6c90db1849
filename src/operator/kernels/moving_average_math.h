// The arithmetic of moving average batch normalization per channel: once for CPUs and GPUs.
//
// moving_average_kernels.h has the formulas.  Numbers are computed in float64 and kept, in the
// buffers, in the type of the parameters.
#pragma once

#include <cmath>
#include <cstddef>

#include "kernels/batch_norm_math.h"
#include "kernels/moving_average_kernels.h"

namespace gluon_syncbn {

// r is fixed for so many iterations at least, and then kept within [1 / 5, 5], as in the published
// code.
constexpr double kUnscaledIterations = 1000;
constexpr double kLargestScale = 5;

// The number of the iteration that follows `iters`, from 1.  In float32, counting ends at 2^24, so
// the number goes back long before, by a multiple of the buffer's size, to where all of warm-up is
// over: the operator sees to it that neither exceeds kMaxIterations.
constexpr std::size_t kMaxIterations = std::size_t(1) << 21;
GLUON_SYNCBN_ON_ANY_DEVICE inline double NextIteration(const MovingAverages& averages,
                                                       double iters) {
  const double size = static_cast<double>(averages.buffer_size);
  const double cycle = std::floor(2 * kMaxIterations / size) * size;
  // A whole number: a checkpoint has the average of the devices' numbers.
  const double next = std::floor(iters + 0.5) + 1;
  return next < 2 * cycle ? next : next - cycle;
}

// An iteration's place in a buffer, and what is read from it.
template <typename Acc>
struct SlotOf {
  std::size_t size, slot;
  bool alone;  // too early for an average

  GLUON_SYNCBN_ON_ANY_DEVICE SlotOf(const MovingAverages& averages, double iteration)
      : size(averages.buffer_size),
        // A checkpoint could have any number, and NaN.
        slot(iteration > 0 && iteration < 4.0 * kMaxIterations
                 ? static_cast<std::size_t>(iteration) % averages.buffer_size
                 : 0),
        alone(iteration <= static_cast<double>(averages.buffer_size) ||
              iteration < static_cast<double>(averages.warmup_iters)) {}

  GLUON_SYNCBN_ON_ANY_DEVICE void Put(void* buffer, std::size_t channels, std::size_t c,
                                      double value) const {
    static_cast<Acc*>(buffer)[slot * channels + c] = static_cast<Acc>(value);
  }
  // `value` is what this iteration has put.
  GLUON_SYNCBN_ON_ANY_DEVICE double Average(const void* buffer, std::size_t channels, std::size_t c,
                                            double value) const {
    if (alone) return value;
    double sum = 0.0;
    for (std::size_t i = 0; i < size; ++i) {
      sum += static_cast<const Acc*>(buffer)[i * channels + c];
    }
    return sum / static_cast<double>(size);
  }
};

GLUON_SYNCBN_ON_ANY_DEVICE inline bool HasElements(const double* statistics, std::size_t channels) {
  return statistics[2 * channels] > 0;
}

template <typename Acc>
GLUON_SYNCBN_ON_ANY_DEVICE double GammaOf(bool fix_gamma, const void* gamma, std::size_t c) {
  return fix_gamma ? 1.0 : static_cast<double>(static_cast<const Acc*>(gamma)[c]);
}

// y = x * gamma * r * s + beta.  Updates the states of the channel and sets its scales.
template <typename Acc>
GLUON_SYNCBN_ON_ANY_DEVICE ChannelEntry<Acc> NormalizeEntry(const MovingAverageForwardParams& p,
                                                            std::size_t c) {
  const std::size_t channels = p.shape.channels;
  Acc* const running_var = static_cast<Acc*>(p.running_var) + c;
  double iteration = 0.0, var = *running_var, r = 1.0;
  if (HasElements(p.statistics, channels)) {
    iteration = NextIteration(p.averages, *static_cast<const Acc*>(p.iters));
    const double mean = p.statistics[c], count = p.statistics[2 * channels];
    const double x2 = mean * mean + p.statistics[channels + c] / count;
    const SlotOf<Acc> slot(p.averages, iteration);
    slot.Put(p.buffer_x2, channels, c, x2);
    var = slot.Average(p.buffer_x2, channels, c, x2);
    if (iteration > kUnscaledIterations &&
        iteration > static_cast<double>(p.averages.warmup_iters)) {
      r = std::sqrt((var + p.epsilon) / (*running_var + p.epsilon));
      // In this order NaN stays NaN.
      if (r < 1 / kLargestScale) r = 1 / kLargestScale;
      if (r > kLargestScale) r = kLargestScale;
    }
    *running_var = static_cast<Acc>(p.momentum * *running_var + (1 - p.momentum) * var);
  }
  const double s = 1 / std::sqrt(var + p.epsilon);
  p.scales[c] = s;
  p.scales[channels + c] = r;
  if (c == 0) p.scales[2 * channels] = iteration;
  const double gamma = GammaOf<Acc>(p.fix_gamma, p.gamma, c);
  return ToEntry<Acc>(0.0, gamma * r * s, static_cast<const Acc*>(p.beta)[c], 0.0);
}

// Call after NormalizeEntry, which reads the number, has been called for all channels.
template <typename Acc>
GLUON_SYNCBN_ON_ANY_DEVICE void CountIteration(const MovingAverageForwardParams& p) {
  if (!HasElements(p.statistics, p.shape.channels)) return;
  Acc* const iters = static_cast<Acc*>(p.iters);
  *iters = static_cast<Acc>(NextIteration(p.averages, *iters));
}

// `sum_dy` and `sum_dy_x` are this device's sums of dy and of dy * x.
template <typename Acc>
GLUON_SYNCBN_ON_ANY_DEVICE void FinishGradients(const MovingAverageSumsParams& p, std::size_t c,
                                                double sum_dy, double sum_dy_x) {
  const std::size_t channels = p.shape.channels;
  const double s = p.scales[c], r = p.scales[channels + c], iteration = p.scales[2 * channels];
  const double scale = GammaOf<Acc>(p.fix_gamma, p.gamma, c) * r * s;
  Store(p.gamma_grad_mode, static_cast<Acc*>(p.gamma_grad) + c,
        p.fix_gamma ? 0.0 : sum_dy_x * r * s);
  Store(p.beta_grad_mode, static_cast<Acc*>(p.beta_grad) + c, sum_dy);
  if (p.backward_sums != nullptr) {
    p.backward_sums[c] = 0.0;
    p.backward_sums[channels + c] =
        iteration > 0 ? scale * sum_dy_x / p.statistics[2 * channels] : 0.0;
    if (c == 0) p.backward_sums[2 * channels] = 0.0;
  }
  if (p.backward_context != nullptr) {
    p.backward_context[c] = scale;
    p.backward_context[channels + c] = s;
    if (c == 0) p.backward_context[2 * channels] = iteration;
  }
}

// dx = gamma * r * s * dy - s * s * x * average of gz.  Puts gz into the channel's buffer.
template <typename Acc>
GLUON_SYNCBN_ON_ANY_DEVICE ChannelEntry<Acc> CombineEntry(const MovingAverageBackwardParams& p,
                                                          std::size_t c) {
  const std::size_t channels = p.shape.channels;
  const double scale = p.backward_context[c], s = p.backward_context[channels + c];
  const double iteration = p.backward_context[2 * channels], gz = p.backward_sums[channels + c];
  double average = 0.0;
  if (iteration > 0) {
    const SlotOf<Acc> slot(p.averages, iteration);
    if (std::isfinite(static_cast<Acc>(gz))) slot.Put(p.buffer_gz, channels, c, gz);
    average = slot.Average(p.buffer_gz, channels, c, gz);
  }
  return ToEntry<Acc>(0.0, -s * s * average, 0.0, scale);
}

}  // namespace gluon_syncbn
