// Weighted moments on the CPU.  Plain loops, some channels at a time: weights are rare, and what is
// not a layer's every step need not run at the memory's speed.
#include "kernels/weighted_moments.h"

#include <algorithm>
#include <vector>

#include "kernels/acc_type.h"
#include "kernels/cpu/float16.h"
#include "kernels/cpu/threads.h"
#include "kernels/element_type.h"
#include "kernels/weighted_moments_math.h"

namespace gluon_syncbn {
namespace {

double Load(const Float16* from) { return ToFloat(*from); }
double Load(const float* from) { return *from; }
double Load(const double* from) { return *from; }
void Store(double value, Float16* to) { *to = ToFloat16(static_cast<float>(value)); }
void Store(double value, float* to) { *to = static_cast<float>(value); }
void Store(double value, double* to) { *to = value; }

// Calls visit(channel, outer, inner, element) for all elements of a few channels, in the order of
// memory, and blocks of channels in several threads.  begin(channel) and end(channel) run before
// and after.
template <typename Begin, typename Visit, typename End>
void ForEachElement(const FeatureShape& s, const Begin& begin, const Visit& visit, const End& end) {
  constexpr std::size_t kChannels = 16;  // adjacent in memory with channels last
  const std::size_t blocks = (s.channels + kChannels - 1) / kChannels;
  ParallelFor(blocks, s.channels * s.count(), [&](std::size_t block) {
    const std::size_t first = block * kChannels, last = std::min(first + kChannels, s.channels);
    for (std::size_t c = first; c < last; ++c) begin(c);
    for (std::size_t outer = 0; outer < s.outer; ++outer) {
      for (std::size_t c = first; c < last; ++c) {
        const std::size_t at = outer * s.outer_stride() + c * s.inner;
        for (std::size_t i = 0; i < s.inner; ++i) visit(c, outer, i, at + i);
      }
    }
    for (std::size_t c = first; c < last; ++c) end(c);
  });
}

template <typename T>
void RunTyped(const MomentsForwardParams& p, const PositionWeights& given) {
  using Acc = AccType<T>;
  const std::size_t channels = p.shape.channels;
  const T* x = static_cast<const T*>(p.x);
  if (p.copy != nullptr && p.copy != p.x) {
    std::copy_n(x, p.shape.outer * p.shape.outer_stride(), static_cast<T*>(p.copy));
  }
  if (!p.compute_statistics) {
    std::fill_n(p.statistics, 2 * channels, 0.0);
    p.statistics[2 * channels] = kNoStatistics;
    return;
  }
  const auto weights = ToWeights<Acc>(given, p.shape);
  std::vector<WeightedSums> sums(channels);
  ForEachElement(
      p.shape, [](std::size_t) {},
      [&](std::size_t c, std::size_t outer, std::size_t i, std::size_t at) {
        sums[c].Add(weights.At(outer, i), Load(x + at));
      },
      [&](std::size_t c) {
        const Moments moments = sums[c].ToMoments();
        p.statistics[c] = moments.mean;
        p.statistics[channels + c] = moments.m2;
      });
  p.statistics[2 * channels] = channels == 0 ? 0.0 : sums[0].weight;
}

template <typename T>
void RunTyped(const MomentsBackwardParams& p, const PositionWeights& given) {
  if (p.dx_mode == WriteMode::kSkip) return;
  const auto weights = ToWeights<AccType<T>>(given, p.shape);
  const T* g = static_cast<const T*>(p.g);
  const T* x = static_cast<const T*>(p.x);
  T* dx = static_cast<T*>(p.dx);
  const auto nothing = [](std::size_t) {};
  ForEachElement(
      p.shape, nothing,
      [&](std::size_t c, std::size_t outer, std::size_t i, std::size_t at) {
        const double before = p.dx_mode == WriteMode::kAdd ? Load(dx + at) : 0.0;
        Store(WeightedDx(p, c, weights.At(outer, i), Load(g + at), Load(x + at), before), dx + at);
      },
      nothing);
}

template <typename Params>
void Dispatch(const Params& params, const PositionWeights& weights) {
  WithType<Float16>(params.type,
                    [&](auto element) { RunTyped<decltype(element)>(params, weights); });
}

}  // namespace

void RunWeighted(Cpu, const MomentsForwardParams& params, const PositionWeights& weights) {
  Dispatch(params, weights);
}
void RunWeighted(Cpu, const MomentsBackwardParams& params, const PositionWeights& weights) {
  Dispatch(params, weights);
}

}  // namespace gluon_syncbn
