// The arithmetic of batch normalization per channel: once for CPUs, GPUs and the exchange.
//
// Loops over elements are each device's own (cpu/loops.inc, cuda/elementwise.cuh,
// cuda/reduction.cuh).  batch_norm_kernels.h has the notation.
#pragma once

#include <cmath>
#include <cstddef>

#include "kernels/batch_norm_kernels.h"

#ifdef __CUDACC__
#define GLUON_SYNCBN_ON_ANY_DEVICE __host__ __device__
#else
#define GLUON_SYNCBN_ON_ANY_DEVICE
#endif

namespace gluon_syncbn {

template <typename T>
GLUON_SYNCBN_ON_ANY_DEVICE bool IsFinite(T value) {
  return value - value == 0;
}

// `value`, or 0 if it is infinite or NaN.
//
// What makes results exact for finite data (a pivot, the low part of a mean) must not change what
// becomes of infinities and NaNs.  Without it, the formula of batch normalization has an infinity
// where with it there would be inf - inf or 0 * inf, a NaN.
template <typename T>
GLUON_SYNCBN_ON_ANY_DEVICE T OrZero(T value) {
  return IsFinite(value) ? value : T(0);
}

// Of some elements of a channel: n, mean and M2.
struct Moments {
  double count, mean, m2;
};

// The moments of a and b together: Chan, Golub and LeVeque, "Updating formulae and a pairwise
// algorithm for computing sample variances", Stanford STAN-CS-79-773, 1979.  Means are only ever
// subtracted from each other, so nothing is lost however far from zero they are.
GLUON_SYNCBN_ON_ANY_DEVICE inline Moments Merged(const Moments& a, const Moments& b) {
  if (!(a.count > 0)) return b;
  const double count = a.count + b.count;
  const double distance = b.mean - a.mean, weight = b.count / count;
  const double mean = IsFinite(distance) ? a.mean + distance * weight
                                         : a.mean * (a.count / count) + b.mean * weight;
  return {count, mean, a.m2 + b.m2 + distance * distance * (a.count * weight)};
}

// Sums over elements of a channel of (x - pivot) and (x - pivot)^2 ("shifted data" in Chan, Golub
// and LeVeque, "Algorithms for computing the sample variance: analysis and recommendations", The
// American Statistician 37, 1983).  The relative error of M2 grows by the factor by which `squares`
// exceeds M2: close to 1 if the pivot lies among most elements, and at most 1 + count if it is one
// of them, because M2 then contains its own distance from the mean.  The pivot must be finite (see
// OrZero); with an infinite element, the mean is that infinity and M2 is NaN.
struct ShiftedSums {
  double sum = 0.0, squares = 0.0;

  // Adds the sums of `count` elements about another pivot, which is this one + `distance`.
  GLUON_SYNCBN_ON_ANY_DEVICE void Add(double distance, double count, double other_sum,
                                      double other_squares) {
    squares += other_squares + distance * (2 * other_sum + count * distance);
    sum += other_sum + count * distance;
  }
  GLUON_SYNCBN_ON_ANY_DEVICE Moments ToMoments(double pivot, double count) const {
    if (!(count > 0)) return {0.0, 0.0, 0.0};
    const double distance = sum / count;
    const double m2 = squares - sum * distance;
    // Rounding can take a constant channel slightly below 0; NaN must stay NaN.
    return {count, pivot + distance, m2 < 0 ? 0.0 : m2};
  }
};

// Stores a result.  `T` is float or double.
template <typename T>
GLUON_SYNCBN_ON_ANY_DEVICE void Store(WriteMode mode, T* to, double value) {
  if (mode == WriteMode::kWrite) *to = static_cast<T>(value);
  if (mode == WriteMode::kAdd) *to = static_cast<T>(*to + value);
}

// The statistics by which a pass normalizes: the batch's, or the moving ones if the batch has none
// (they were not computed, or no device had an element).
template <typename Acc>
struct StatisticsInUse {
  std::size_t channels;
  const double* statistics;  // may be null
  const Acc* moving_mean;
  const Acc* moving_var;

  // n; 0 if the moving statistics are used.
  GLUON_SYNCBN_ON_ANY_DEVICE double Count() const {
    const double count = statistics == nullptr ? 0.0 : statistics[2 * channels];
    return count > 0 ? count : 0.0;
  }
  GLUON_SYNCBN_ON_ANY_DEVICE bool AreOfBatch() const { return Count() > 0; }
  GLUON_SYNCBN_ON_ANY_DEVICE double Mean(std::size_t c) const {
    return AreOfBatch() ? statistics[c] : static_cast<double>(moving_mean[c]);
  }
  GLUON_SYNCBN_ON_ANY_DEVICE double Variance(std::size_t c) const {
    return AreOfBatch() ? statistics[channels + c] / Count() : static_cast<double>(moving_var[c]);
  }
};

template <typename Acc, typename Params>
StatisticsInUse<Acc> InUse(const Params& p) {
  return {p.shape.channels, p.statistics, static_cast<const Acc*>(p.moving_mean),
          static_cast<const Acc*>(p.moving_var)};
}

// The numbers of a channel for the loops over elements, which compute
// (x - mean) * scale + shift [+ factor * g].
template <typename Acc>
struct alignas(4 * sizeof(Acc) > 16 ? 16 : 4 * sizeof(Acc)) ChannelEntry {
  Acc mean, scale, shift, factor;
};

// x - mean stays exact: the low part of the mean, which Acc cannot hold, goes into the shift.
template <typename Acc>
GLUON_SYNCBN_ON_ANY_DEVICE ChannelEntry<Acc> ToEntry(double mean, double scale, double shift,
                                                     double factor) {
  const Acc high = static_cast<Acc>(mean);
  const double low = mean - high;
  return {high, static_cast<Acc>(scale), static_cast<Acc>(shift - OrZero(scale * low)),
          static_cast<Acc>(factor)};
}

// What batch renormalization makes of the normalized x: x * r + d.
struct Correction {
  double r = 1.0, d = 0.0;
};

// Call before UpdateMovingStatistics, which changes the averages.
template <typename Acc>
GLUON_SYNCBN_ON_ANY_DEVICE Correction CorrectionOf(const NormalizeForwardParams& p,
                                                   const StatisticsInUse<Acc>& statistics,
                                                   std::size_t c) {
  const Renormalization& renorm = p.renorm;
  if (renorm.mean == nullptr || !statistics.AreOfBatch()) return {};
  const auto limited = [](double limit) { return limit != Renormalization::kNoLimit; };
  const double least = std::sqrt(p.epsilon), average = static_cast<const Acc*>(renorm.stddev)[c];
  const double stddev = average < least ? least : average;
  double r = std::sqrt(statistics.Variance(c) + p.epsilon) / stddev;
  double d = (statistics.Mean(c) - static_cast<const Acc*>(renorm.mean)[c]) / stddev;
  if (limited(renorm.r_min) && r < renorm.r_min) r = renorm.r_min;
  if (limited(renorm.r_max) && r > renorm.r_max) r = renorm.r_max;
  if (limited(renorm.d_max) && d > renorm.d_max) d = renorm.d_max;
  if (limited(renorm.d_max) && d < -renorm.d_max) d = -renorm.d_max;
  return {r, d};
}

// As it was in forward.
template <typename Acc, typename BackwardParams>
GLUON_SYNCBN_ON_ANY_DEVICE Correction CorrectionOf(const BackwardParams& p,
                                                   const StatisticsInUse<Acc>&, std::size_t c) {
  if (p.correction == nullptr) return {};
  return {p.correction[2 * c], p.correction[2 * c + 1]};
}

// z = ((x - mean) * invstd * r + d) * gamma + beta; the same bits in forward and where backward
// needs z again.
template <typename Acc, typename Params>
GLUON_SYNCBN_ON_ANY_DEVICE ChannelEntry<Acc> NormalizeEntry(const Params& p, const void* beta,
                                                            const StatisticsInUse<Acc>& statistics,
                                                            std::size_t c) {
  const double gamma = p.fix_gamma ? 1.0 : static_cast<double>(static_cast<const Acc*>(p.gamma)[c]);
  const Correction correction = CorrectionOf(p, statistics, c);
  const double scale = gamma / std::sqrt(statistics.Variance(c) + p.epsilon);
  double shift = static_cast<const Acc*>(beta)[c];
  if (correction.d != 0) shift += gamma * correction.d;  // gamma may be infinite
  return ToEntry<Acc>(statistics.Mean(c), scale * correction.r, shift, 0.0);
}

// What has the sign of z, as an affine function of x, or of y where there is a residual; without an
// activation, the identity.
template <typename Acc, typename BackwardParams>
GLUON_SYNCBN_ON_ANY_DEVICE ChannelEntry<Acc> GateEntry(const BackwardParams& p,
                                                       const StatisticsInUse<Acc>& statistics,
                                                       std::size_t c) {
  if (!p.epilogue.activation.present || p.epilogue.y != nullptr) {
    return {Acc(0), Acc(1), Acc(0), Acc(0)};
  }
  return NormalizeEntry(p, p.epilogue.beta, statistics, c);
}

// The weight of the old moving statistics in the new ones.
template <typename Acc>
GLUON_SYNCBN_ON_ANY_DEVICE double Momentum(const NormalizeForwardParams& p) {
  if (p.batches == nullptr) return p.momentum;
  const double before = *static_cast<const Acc*>(p.batches);
  return before / (before + 1);
}

// Call after Momentum has been read for all channels.  In float32 the number stays at 2^24, where
// one batch more no longer changes the average.
template <typename Acc>
GLUON_SYNCBN_ON_ANY_DEVICE void CountBatch(const NormalizeForwardParams& p) {
  if (p.batches != nullptr) *static_cast<Acc*>(p.batches) += 1;
}

template <typename Acc>
GLUON_SYNCBN_ON_ANY_DEVICE void MoveTo(double batch, double momentum, void* average,
                                       std::size_t c) {
  if (momentum == 1) return;
  Acc* to = static_cast<Acc*>(average) + c;
  *to = static_cast<Acc>(momentum * *to + (1 - momentum) * batch);
}

// Call after NormalizeEntry, which may read the moving statistics.
template <typename Acc>
GLUON_SYNCBN_ON_ANY_DEVICE void UpdateMovingStatistics(const NormalizeForwardParams& p,
                                                       const StatisticsInUse<Acc>& statistics,
                                                       std::size_t c) {
  if (p.renorm.mean != nullptr) {
    const Correction correction = CorrectionOf(p, statistics, c);
    p.renorm.correction[2 * c] = correction.r;
    p.renorm.correction[2 * c + 1] = correction.d;
  }
  if (!statistics.AreOfBatch()) return;
  const double mean = statistics.Mean(c), variance = statistics.Variance(c);
  if (p.renorm.mean != nullptr) {
    MoveTo<Acc>(mean, p.renorm.momentum, p.renorm.mean, c);
    MoveTo<Acc>(std::sqrt(variance + p.epsilon), p.renorm.momentum, p.renorm.stddev, c);
  }
  const double momentum = Momentum<Acc>(p);
  MoveTo<Acc>(mean, momentum, p.moving_mean, c);
  MoveTo<Acc>(variance, momentum, p.moving_var, c);
}

// Of the gradients: gamma * invstd is multiplied by r.
struct Scales {
  double invstd, gamma_invstd;
};
template <typename Acc, typename BackwardParams>
GLUON_SYNCBN_ON_ANY_DEVICE Scales ScalesOf(const BackwardParams& p,
                                           const StatisticsInUse<Acc>& statistics, std::size_t c) {
  const double invstd = 1.0 / std::sqrt(statistics.Variance(c) + p.epsilon);
  const double gamma_invstd = p.fix_gamma ? invstd : invstd * static_cast<const Acc*>(p.gamma)[c];
  return {invstd, gamma_invstd * CorrectionOf(p, statistics, c).r};
}

// `sum_g` and `sum_g_xmu` are this device's sums of g and of g * (x - mean).
template <typename Acc, typename BackwardParams>
GLUON_SYNCBN_ON_ANY_DEVICE void StoreParameterGradients(const BackwardParams& p,
                                                        const StatisticsInUse<Acc>& statistics,
                                                        const Scales& scales, std::size_t c,
                                                        double sum_g, double sum_g_xmu) {
  const Correction correction = CorrectionOf(p, statistics, c);
  double of_gamma = sum_g_xmu * scales.invstd * correction.r;
  if (correction.d != 0) of_gamma += sum_g * correction.d;
  Store(p.gamma_grad_mode, static_cast<Acc*>(p.gamma_grad) + c, p.fix_gamma ? 0.0 : of_gamma);
  Store(p.beta_grad_mode, static_cast<Acc*>(p.beta_grad) + c, sum_g);
}

template <typename Acc>
GLUON_SYNCBN_ON_ANY_DEVICE void FinishGradients(const LocalBackwardParams& p,
                                                const StatisticsInUse<Acc>& statistics,
                                                std::size_t c, double sum_g, double sum_g_xmu) {
  StoreParameterGradients(p, statistics, ScalesOf(p, statistics, c), c, sum_g, sum_g_xmu);
}

template <typename Acc>
GLUON_SYNCBN_ON_ANY_DEVICE void FinishGradients(const NormalizeBackwardParams& p,
                                                const StatisticsInUse<Acc>& statistics,
                                                std::size_t c, double sum_g, double sum_g_xmu) {
  const Scales scales = ScalesOf(p, statistics, c);
  StoreParameterGradients(p, statistics, scales, c, sum_g, sum_g_xmu);
  const std::size_t channels = statistics.channels;
  const double per_element =
      statistics.AreOfBatch() ? scales.gamma_invstd / statistics.Count() : 0.0;
  if (p.backward_sums != nullptr) {
    p.backward_sums[c] = -per_element * sum_g;
    p.backward_sums[channels + c] = -per_element * scales.invstd * scales.invstd * sum_g_xmu;
    if (c == 0) p.backward_sums[2 * channels] = 0.0;
  }
  if (p.backward_context != nullptr) {
    p.backward_context[c] = scales.gamma_invstd;
    p.backward_context[channels + c] = statistics.Mean(c);
  }
}

// dx = gamma * invstd * g, where forward used the moving statistics.
template <typename Acc>
GLUON_SYNCBN_ON_ANY_DEVICE ChannelEntry<Acc> ScaleEntry(const LocalBackwardParams& p,
                                                        const StatisticsInUse<Acc>& statistics,
                                                        std::size_t c) {
  return ToEntry<Acc>(0.0, ScalesOf(p, statistics, c).gamma_invstd, 0.0, 0.0);
}

// dx = (x - mean) * b + c + gamma * invstd * g
template <typename Acc>
GLUON_SYNCBN_ON_ANY_DEVICE ChannelEntry<Acc> CombineEntry(const MomentsBackwardParams& p,
                                                          std::size_t c) {
  const std::size_t channels = p.shape.channels;
  return ToEntry<Acc>(p.backward_context[channels + c], p.backward_sums[channels + c],
                      p.backward_sums[c], p.backward_context[c]);
}

}  // namespace gluon_syncbn
