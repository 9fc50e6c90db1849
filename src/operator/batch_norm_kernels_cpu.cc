// The four kernels on the CPU.  See batch_norm_kernels.h for what they compute.
//
// What is per channel is here.  What is per element is cut into tiles (feature_tiles.h), which
// threads share (cpu_threads.h), and runs in loops for the CPU at hand (cpu_loops.h).  Memory is
// what takes the time: each kernel reads and writes every element as often as it must, and what a
// tile needs twice it gets from the cache the second time.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "batch_norm_kernels.h"
#include "cpu_loops.h"
#include "cpu_threads.h"
#include "feature_tiles.h"
#include "moving_average.h"

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
enum class Use { kTables, kChannelTable, kTileSums, kChannelSums };
template <Use use, typename Element>
Element* Scratch(std::size_t size) {
  static thread_local std::vector<Element> buffer;
  if (buffer.size() < size) buffer.resize(size);
  return buffer.data();
}

// A float64 number as the sum of two, so that x - mean stays exact in the narrower type.
template <typename W>
struct Pair {
  explicit Pair(double value) : high(static_cast<W>(value)), low(static_cast<W>(value - high)) {}
  W high;
  W low;
};

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

  // factor * dy + (x - mean) * scale + shift; the low part of the mean goes into the shift.
  void Set(std::size_t c, double mean, double scale, double shift, double factor = 0.0) {
    const Pair<W> pair(mean);
    table_[c] = pair.high;
    table_[pitch_ + c] = static_cast<W>(scale);
    table_[2 * pitch_ + c] = static_cast<W>(shift - scale * pair.low);
    table_[3 * pitch_ + c] = static_cast<W>(factor);
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

// sum(a) and sum(a * b) per channel; `then(tile)` runs while the tile is in the cache.
//
// The sums are float64 from the first addition on: float32 sums would need short blocks to be
// accurate, and the conversion costs nothing while memory is the limit.
template <typename T, typename Then>
void SumTiles(const FeatureTiles& tiles, const T* a, const T* b, double* sums, double* products,
              std::size_t channels, const Then& then) {
  const std::size_t tile_columns = tiles.tile_columns();
  // Whole cache lines for each tile: neighbours may be the work of different threads.
  const std::size_t pitch = (2 * tile_columns + 7) / 8 * 8;
  double* partial = Scratch<Use::kTileSums, double>(tiles.count() * pitch);
  ParallelFor(tiles.count(), [&](std::size_t i) {
    const FeatureTile tile = tiles[i];
    Loops<T>().sum(tile, a, b, partial + i * pitch, partial + i * pitch + tile_columns);
    then(tile);
  });
  std::fill_n(sums, channels, 0.0);
  std::fill_n(products, channels, 0.0);
  for (std::size_t i = 0; i < tiles.count(); ++i) {
    const FeatureTile tile = tiles[i];
    const double* sum = partial + i * pitch;
    const double* product = sum + tile_columns;
    tiles.ForEachColumn(tile.first_column, tile.columns, [&](std::size_t column, std::size_t c) {
      sums[c] += sum[column - tile.first_column];
      products[c] += product[column - tile.first_column];
    });
  }
}

template <typename T>
void CopyTile(const FeatureTile& tile, const T* from, T* to) {
  for (std::size_t row = 0; row < tile.rows; ++row) {
    const std::size_t at = tile.offset + row * tile.stride;
    std::memcpy(to + at, from + at, tile.columns * tile.inner * sizeof(T));
  }
}

template <typename W>
void Assign(Request request, W* to, double value) {
  if (request == Request::kWrite) *to = static_cast<W>(value);
  if (request == Request::kAdd) *to = static_cast<W>(*to + value);
}

// The statistics that a pass uses: over all devices, or the moving ones.
struct ChannelStatistics {
  double mean;
  double var;
};

template <typename W>
class StatisticsInUse {
 public:
  StatisticsInUse(std::size_t channels, const double* statistics, const void* moving_mean,
                  const void* moving_var)
      : channels_(channels),
        statistics_(statistics),
        moving_mean_(static_cast<const W*>(moving_mean)),
        moving_var_(static_cast<const W*>(moving_var)) {}

  double count() const { return statistics_ == nullptr ? 0.0 : statistics_[2 * channels_]; }
  bool measured() const { return count() > 0; }

  ChannelStatistics operator[](std::size_t c) const {
    if (!measured()) return {static_cast<double>(moving_mean_[c]), moving_var_[c]};
    const double mean = statistics_[c] / count();
    // Rounding can leave a constant channel's variance a little below 0; NaN must stay NaN.
    const double var = statistics_[channels_ + c] / count() - mean * mean;
    return {mean, var < 0 ? 0.0 : var};
  }

 private:
  std::size_t channels_;
  const double* statistics_;
  const W* moving_mean_;
  const W* moving_var_;
};

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
    std::fill_n(k.statistics, StatisticsSize(channels), 0.0);
    if (copy != nullptr && copy != x) {
      ParallelFor(tiles.count(), [&](std::size_t i) { CopyTile(tiles[i], x, copy); });
    }
    return;
  }
  SumTiles(tiles, x, x, k.statistics, k.statistics + channels, channels,
           [=](const FeatureTile& tile) {
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
  const std::size_t channels = k.shape.channels;
  const W* gamma = static_cast<const W*>(k.gamma);
  const W* beta = static_cast<const W*>(k.beta);
  W* moving_mean = static_cast<W*>(k.moving_mean);
  W* moving_var = static_cast<W*>(k.moving_var);
  const StatisticsInUse<W> statistics(channels, k.statistics, moving_mean, moving_var);
  Tables<W> tables(tiles);
  const double momentum = Momentum<W>(k);
  ForEachChannel(channels, [&](std::size_t c) {
    const ChannelStatistics s = statistics[c];
    const double gamma_c = k.fix_gamma ? 1.0 : static_cast<double>(gamma[c]);
    tables.Set(c, s.mean, gamma_c / std::sqrt(s.var + k.epsilon), beta[c]);
    if (!statistics.measured() || momentum == 1) return;
    moving_mean[c] = static_cast<W>(momentum * moving_mean[c] + (1 - momentum) * s.mean);
    moving_var[c] = static_cast<W>(momentum * moving_var[c] + (1 - momentum) * s.var);
  });
  if (statistics.measured()) CountBatch<W>(k);
  if (k.y_request == Request::kNull) return;
  tables.Spread();
  const T* x = static_cast<const T*>(k.x);
  T* y = static_cast<T*>(k.y);
  ForEachTileBackwards(tiles, [&](const FeatureTile& tile) {
    Loops<T>().affine(tile, tables.affine(), x, y, k.y_request == Request::kAdd);
  });
}

// What the gradient has per channel: r and A of batch_norm_kernels.h.
template <typename W>
struct Coefficients {
  Coefficients(const NormalizeBackward& k, const ChannelStatistics& s, std::size_t c)
      : r(1.0 / std::sqrt(s.var + k.epsilon)),
        a(k.fix_gamma ? r : r * static_cast<const W*>(k.gamma)[c]) {}
  double r;
  double a;
};

// Moves two arrays once: dy and x in, both of which the sums are over.  dy handed through in place
// stays where it is; dx out is a third, alone or where dy has to be copied.
template <typename T>
void RunTyped(const NormalizeBackward& k) {
  using W = Wide<T>;
  const FeatureTiles tiles(k.shape);
  const std::size_t channels = k.shape.channels;
  const T* dy = static_cast<const T*>(k.dy);
  const T* x = static_cast<const T*>(k.x);
  T* dx = static_cast<T*>(k.dx);
  const StatisticsInUse<W> statistics(channels, k.statistics, k.moving_mean, k.moving_var);
  const bool alone = k.statistics == nullptr;
  Tables<W> tables(tiles);
  if (alone) {  // dx = A * dy
    ForEachChannel(channels, [&](std::size_t c) {
      tables.Set(c, 0.0, Coefficients<W>(k, statistics[c], c).a, 0.0);
    });
    tables.Spread();
  }
  double* sum_dy = Scratch<Use::kChannelSums, double>(2 * channels);
  double* sum_dy_x = sum_dy + channels;
  SumTiles(tiles, dy, x, sum_dy, sum_dy_x, channels, [&](const FeatureTile& tile) {
    if (k.dx_request == Request::kNull) return;
    if (alone) {
      Loops<T>().affine(tile, tables.affine(), dy, dx, k.dx_request == Request::kAdd);
    } else if (dx != dy) {
      CopyTile(tile, dy, dx);
    }
  });

  const double count = statistics.count();
  ForEachChannel(channels, [&](std::size_t c) {
    const ChannelStatistics s = statistics[c];
    const Coefficients<W> coefficients(k, s, c);
    const double sum = sum_dy[c];
    const double centred = sum_dy_x[c] - s.mean * sum;
    Assign(k.gamma_request, static_cast<W*>(k.gamma_grad) + c,
           k.fix_gamma ? 0.0 : centred * coefficients.r);
    Assign(k.beta_request, static_cast<W*>(k.beta_grad) + c, sum);
    const double per_element = statistics.measured() ? coefficients.a / count : 0.0;
    if (k.statistics_grad != nullptr) {
      k.statistics_grad[c] = -per_element * sum;
      k.statistics_grad[channels + c] = -per_element * coefficients.r * coefficients.r * centred;
    }
    if (k.coefficients_grad != nullptr) {
      k.coefficients_grad[c] = coefficients.a;
      k.coefficients_grad[channels + c] = s.mean;
    }
  });
  if (k.statistics_grad != nullptr) k.statistics_grad[2 * channels] = 0.0;
}

// Moves three arrays once: dy and x in, dx out.  dx needs the sums of all devices over dy and x,
// so it cannot be had in the pass that took them.
template <typename T>
void RunTyped(const MomentsBackward& k) {
  using W = Wide<T>;
  if (k.dx_request == Request::kNull) return;
  const FeatureTiles tiles(k.shape);
  const std::size_t channels = k.shape.channels;
  Tables<W> tables(tiles);
  ForEachChannel(channels, [&](std::size_t c) {
    tables.Set(c, k.coefficients_grad[channels + c], k.statistics_grad[channels + c],
               k.statistics_grad[c], k.coefficients_grad[c]);
  });
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
