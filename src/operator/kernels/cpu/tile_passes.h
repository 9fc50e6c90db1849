// What the CPU kernels are made of: loops over tiles, numbers per channel for them, and sums.
//
// A kernel sets the numbers of each channel (ChannelParams), and then passes over the elements,
// tile by tile, in several threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "kernels/batch_norm_math.h"
#include "kernels/cpu/feature_tiles.h"
#include "kernels/cpu/loops.h"
#include "kernels/cpu/threads.h"
#include "kernels/element_type.h"

namespace gluon_syncbn {

inline const CpuLoopSet& ChooseLoops() {
#if GLUON_SYNCBN_X86_LOOPS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  // All CPUs with AVX2 have F16C; older compilers cannot ask for it.
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return kAvx512Loops;
  }
  if (avx2) return kAvx2Loops;
#endif
  return kBaselineLoops;
}

inline const CpuLoopSet& loops = ChooseLoops();

template <typename T>
const CpuLoops<T>& Loops();
template <>
inline const CpuLoops<Float16>& Loops() {
  return loops.float16;
}
template <>
inline const CpuLoops<float>& Loops() {
  return loops.float32;
}
template <>
inline const CpuLoops<double>& Loops() {
  return loops.float64;
}

// Memory that a thread keeps from call to call, so that small layers allocate nothing: one buffer
// per Use.  Its contents are valid until the next Scratch of the same Use in this thread.
enum class Use {
  kChannelParams,
  kGateParams,
  kChannelValues,
  kTileSums,
  kChannelSums,
  kMoments,
  kPivots,
  kTilePivots
};
template <Use use, typename Element>
Element* Scratch(std::size_t size) {
  static thread_local std::vector<Element> buffer;
  if (buffer.size() < size) buffer.resize(size);
  return buffer.data();
}

// Calls visit(c) for every channel, in several threads if there are many channels.
template <typename Visit>
void ForEachChannel(std::size_t channels, const Visit& visit) {
  constexpr std::size_t kPiece = 2048;
  constexpr std::size_t kWork = 16;  // as much as so many elements
  ParallelFor((channels + kPiece - 1) / kPiece, kWork * channels, [&](std::size_t piece) {
    const std::size_t end = std::min(channels, (piece + 1) * kPiece);
    for (std::size_t c = piece * kPiece; c < end; ++c) visit(c);
  });
}

// The entries of all channels as the loops read them: an array per field, indexed by column.
// Set every channel, then call Spread.
template <typename Acc, Use use = Use::kChannelParams>
class ChannelParams {
 public:
  explicit ChannelParams(const FeatureTiles& tiles)
      : tiles_(tiles),
        pitch_(std::max(tiles.channels(), tiles.columns())),
        table_(Scratch<use, Acc>(4 * pitch_)) {}

  void Set(std::size_t c, const ChannelEntry<Acc>& entry) {
    table_[c] = entry.mean;
    table_[pitch_ + c] = entry.scale;
    table_[2 * pitch_ + c] = entry.shift;
    table_[3 * pitch_ + c] = entry.factor;
  }

  // Copies each channel's numbers to all of its columns.
  void Spread() {
    if (tiles_.columns() == tiles_.channels()) return;
    Acc* channel_values = Scratch<Use::kChannelValues, Acc>(tiles_.channels());
    for (std::size_t t = 0; t < 4; ++t) {
      Acc* table = table_ + t * pitch_;
      std::copy_n(table, tiles_.channels(), channel_values);
      tiles_.ForEachColumn(0, tiles_.columns(), [=](std::size_t column, std::size_t c) {
        table[column] = channel_values[c];
      });
    }
  }
  Affine<Acc> affine() const { return {table_, table_ + pitch_, table_ + 2 * pitch_}; }
  const Acc* factor() const { return table_ + 3 * pitch_; }

 private:
  const FeatureTiles& tiles_;
  const std::size_t pitch_;
  Acc* const table_;
};

inline double ToDouble(Float16 value) { return ToFloat(value); }
inline double ToDouble(double value) { return value; }

// Sums per tile and column, then per channel.  In parallel, sum(tile, to) stores `kept` rows of
// tile_columns() numbers, and then(tile) runs while the tile is in the cache.  Afterwards one
// thread calls add(tile, c, from) for the columns of one tile after the other, always in the same
// order; `from` points to the column's number in the first row.
//
// The sums are float64 from the first addition on: float32 sums would be accurate over short runs
// only, and the conversion is free while memory bandwidth is the limit.
template <typename Sum, typename Then, typename Add>
void SumTiles(const FeatureTiles& tiles, std::size_t kept, const Sum& sum, const Then& then,
              const Add& add) {
  // Whole cache lines per tile, because different threads may write neighbours.
  const std::size_t pitch = (kept * tiles.tile_columns() + 7) / 8 * 8;
  double* partial = Scratch<Use::kTileSums, double>(tiles.count() * pitch);
  ParallelFor(tiles.count(), tiles.elements(), [&](std::size_t i) {
    const FeatureTile tile = tiles[i];
    sum(tile, partial + i * pitch);
    then(tile);
  });
  for (std::size_t i = 0; i < tiles.count(); ++i) {
    const FeatureTile tile = tiles[i];
    const double* from = partial + i * pitch;
    tiles.ForEachColumn(tile.first_column, tile.columns,
                        [&](std::size_t, std::size_t c) { add(tile, c, from++); });
  }
}

// Per channel: the sums over this device's elements of g and of g * (x - mean).
struct ProductSums {
  const double* g;
  const double* g_xmu;
};

// `column_means` has a number per column.  `before(tile)` runs first, and may compute g;
// `then(tile)` runs while the tile is in the cache.  The sums are valid until the next call in this
// thread.
template <typename T, typename Before, typename Then>
ProductSums SumProducts(const FeatureTiles& tiles, const AccType<T>* column_means, const T* g,
                        const T* x, const Before& before, const Then& then) {
  const std::size_t channels = tiles.channels(), columns = tiles.tile_columns();
  double* sum_g = Scratch<Use::kChannelSums, double>(2 * channels);
  double* sum_g_xmu = sum_g + channels;
  std::fill_n(sum_g, 2 * channels, 0.0);
  SumTiles(
      tiles, 2,
      [=, &before](const FeatureTile& tile, double* to) {
        before(tile);
        Loops<T>().products(tile, column_means, g, x, to, to + columns);
      },
      then,
      [=](const FeatureTile&, std::size_t c, const double* from) {
        sum_g[c] += from[0];
        sum_g_xmu[c] += from[columns];
      });
  return {sum_g, sum_g_xmu};
}

template <typename T>
void CopyTile(const FeatureTile& tile, const T* from, T* to) {
  const std::size_t run = tile.columns * tile.inner;
  const bool contiguous = tile.stride == run;
  for (std::size_t group = 0; group < tile.groups; ++group) {
    const std::size_t at = tile.offset + group * tile.group_stride;
    for (std::size_t row = 0; row < (contiguous ? 1 : tile.rows); ++row) {
      std::memcpy(to + at + row * tile.stride, from + at + row * tile.stride,
                  (contiguous ? tile.rows : 1) * run * sizeof(T));
    }
  }
}

// Calls visit(tile) for every tile, in reverse order: the pass before this one read the same data
// for the sums, and what it read last is still in the cache.
template <typename Visit>
void ForEachTileBackwards(const FeatureTiles& tiles, const Visit& visit) {
  ParallelFor(tiles.count(), tiles.elements(),
              [&](std::size_t i) { visit(tiles[tiles.count() - 1 - i]); });
}

// dx = factor * g + (x - mean) * scale + shift, or dx += ... if `add`, with the channels' numbers.
template <typename T>
void Combine(const FeatureTiles& tiles, const ChannelParams<AccType<T>>& params, const T* g,
             const T* x, T* dx, bool add) {
  ForEachTileBackwards(tiles, [&](const FeatureTile& tile) {
    Loops<T>().combine(tile, params.affine(), params.factor(), g, x, dx, add);
  });
}

}  // namespace gluon_syncbn
