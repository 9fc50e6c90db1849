// The kernels of moving average batch normalization on the CPU.  moving_average_kernels.h says what
// they compute; the passes over elements are those of batch_norm_kernels.cc.
#include "kernels/moving_average_kernels.h"

#include "kernels/cpu/tile_passes.h"
#include "kernels/moving_average_math.h"

namespace gluon_syncbn {
namespace {

// Two passes over an array: x in, y out.
template <typename T>
void RunTyped(const MovingAverageForwardParams& p) {
  using Acc = AccType<T>;
  const FeatureTiles tiles(p.shape);
  ChannelParams<Acc> params(tiles);
  ForEachChannel(p.shape.channels,
                 [&](std::size_t c) { params.Set(c, NormalizeEntry<Acc>(p, c)); });
  CountIteration<Acc>(p);
  if (p.y_mode == WriteMode::kSkip) return;
  params.Spread();
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  ForEachTileBackwards(tiles, [&](const FeatureTile& tile) {
    Loops<T>().affine(tile, params.affine(), x, y, p.y_mode == WriteMode::kAdd);
  });
}

// Two passes over an array, dy and x in; a third one, out, if dy is copied.
template <typename T>
void RunTyped(const MovingAverageSumsParams& p) {
  using Acc = AccType<T>;
  const FeatureTiles tiles(p.shape);
  ChannelParams<Acc> params(tiles);
  ForEachChannel(p.shape.channels, [&](std::size_t c) { params.Set(c, {0, 0, 0, 0}); });
  params.Spread();
  const T* dy = static_cast<const T*>(p.dy);
  T* copy = static_cast<T*>(p.dy_copy);
  const ProductSums sums = SumProducts(
      tiles, params.affine().mean, dy, static_cast<const T*>(p.x),
      [=](const FeatureTile& tile) {
        if (copy != nullptr && copy != dy) CopyTile(tile, dy, copy);
      },
      [](const FeatureTile&) {});
  ForEachChannel(p.shape.channels,
                 [&](std::size_t c) { FinishGradients<Acc>(p, c, sums.g[c], sums.g_xmu[c]); });
}

// Three passes over an array: dy and x in, dx out.
template <typename T>
void RunTyped(const MovingAverageBackwardParams& p) {
  using Acc = AccType<T>;
  const FeatureTiles tiles(p.shape);
  ChannelParams<Acc> params(tiles);
  ForEachChannel(p.shape.channels, [&](std::size_t c) { params.Set(c, CombineEntry<Acc>(p, c)); });
  if (p.dx_mode == WriteMode::kSkip) return;
  params.Spread();
  Combine(tiles, params, static_cast<const T*>(p.dy), static_cast<const T*>(p.x),
          static_cast<T*>(p.dx), p.dx_mode == WriteMode::kAdd);
}

template <typename Params>
void Dispatch(const Params& params) {
  WithType<Float16>(params.type, [&](auto element) { RunTyped<decltype(element)>(params); });
}

}  // namespace

void Run(Cpu, const MovingAverageForwardParams& params) { Dispatch(params); }
void Run(Cpu, const MovingAverageSumsParams& params) { Dispatch(params); }
void Run(Cpu, const MovingAverageBackwardParams& params) { Dispatch(params); }

}  // namespace gluon_syncbn
