// The kernels on the CPU.  batch_norm_kernels.h says what they compute.
//
// Work per channel is done here.  Work per element is cut into tiles (feature_tiles.h), which are
// distributed over threads (threads.h) and processed by loops for the CPU at hand (loops.h).
// Memory bandwidth is the limit, so each kernel reads and writes an element as seldom as possible,
// and a tile that is needed twice comes from the cache the second time.
#include "kernels/batch_norm_kernels.h"

#include <algorithm>
#include <type_traits>

#include "kernels/batch_norm_math.h"
#include "kernels/cpu/local_batch_norm.h"
#include "kernels/cpu/tile_passes.h"

namespace gluon_syncbn {
namespace {

// `value`, or 0 if it is infinite or NaN, which no pivot may be (ShiftedSums).
template <typename T>
T ToPivot(T value) {
  return IsFinite(ToDouble(value)) ? value : T();
}

// Returns a pivot for each column of a tile: its first element, `*step` apart, if all are finite.
template <typename T>
const T* TilePivots(const FeatureTile& tile, const T* first, std::size_t* step) {
  bool finite = true;
  for (std::size_t i = 0; i < tile.columns; ++i) finite &= IsFinite(ToDouble(first[i * *step]));
  if (finite) return first;
  T* const pivots = Scratch<Use::kTilePivots, T>(tile.columns);
  for (std::size_t i = 0; i < tile.columns; ++i) pivots[i] = ToPivot(first[i * *step]);
  *step = 1;
  return pivots;
}

// Stores the mean and M2 of every channel in `statistics`.
template <typename T, typename Then>
void ComputeMoments(const FeatureTiles& tiles, const T* x, double* statistics, const Then& then) {
  const std::size_t channels = tiles.channels(), columns = tiles.tile_columns();
  struct Channel {
    double pivot = 0.0, count = 0.0;
    ShiftedSums sums;
  };
  Channel* all = Scratch<Use::kMoments, Channel>(channels);
  std::fill_n(all, channels, Channel());
  // The pivot of a channel is its first element, whatever the layout.  Sums of float32 differences
  // are mostly exact in float64, so means are mostly the same, bit for bit, in all layouts.
  //
  // Sums of float16 are taken in float32, at first, and less of them is lost about a pivot close
  // by: the pivots of a tile are its own first elements.  The sums of a channel are then converted
  // to one pivot, the mean of its first tile, which is far from the other tiles' means only if the
  // variance is large as well.
  constexpr bool kPivotPerTile = std::is_same_v<T, Float16>;
  T* const pivots = Scratch<Use::kPivots, T>(tiles.columns());
  if (!kPivotPerTile) {
    tiles.ForEachColumn(0, tiles.columns(), [=, &tiles](std::size_t column, std::size_t c) {
      pivots[column] = ToPivot(x[tiles.FirstElement(c)]);
    });
  }
  SumTiles(
      tiles, 3,
      [=](const FeatureTile& tile, double* to) {
        std::size_t step = kPivotPerTile ? tile.inner : 1;
        const T* const from =
            kPivotPerTile ? TilePivots(tile, x + tile.offset, &step) : pivots + tile.first_column;
        Loops<T>().moments(tile, from, step, x, to, to + columns);
        for (std::size_t i = 0; i < tile.columns; ++i) {
          to[2 * columns + i] = ToDouble(from[i * step]);
        }
      },
      then,
      [=](const FeatureTile& tile, std::size_t c, const double* from) {
        Channel& channel = all[c];
        const double count = static_cast<double>(tile.count());
        const double sum = from[0], squares = from[columns], tile_pivot = from[2 * columns];
        if (channel.count == 0) {
          channel.pivot = tile_pivot + (kPivotPerTile ? OrZero(sum / count) : 0.0);
        }
        channel.sums.Add(tile_pivot - channel.pivot, count, sum, squares);
        channel.count += count;
      });
  ForEachChannel(channels, [=](std::size_t c) {
    const Moments moments = all[c].sums.ToMoments(all[c].pivot, all[c].count);
    statistics[c] = moments.mean;
    statistics[channels + c] = moments.m2;
  });
}

// One pass over an array, x in; a second one, out, if x is copied.
template <typename T>
void RunTyped(const MomentsForwardParams& p) {
  const FeatureTiles tiles(p.shape);
  const std::size_t channels = p.shape.channels;
  const T* x = static_cast<const T*>(p.x);
  T* copy = static_cast<T*>(p.copy);
  if (!p.compute_statistics) {
    std::fill_n(p.statistics, 2 * channels, 0.0);
    p.statistics[2 * channels] = kNoStatistics;
    if (copy != nullptr && copy != x) {
      ParallelFor(tiles.count(), tiles.elements(),
                  [&](std::size_t i) { CopyTile(tiles[i], x, copy); });
    }
    return;
  }
  ComputeMoments(tiles, x, p.statistics, [=](const FeatureTile& tile) {
    if (copy != nullptr && copy != x) CopyTile(tile, x, copy);
  });
  p.statistics[2 * channels] = static_cast<double>(p.shape.count());
}

// Two passes over an array: x in, y out; a third one, in, for the residual.  (y needs the
// statistics of all devices, so it cannot be computed in the pass that reads x for them.)
template <typename T>
void RunTyped(const NormalizeForwardParams& p) {
  using Acc = AccType<T>;
  const FeatureTiles tiles(p.shape);
  const auto statistics = InUse<Acc>(p);
  ChannelParams<Acc> params(tiles);
  ForEachChannel(p.shape.channels, [&](std::size_t c) {
    params.Set(c, NormalizeEntry(p, p.beta, statistics, c));
    UpdateMovingStatistics(p, statistics, c);
  });
  if (statistics.AreOfBatch()) CountBatch<Acc>(p);
  if (p.y_mode == WriteMode::kSkip) return;
  params.Spread();
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  const Epilogue<T> epilogue{static_cast<const T*>(p.residual), p.activation.present,
                             static_cast<Acc>(p.activation.slope)};
  const bool plain = epilogue.residual == nullptr && !epilogue.activate;
  ForEachTileBackwards(tiles, [&](const FeatureTile& tile) {
    const bool add = p.y_mode == WriteMode::kAdd;
    if (plain) return Loops<T>().affine(tile, params.affine(), x, y, add);
    Loops<T>().activate(tile, params.affine(), epilogue, x, y, add);
  });
}

// g, tile by tile: from dy, to where it is wanted.
template <typename T>
class Gradient {
  using Acc = AccType<T>;

 public:
  // `to` is where g is to be stored, possibly null.
  template <typename BackwardParams>
  Gradient(const BackwardParams& p, void* to, const FeatureTiles& tiles,
           const StatisticsInUse<Acc>& statistics)
      : activation_(p.epilogue.activation),
        dy_(static_cast<const T*>(p.dy)),
        sign_(static_cast<const T*>(p.epilogue.y != nullptr ? p.epilogue.y : p.x)),
        residual_mode_(p.epilogue.residual_grad_mode),
        residual_(static_cast<T*>(p.epilogue.residual_grad)),
        g_(static_cast<T*>(to)),
        table_(tiles) {
    if (!activation_.present && residual_mode_ != WriteMode::kAdd) return;
    if (activation_.present && g_ == nullptr) {
      if (residual_mode_ == WriteMode::kWrite) {
        g_ = residual_;
      } else {
        spare_.resize(p.shape.outer * p.shape.outer_stride());
        g_ = spare_.data();
      }
    }
    ForEachChannel(p.shape.channels,
                   [&](std::size_t c) { table_.Set(c, GateEntry(p, statistics, c)); });
    table_.Spread();
  }

  void Compute(const FeatureTile& tile) const {
    if (activation_.present) {
      Loops<T>().gate(tile, table_.affine(), static_cast<Acc>(activation_.slope), dy_, sign_, g_);
    } else if (g_ != nullptr && g_ != dy_) {
      CopyTile(tile, dy_, g_);
    }
    if (residual_mode_ == WriteMode::kWrite && residual_ != g_) CopyTile(tile, Get(), residual_);
    if (residual_mode_ == WriteMode::kAdd) {
      Loops<T>().affine(tile, table_.affine(), Get(), residual_, true);
    }
  }

  // What Compute has computed.
  const T* Get() const { return g_ != nullptr ? g_ : dy_; }

 private:
  const Activation activation_;
  const T* const dy_;
  const T* const sign_;
  const WriteMode residual_mode_;
  T* const residual_;
  T* g_;
  std::vector<T> spare_;
  ChannelParams<Acc, Use::kGateParams> table_;
};

// The sums of g and g * (x - mean) over this device's elements, and what FinishGradients makes of
// them.  `then(tile)` runs while the tile is in the cache.
template <typename T, typename BackwardParams, typename Then>
void SumGradients(const BackwardParams& p, const FeatureTiles& tiles,
                  const StatisticsInUse<AccType<T>>& statistics, const AccType<T>* column_means,
                  const Gradient<T>& gradient, const Then& then) {
  using Acc = AccType<T>;
  const ProductSums sums = SumProducts(
      tiles, column_means, gradient.Get(), static_cast<const T*>(p.x),
      [&](const FeatureTile& tile) { gradient.Compute(tile); }, then);
  ForEachChannel(p.shape.channels, [&](std::size_t c) {
    // What rounding to Acc took from the mean.
    const double mean = statistics.Mean(c), low = mean - static_cast<Acc>(mean);
    FinishGradients(p, statistics, c, sums.g[c], sums.g_xmu[c] - OrZero(low * sums.g[c]));
  });
}

// Two passes over an array, dy and x in; a third one, out, if g is stored elsewhere; with a
// residual one more, y in, and its gradient out.
template <typename T>
void RunTyped(const NormalizeBackwardParams& p) {
  using Acc = AccType<T>;
  const FeatureTiles tiles(p.shape);
  const auto statistics = InUse<Acc>(p);
  ChannelParams<Acc> params(tiles);
  ForEachChannel(p.shape.channels, [&](std::size_t c) {
    params.Set(c, {static_cast<Acc>(statistics.Mean(c)), 0, 0, 0});
  });
  params.Spread();
  const Gradient<T> gradient(p, p.g, tiles, statistics);
  SumGradients<T>(p, tiles, statistics, params.affine().mean, gradient, [](const FeatureTile&) {});
}

// Three passes over an array: dy and x in, dx out.
template <typename T>
void RunTyped(const LocalBackwardParams& p) {
  using Acc = AccType<T>;
  const FeatureTiles tiles(p.shape);
  const auto statistics = InUse<Acc>(p);
  ChannelParams<Acc> params(tiles);
  ForEachChannel(p.shape.channels, [&](std::size_t c) {
    ChannelEntry<Acc> entry = ScaleEntry(p, statistics, c);
    entry.factor = static_cast<Acc>(statistics.Mean(c));  // for the sums
    params.Set(c, entry);
  });
  params.Spread();
  T* dx = static_cast<T*>(p.dx);
  const bool through_dx = p.epilogue.activation.present && p.dx_mode == WriteMode::kWrite;
  const Gradient<T> gradient(p, through_dx ? dx : nullptr, tiles, statistics);
  SumGradients<T>(p, tiles, statistics, params.factor(), gradient, [&](const FeatureTile& tile) {
    if (p.dx_mode == WriteMode::kSkip) return;
    Loops<T>().affine(tile, params.affine(), gradient.Get(), dx, p.dx_mode == WriteMode::kAdd);
  });
}

// Three passes over an array: g and x in, dx out.  (dx needs the sums of all devices, so it cannot
// be computed in the pass that reads g and x for them.)
template <typename T>
void RunTyped(const MomentsBackwardParams& p) {
  using Acc = AccType<T>;
  if (p.dx_mode == WriteMode::kSkip) return;
  const FeatureTiles tiles(p.shape);
  ChannelParams<Acc> params(tiles);
  ForEachChannel(p.shape.channels, [&](std::size_t c) { params.Set(c, CombineEntry<Acc>(p, c)); });
  params.Spread();
  Combine(tiles, params, static_cast<const T*>(p.g), static_cast<const T*>(p.x),
          static_cast<T*>(p.dx), p.dx_mode == WriteMode::kAdd);
}

template <typename Params>
void Dispatch(const Params& params) {
  WithType<Float16>(params.type, [&](auto element) { RunTyped<decltype(element)>(params); });
}

}  // namespace

void Run(Cpu, const MomentsForwardParams& params) { Dispatch(params); }
void Run(Cpu, const NormalizeForwardParams& params) { Dispatch(params); }
void Run(Cpu, const NormalizeBackwardParams& params) { Dispatch(params); }
void Run(Cpu, const MomentsBackwardParams& params) { Dispatch(params); }

void BackwardByMovingStatistics(const LocalBackwardParams& params) { Dispatch(params); }

}  // namespace gluon_syncbn
