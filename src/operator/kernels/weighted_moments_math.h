// The arithmetic of weighted_moments.h per element, once for CPUs and GPUs.
#pragma once

#include "kernels/batch_norm_math.h"
#include "kernels/weighted_moments.h"

namespace gluon_syncbn {

// The weight of position (outer, inner).
template <typename Acc>
struct Weights {
  const Acc* values;
  std::size_t outer_per_sample, inner;

  GLUON_SYNCBN_ON_ANY_DEVICE double At(std::size_t outer, std::size_t i) const {
    const Acc weight =
        outer_per_sample == 0 ? values[outer * inner + i] : values[outer / outer_per_sample];
    return weight > 0 ? static_cast<double>(weight) : 0.0;
  }
};

template <typename Acc>
Weights<Acc> ToWeights(const PositionWeights& weights, const FeatureShape& shape) {
  return {static_cast<const Acc*>(weights.values), weights.outer_per_sample, shape.inner};
}

// The moments of a channel, element by element.  The pivot is the first element that counts.
struct WeightedSums {
  double weight = 0.0, pivot = 0.0;
  ShiftedSums sums;

  GLUON_SYNCBN_ON_ANY_DEVICE void Add(double w, double x) {
    if (!(w > 0)) return;
    if (weight == 0) pivot = OrZero(x);
    weight += w;
    sums.sum += w * (x - pivot);
    sums.squares += w * (x - pivot) * (x - pivot);
  }
  GLUON_SYNCBN_ON_ANY_DEVICE Moments ToMoments() const { return sums.ToMoments(pivot, weight); }
};

// `before`: what dx is added to.
GLUON_SYNCBN_ON_ANY_DEVICE inline double WeightedDx(const MomentsBackwardParams& p, std::size_t c,
                                                    double w, double g, double x, double before) {
  const std::size_t channels = p.shape.channels;
  const double scaled = p.backward_context[c] * g;
  if (!(w > 0)) return before + scaled;
  const double mean = p.backward_context[channels + c];
  const double through_moments = p.backward_sums[channels + c] * (x - mean) + p.backward_sums[c];
  return before + scaled + w * through_moments;
}

}  // namespace gluon_syncbn
