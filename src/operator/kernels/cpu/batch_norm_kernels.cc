// The four kernels on the CPU.  See batch_norm_kernels.h for what they compute.
//
// What is per channel is here.  What is per element is cut into tiles (feature_tiles.h), which
// threads share (kernels/cpu/threads.h), and runs in loops for the CPU at hand (kernels/cpu/loops.h).  Memory is
// what takes the time: each kernel reads and writes every element as often as it must, and what a
// tile needs twice it gets from the cache the second time.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/batch_norm_kernels.h"
#include "kernels/batch_norm_math.h"
#include "kernels/cpu/loops.h"
#include "kernels/cpu/threads.h"
#include "kernels/cpu/feature_tiles.h"

namespace gluon_syncbn {
namespace {

const CpuLoopSet& ChooseLoops() {
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

const CpuLoopSet& loops = ChooseLoops();

template <typename T>
const CpuLoops<T>& Loops();
template <>
const CpuLoops<Float16>& Loops() {
  return loops.float16;
}
template <>
const CpuLoops<float>& Loops() {
  return loops.float32;
}
template <>
const CpuLoops<double>& Loops() {
  return loops.float64;
}

// Memory that a thread keeps from call to call, one piece per Use: small layers stay cheap.
enum class Use { kTables, kChannelTable, kTileSums, kChannelSums, kMoments };
template <Use use, typename Element>
Element* Scratch(std::size_t size) {
  static thread_local std::vector<Element> buffer;
  if (buffer.size() < size) buffer.resize(size);
  return buffer.data();
}

// Calls visit(c) for every channel.  Many channels are worth several threads, too.
template <typename Visit>
void ForEachChannel(std::size_t channels, const Visit& visit) {
  constexpr std::size_t kPiece = 2048;
  ParallelFor((channels + kPiece - 1) / kPiece, [&](std::size_t piece) {
    const std::size_t end = std::min(channels, (piece + 1) * kPiece);
    for (std::size_t c = piece * kPiece; c < end; ++c) visit(c);
  });
}

// What the loops read per column, set per channel: four numbers, each in a table of its own.
template <typename W>
class Tables {
 public:
  explicit Tables(const FeatureTiles& tiles)
      : tiles_(tiles),
        pitch_(std::max(tiles.channels(), tiles.columns())),
        table_(Scratch<Use::kTables, W>(4 * pitch_)) {}

  void Set(std::size_t c, const TableEntry<W>& entry) {
    table_[c] = entry.mean;
    table_[pitch_ + c] = entry.scale;
    table_[2 * pitch_ + c] = entry.shift;
    table_[3 * pitch_ + c] = entry.factor;
  }

  // Once all channels are set.
  void Spread() {
    if (tiles_.columns() == tiles_.channels()) return;
    W* channel_values = Scratch<Use::kChannelTable, W>(tiles_.channels());
    for (std::size_t t = 0; t < 4; ++t) {
      W* table = table_ + t * pitch_;
      std::copy_n(table, tiles_.channels(), channel_values);
      tiles_.ForEachColumn(0, tiles_.columns(), [=](std::size_t column, std::size_t c) {
        table[column] = channel_values[c];
      });
    }
  }
  Affine<W> affine() const { return {table_, table_ + pitch_, table_ + 2 * pitch_}; }
  const W* factor() const { return table_ + 3 * pitch_; }

 private:
  const FeatureTiles& tiles_;
  const std::size_t pitch_;
  W* const table_;
};

double ToDouble(Float16 value) { return ToFloat(value); }
double ToDouble(double value) { return value; }

// Sums per tile and column, then per channel.  sum(tile, to) leaves `kept` rows of tile_columns()
// numbers, then(tile) finds the tile in the cache.  When all are there, add(tile, c, from) gets
// them column by column and tile after tile, in one thread: `from` is in the first row.
//
// The sums are float64 from the first addition on: float32 sums would need short blocks to be
// accurate, and the conversion costs nothing while memory is the limit.
template <typename Sum, typename Then, typename Add>
void SumTiles(const FeatureTiles& tiles, std::size_t kept, const Sum& sum, const Then& then,
              const Add& add) {
  // Whole cache lines for each tile: neighbours may be the work of different threads.
  const std::size_t pitch = (kept * tiles.tile_columns() + 7) / 8 * 8;
  double* partial = Scratch<Use::kTileSums, double>(tiles.count() * pitch);
  ParallelFor(tiles.count(), [&](std::size_t i) {
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

// The moments of every channel, into `statistics`.
template <typename T, typename Then>
void MeasureTiles(const FeatureTiles& tiles, const T* x, double* statistics, const Then& then) {
  const std::size_t channels = tiles.channels(), columns = tiles.tile_columns();
  // A tile's sums are about its own first elements.  All of a channel's are moved to one pivot, the
  // mean of its first tile, which cannot be far from the others' unless the variance is as large.
  struct Channel {
    double pivot = 0.0, count = 0.0;
    ShiftedSums sums;
  };
  Channel* all = Scratch<Use::kMoments, Channel>(channels);
  std::fill_n(all, channels, Channel());
  SumTiles(
      tiles, 3,
      [=](const FeatureTile& tile, double* to) {
        Loops<T>().moments(tile, x, to, to + columns);
        for (std::size_t i = 0; i < tile.columns; ++i) {
          to[2 * columns + i] = ToDouble(x[tile.offset + i * tile.inner]);
        }
      },
      then,
      [=](const FeatureTile& tile, std::size_t c, const double* from) {
        Channel& channel = all[c];
        const double count = static_cast<double>(tile.rows * tile.inner);
        const double sum = from[0], squares = from[columns], origin = from[2 * columns];
        if (channel.count == 0) channel.pivot = origin + sum / count;
        channel.sums.Add(origin - channel.pivot, count, sum, squares);
        channel.count += count;
      });
  ForEachChannel(channels, [=](std::size_t c) {
    const Moments moments = all[c].sums.About(all[c].pivot, all[c].count);
    statistics[c] = moments.mean;
    statistics[channels + c] = moments.m2;
  });
}

template <typename T>
void CopyTile(const FeatureTile& tile, const T* from, T* to) {
  for (std::size_t row = 0; row < tile.rows; ++row) {
    const std::size_t at = tile.offset + row * tile.stride;
    std::memcpy(to + at, from + at, tile.columns * tile.inner * sizeof(T));
  }
}

// Calls visit(tile) for every tile, the last first: the pass before, over the same data, was the
// one that took sums, and what it read last is what is still in the cache.
template <typename Visit>
void ForEachTileBackwards(const FeatureTiles& tiles, const Visit& visit) {
  ParallelFor(tiles.count(), [&](std::size_t i) { visit(tiles[tiles.count() - 1 - i]); });
}

// Moves the array once, x in; once more, to be written, where it has to be copied.
template <typename T>
void RunTyped(const MomentsForward& k) {
  const FeatureTiles tiles(k.shape);
  const std::size_t channels = k.shape.channels;
  const T* x = static_cast<const T*>(k.x);
  T* copy = static_cast<T*>(k.copy);
  if (!k.measure) {
    std::fill_n(k.statistics, 2 * channels, 0.0);
    k.statistics[2 * channels] = kNotMeasured;
    if (copy != nullptr && copy != x) {
      ParallelFor(tiles.count(), [&](std::size_t i) { CopyTile(tiles[i], x, copy); });
    }
    return;
  }
  MeasureTiles(tiles, x, k.statistics, [=](const FeatureTile& tile) {
    if (copy != nullptr && copy != x) CopyTile(tile, x, copy);
  });
  k.statistics[2 * channels] = static_cast<double>(k.shape.count());
}

// Moves two arrays once: x in, y out.  y needs the statistics of all devices, so it cannot be had
// in the pass that took them.
template <typename T>
void RunTyped(const NormalizeForward& k) {
  using W = Wide<T>;
  const FeatureTiles tiles(k.shape);
  const auto statistics = InUse<W>(k);
  Tables<W> tables(tiles);
  ForEachChannel(k.shape.channels, [&](std::size_t c) {
    tables.Set(c, NormalizeEntry(k, statistics, c));
    MoveStatistics(k, statistics, c);
  });
  if (statistics.Count() > 0) CountBatch<W>(k);
  if (k.y_request == Request::kNull) return;
  tables.Spread();
  const T* x = static_cast<const T*>(k.x);
  T* y = static_cast<T*>(k.y);
  ForEachTileBackwards(tiles, [&](const FeatureTile& tile) {
    Loops<T>().affine(tile, tables.affine(), x, y, k.y_request == Request::kAdd);
  });
}

// Moves two arrays once: dy and x in, both of which the sums are over.  dy handed through in place
// stays where it is; dx out is a third, alone or where dy has to be copied.
template <typename T>
void RunTyped(const NormalizeBackward& k) {
  using W = Wide<T>;
  const FeatureTiles tiles(k.shape);
  const std::size_t channels = k.shape.channels, columns = tiles.tile_columns();
  const T* dy = static_cast<const T*>(k.dy);
  const T* x = static_cast<const T*>(k.x);
  T* dx = static_cast<T*>(k.dx);
  const auto statistics = InUse<W>(k);
  const bool alone = k.statistics == nullptr;
  // One table more: what the sums over x are about, the mean rounded to W.
  Tables<W> tables(tiles);
  ForEachChannel(channels, [&](std::size_t c) {
    TableEntry<W> entry = ScaleEntry(k, statistics, c);
    entry.factor = static_cast<W>(statistics.Mean(c));
    tables.Set(c, entry);
  });
  tables.Spread();
  const W* about = tables.factor();
  double* sum_dy = Scratch<Use::kChannelSums, double>(2 * channels);
  double* sum_products = sum_dy + channels;
  std::fill_n(sum_dy, 2 * channels, 0.0);
  SumTiles(
      tiles, 2,
      [=](const FeatureTile& tile, double* to) {
        Loops<T>().products(tile, about, dy, x, to, to + columns);
      },
      [&](const FeatureTile& tile) {
        if (k.dx_request == Request::kNull) return;
        if (alone) {
          Loops<T>().affine(tile, tables.affine(), dy, dx, k.dx_request == Request::kAdd);
        } else if (dx != dy) {
          CopyTile(tile, dy, dx);
        }
      },
      [=](const FeatureTile&, std::size_t c, const double* from) {
        sum_dy[c] += from[0];
        sum_products[c] += from[columns];
      });
  ForEachChannel(channels, [&](std::size_t c) {
    // What rounding took from the mean.
    const double mean = statistics.Mean(c), low = mean - static_cast<W>(mean);
    FinishGradients(k, statistics, c, sum_dy[c], sum_products[c] - low * sum_dy[c]);
  });
}

// Moves three arrays once: dy and x in, dx out.  dx needs the sums of all devices over dy and x,
// so it cannot be had in the pass that took them.
template <typename T>
void RunTyped(const MomentsBackward& k) {
  using W = Wide<T>;
  if (k.dx_request == Request::kNull) return;
  const FeatureTiles tiles(k.shape);
  Tables<W> tables(tiles);
  ForEachChannel(k.shape.channels, [&](std::size_t c) { tables.Set(c, CombineEntry<W>(k, c)); });
  tables.Spread();
  const T* dy = static_cast<const T*>(k.dy);
  const T* x = static_cast<const T*>(k.x);
  T* dx = static_cast<T*>(k.dx);
  ForEachTileBackwards(tiles, [&](const FeatureTile& tile) {
    Loops<T>().combine(tile, tables.affine(), tables.factor(), dy, x, dx,
                       k.dx_request == Request::kAdd);
  });
}

template <typename Kernel>
void Dispatch(const Kernel& kernel) {
  switch (kernel.type) {
    case DataType::kFloat16:
      return RunTyped<Float16>(kernel);
    case DataType::kFloat32:
      return RunTyped<float>(kernel);
    case DataType::kFloat64:
      return RunTyped<double>(kernel);
  }
}

}  // namespace

void Run(Cpu, const MomentsForward& kernel) { Dispatch(kernel); }
void Run(Cpu, const NormalizeForward& kernel) { Dispatch(kernel); }
void Run(Cpu, const NormalizeBackward& kernel) { Dispatch(kernel); }
void Run(Cpu, const MomentsBackward& kernel) { Dispatch(kernel); }

}  // namespace gluon_syncbn
