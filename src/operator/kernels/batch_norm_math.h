// The arithmetic of batch normalization per channel, once for CPUs, GPUs and the exchange.
//
// What is per element is each device's own (kernels/cpu/loops.inc, kernels/cuda/elementwise.cuh, kernels/cuda/reduction.cuh).
// See batch_norm_kernels.h for the formulas' names.
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

// Some elements of a channel: how many, their mean, and sum((x - mean)^2).
struct Moments {
  double count, mean, m2;
};

// The moments of the elements of both: Chan, Golub and LeVeque, "Updating formulae and a pairwise
// algorithm for computing sample variances", Stanford STAN-CS-79-773, 1979.  Means are only ever
// subtracted from each other, so nothing is lost however far from zero they lie.
GLUON_SYNCBN_ON_ANY_DEVICE inline Moments Merged(const Moments& a, const Moments& b) {
  if (!(a.count > 0)) return b;
  const double count = a.count + b.count;
  const double distance = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + distance * share, a.m2 + b.m2 + distance * distance * (a.count * share)};
}

// The sums over elements of a channel of their distance from a pivot, and of its square ("shifted
// data": Chan, Golub and LeVeque, "Algorithms for computing the sample variance: analysis and
// recommendations", The American Statistician 37, 1983).  What is lost is the factor by which
// `squares` exceeds M2, its value about the mean: close to 1 for a pivot among most elements, and
// never above 1 + count for a pivot that is one of them, since then M2 contains its own distance.
struct ShiftedSums {
  double sum = 0.0, squares = 0.0;

  // Adds `count` elements whose sums were taken about another pivot, `distance` above this one.
  GLUON_SYNCBN_ON_ANY_DEVICE void Add(double distance, double count, double other_sum,
                                      double other_squares) {
    squares += other_squares + distance * (2 * other_sum + count * distance);
    sum += other_sum + count * distance;
  }
  GLUON_SYNCBN_ON_ANY_DEVICE Moments About(double pivot, double count) const {
    if (!(count > 0)) return {0.0, 0.0, 0.0};
    const double distance = sum / count;
    const double m2 = squares - sum * distance;
    // Rounding can leave a constant channel a little below 0; NaN must stay NaN.
    return {count, pivot + distance, m2 < 0 ? 0.0 : m2};
  }
};

// The statistics that a pass uses: over all devices, or, where nobody measured or no device had an
// element, the moving ones.  `W` is the type of the parameters.
template <typename W>
struct StatisticsInUse {
  std::size_t channels;
  const double* statistics;  // may be null
  const W* moving_mean;
  const W* moving_var;

  // How many elements the statistics are over; 0: the moving statistics are used.
  GLUON_SYNCBN_ON_ANY_DEVICE double Count() const {
    const double count = statistics == nullptr ? 0.0 : statistics[2 * channels];
    return count > 0 ? count : 0.0;
  }
  GLUON_SYNCBN_ON_ANY_DEVICE double Mean(std::size_t c) const {
    return Count() > 0 ? statistics[c] : static_cast<double>(moving_mean[c]);
  }
  GLUON_SYNCBN_ON_ANY_DEVICE double Variance(std::size_t c) const {
    const double count = Count();
    return count > 0 ? statistics[channels + c] / count : static_cast<double>(moving_var[c]);
  }
};

template <typename W, typename Kernel>
StatisticsInUse<W> InUse(const Kernel& k) {
  return {k.shape.channels, k.statistics, static_cast<const W*>(k.moving_mean),
          static_cast<const W*>(k.moving_var)};
}

// What is computed per element: (x - mean) * scale + shift [+ factor * dy].
template <typename W>
struct alignas(4 * sizeof(W) > 16 ? 16 : 4 * sizeof(W)) TableEntry {
  W mean, scale, shift, factor;
};

// The mean as the sum of two numbers, so that x - mean stays exact: its low part is in the shift.
template <typename W>
GLUON_SYNCBN_ON_ANY_DEVICE TableEntry<W> Entry(double mean, double scale, double shift,
                                               double factor) {
  const W high = static_cast<W>(mean);
  const double low = mean - high;
  return {high, static_cast<W>(scale), static_cast<W>(shift - scale * low), static_cast<W>(factor)};
}

// y = (x - mean) * gamma * r + beta
template <typename W>
GLUON_SYNCBN_ON_ANY_DEVICE TableEntry<W> NormalizeEntry(const NormalizeForward& k,
                                                        const StatisticsInUse<W>& statistics,
                                                        std::size_t c) {
  const double gamma = k.fix_gamma ? 1.0 : static_cast<double>(static_cast<const W*>(k.gamma)[c]);
  return Entry<W>(statistics.Mean(c), gamma / std::sqrt(statistics.Variance(c) + k.epsilon),
                  static_cast<const W*>(k.beta)[c], 0.0);
}

// How much the moving statistics keep of what they were.
template <typename W>
GLUON_SYNCBN_ON_ANY_DEVICE double Momentum(const NormalizeForward& k) {
  if (k.batches == nullptr) return k.momentum;
  const double before = *static_cast<const W*>(k.batches);
  return before / (before + 1);
}

// After all channels have taken their Momentum.  In float32 the number stays at 2^24, where one
// batch more or less no longer changes the average.
template <typename W>
GLUON_SYNCBN_ON_ANY_DEVICE void CountBatch(const NormalizeForward& k) {
  if (k.batches != nullptr) *static_cast<W*>(k.batches) += 1;
}

// After NormalizeEntry, which may read them.
template <typename W>
GLUON_SYNCBN_ON_ANY_DEVICE void MoveStatistics(const NormalizeForward& k,
                                               const StatisticsInUse<W>& statistics,
                                               std::size_t c) {
  const double momentum = Momentum<W>(k);
  if (!(statistics.Count() > 0) || momentum == 1) return;
  const auto move = [&](void* moving, double batch) {
    W* to = static_cast<W*>(moving) + c;
    *to = static_cast<W>(momentum * *to + (1 - momentum) * batch);
  };
  move(k.moving_mean, statistics.Mean(c));
  move(k.moving_var, statistics.Variance(c));
}

// r and A.
struct Coefficients {
  double r, a;
};
template <typename W>
GLUON_SYNCBN_ON_ANY_DEVICE Coefficients CoefficientsOf(const NormalizeBackward& k,
                                                       const StatisticsInUse<W>& statistics,
                                                       std::size_t c) {
  const double r = 1.0 / std::sqrt(statistics.Variance(c) + k.epsilon);
  return {r, k.fix_gamma ? r : r * static_cast<const W*>(k.gamma)[c]};
}

template <typename W>
GLUON_SYNCBN_ON_ANY_DEVICE void Assign(Request request, void* array, std::size_t c, double value) {
  W* to = static_cast<W*>(array) + c;
  if (request == Request::kWrite) *to = static_cast<W>(value);
  if (request == Request::kAdd) *to = static_cast<W>(*to + value);
}

// What a device's sums over dy come to: `sum` of dy, `centred` of dy * (x - mean).
template <typename W>
GLUON_SYNCBN_ON_ANY_DEVICE void FinishGradients(const NormalizeBackward& k,
                                                const StatisticsInUse<W>& statistics, std::size_t c,
                                                double sum, double centred) {
  const Coefficients coefficients = CoefficientsOf(k, statistics, c);
  Assign<W>(k.gamma_request, k.gamma_grad, c, k.fix_gamma ? 0.0 : centred * coefficients.r);
  Assign<W>(k.beta_request, k.beta_grad, c, sum);
  const double count = statistics.Count();
  const double per_element = count > 0 ? coefficients.a / count : 0.0;
  if (k.statistics_grad != nullptr) {
    k.statistics_grad[c] = -per_element * sum;
    k.statistics_grad[statistics.channels + c] =
        -per_element * coefficients.r * coefficients.r * centred;
    if (c == 0) k.statistics_grad[2 * statistics.channels] = 0.0;
  }
  if (k.coefficients_grad != nullptr) {
    k.coefficients_grad[c] = coefficients.a;
    k.coefficients_grad[statistics.channels + c] = statistics.Mean(c);
  }
}

// dx = A * dy, where the moving statistics normalized.
template <typename W>
GLUON_SYNCBN_ON_ANY_DEVICE TableEntry<W> ScaleEntry(const NormalizeBackward& k,
                                                    const StatisticsInUse<W>& statistics,
                                                    std::size_t c) {
  return Entry<W>(0.0, CoefficientsOf(k, statistics, c).a, 0.0, 0.0);
}

// dx = A * dy + (x - mean) * B + C
template <typename W>
GLUON_SYNCBN_ON_ANY_DEVICE TableEntry<W> CombineEntry(const MomentsBackward& k, std::size_t c) {
  const std::size_t channels = k.shape.channels;
  return Entry<W>(k.coefficients_grad[channels + c], k.statistics_grad[channels + c],
                  k.statistics_grad[c], k.coefficients_grad[c]);
}

}  // namespace gluon_syncbn
