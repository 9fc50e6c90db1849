// Two sums per channel over a feature map, on a GPU.
//
// Every block sums a part of the map for some channels, and leaves its partial sums in scratch
// memory; PartialSums::Total adds them up.  Nothing is added atomically, and who adds what depends
// on the shape and the device alone: the result is the same, bit for bit, on every run.
//
// A thread adds up runs of some elements in the data's wide type, float32 for float16 and float32,
// and the runs in float64; they are long enough that it does not matter where float64 is 64 times
// slower.
//
// What is summed is said by `Sums`, as MomentsSums does: For(c, element) is what a thread's sums
// for channel c are taken about, where `element` is the first that it reads; Add adds an element;
// Finish(c, about, count, first, second) makes what a thread has summed, over `count` elements,
// ready to be added to other threads'.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "kernels/cuda/runtime.cuh"

namespace gluon_syncbn {

// What one thread of Total gets.
struct ChannelSums {
  bool mine;  // this thread has the total of the channel; the others help
  double first, second;
};

// Partial sums, [slices][2][width]: column w of a slice belongs to channel w % channels.
struct PartialSums {
  static constexpr int kHelpers = 32;  // threads that add up one channel
  static constexpr int kChannels = kThreads / kHelpers;

  int64_t channels;
  int64_t width;
  int slices;
  double* sums;

  dim3 Grid() const { return dim3(static_cast<unsigned>(Ceil(channels, kChannels))); }
  dim3 Block() const { return dim3(kHelpers, kChannels); }

  __device__ int64_t Channel() const { return int64_t(blockIdx.x) * kChannels + threadIdx.y; }

  // For all threads of a block.
  __device__ ChannelSums Total(int64_t c) const {
    __shared__ double first[kChannels][kHelpers], second[kChannels][kHelpers];
    double a = 0, b = 0;
    if (c < channels) {
#pragma unroll 4
      for (int slice = threadIdx.x; slice < slices; slice += kHelpers) {
        const double* columns = sums + int64_t(slice) * 2 * width;
        for (int64_t w = c; w < width; w += channels) {
          a += columns[w];
          b += columns[width + w];
        }
      }
    }
    first[threadIdx.y][threadIdx.x] = a;
    second[threadIdx.y][threadIdx.x] = b;
    __syncthreads();
    for (int half = kHelpers / 2; half > 0; half /= 2) {
      if (static_cast<int>(threadIdx.x) < half) {
        first[threadIdx.y][threadIdx.x] += first[threadIdx.y][threadIdx.x + half];
        second[threadIdx.y][threadIdx.x] += second[threadIdx.y][threadIdx.x + half];
      }
      __syncthreads();
    }
    return {threadIdx.x == 0 && c < channels, first[threadIdx.y][0], second[threadIdx.y][0]};
  }
};

// How many accesses a thread has under way at a time.
constexpr int kUnroll = 4;

// Channels first.  A channel is `outer` planes of `inner` elements.  A plane is read in whole
// accesses: where it does not begin or end with one, the elements of its neighbours are left out.
struct Planes {
  Extent extent;
  int64_t accesses;  // per plane
  int64_t chunk;     // accesses per slice, of a channel
};

// A thread's walk over the accesses of its channel's slice: every blockDim.x-th.
class PlaneWalk {
 public:
  __device__ PlaneWalk(const Planes& planes, int64_t c)
      : to_next_plane_(planes.extent.channels * planes.extent.inner),
        accesses_(planes.accesses),
        step_(blockDim.x % planes.accesses),
        step_start_(blockDim.x / planes.accesses * to_next_plane_) {
    const int64_t begin = int64_t(blockIdx.y) * planes.chunk;
    const int64_t all = planes.extent.outer * accesses_;
    const int64_t mine = begin + threadIdx.x;
    const int64_t end = begin + planes.chunk < all ? begin + planes.chunk : all;
    left_ = mine < end ? static_cast<int>((end - mine + blockDim.x - 1) / blockDim.x) : 0;
    start_ = mine / accesses_ * to_next_plane_ + c * planes.extent.inner;
    access_ = mine % accesses_;
  }
  // How many accesses the thread still has.
  __device__ int Left() const { return left_; }
  // Where the plane starts, and which of its accesses it is.
  __device__ int64_t Start() const { return start_; }
  __device__ int64_t Access() const { return access_; }
  __device__ void Next() {
    --left_;
    access_ += step_;
    start_ += step_start_;
    if (access_ >= accesses_) {
      access_ -= accesses_;
      start_ += to_next_plane_;
    }
  }

 private:
  const int64_t to_next_plane_;
  const int64_t accesses_, step_, step_start_;
  int64_t start_, access_;
  int left_;
};

// A run's sums.
template <typename W>
struct RunSums {
  W first = 0, second = 0;
  __device__ void AddTo(double* firsts, double* seconds) const {
    *firsts += first;
    *seconds += second;
  }
};

// Planes that are whole accesses long.
template <typename T, int V, typename Sums>
__device__ void AddWholePlanes(PlaneWalk walk, int64_t c, const T* a, const T* b, const Sums& sums,
                               double* first, double* second) {
  using W = Wide<T>;
  const int64_t count = int64_t(walk.Left()) * V;
  if (count == 0) return;
  const auto about = sums.For(c, ToWide(a[walk.Start() + int64_t(walk.Access()) * V]));
  const auto add = [&](auto unroll) {
    constexpr int kCount = decltype(unroll)::value;
    int64_t at[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      at[u] = walk.Start() + walk.Access() * V;
      walk.Next();
    }
    Pack<T, V> as[kCount], bs[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      as[u] = LoadWhole<T, V>(a, at[u]);
      if (Sums::kTwoArrays) bs[u] = LoadWhole<T, V>(b, at[u]);
    }
    RunSums<W> run;
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        Sums::Add(about, as[u][k], Sums::kTwoArrays ? bs[u][k] : W(0), &run.first, &run.second);
      }
    }
    run.AddTo(first, second);
  };
  while (walk.Left() >= kUnroll) add(std::integral_constant<int, kUnroll>());
  while (walk.Left() > 0) add(std::integral_constant<int, 1>());
  sums.Finish(c, about, count, first, second);
}

// Planes that begin and end anywhere.
template <typename T, int V, typename Sums>
__device__ void AddAnyPlanes(PlaneWalk walk, const Extent& extent, int64_t c, const T* a,
                             const T* b, const Sums& sums, double* first, double* second) {
  using W = Wide<T>;
  if (walk.Left() <= 0) return;
  const int64_t size = extent.size();
  // Where the access lies, and the channel's plane in it.
  const auto place = [&] { return (walk.Start() / V + walk.Access()) * V; };
  const int64_t plane = walk.Start();
  const auto about =
      sums.For(c, ToWide(a[Least(Greatest(place(), plane), plane + extent.inner - 1)]));
  int64_t count = 0;
  while (walk.Left() > 0) {
    Pack<T, V> as[kUnroll], bs[kUnroll];
    int begins[kUnroll], ends[kUnroll];  // the elements that are the channel's
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      begins[u] = ends[u] = 0;
      if (walk.Left() > 0) {
        const int64_t start = walk.Start(), end = start + extent.inner, at = place();
        as[u] = Load<T, V>(a, at, size);
        if (Sums::kTwoArrays) bs[u] = Load<T, V>(b, at, size);
        begins[u] = static_cast<int>(start > at ? start - at : 0);
        const int64_t left = end - at;  // below 0: nothing of it
        ends[u] = static_cast<int>(left < begins[u] ? begins[u] : left < V ? left : V);
      }
      count += ends[u] - begins[u];
      walk.Next();
    }
    RunSums<W> run;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (k >= begins[u] && k < ends[u]) {
          Sums::Add(about, as[u][k], Sums::kTwoArrays ? bs[u][k] : W(0), &run.first, &run.second);
        }
      }
    }
    run.AddTo(first, second);
  }
  sums.Finish(c, about, count, first, second);
}

// Grid: channels in groups of blockDim.y, slices.  Block: threads of a channel, channels.
template <typename T, int V, bool whole, typename Sums>
__global__ void __launch_bounds__(kThreads)
    ReducePlanes(Planes planes, const T* a, const T* b, Sums sums, double* partial) {
  const Extent extent = planes.extent;
  const int64_t c = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  double first = 0, second = 0;
  if (c < extent.channels) {
    const PlaneWalk walk(planes, c);
    if constexpr (whole) {
      AddWholePlanes<T, V>(walk, c, a, b, sums, &first, &second);
    } else {
      AddAnyPlanes<T, V>(walk, extent, c, a, b, sums, &first, &second);
    }
  }
  // blockDim.x is a power of 2.
  __shared__ double firsts[kThreads], seconds[kThreads];
  const int me = threadIdx.y * blockDim.x + threadIdx.x;
  firsts[me] = first;
  seconds[me] = second;
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) {
      firsts[me] += firsts[me + half];
      seconds[me] += seconds[me + half];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0 && c < extent.channels) {
    double* slice = partial + int64_t(blockIdx.y) * 2 * extent.channels;
    slice[c] = firsts[me];
    slice[extent.channels + c] = seconds[me];
  }
}

// Channels last: the map is a matrix of `outer` rows of `channels` columns.  So many of its rows
// are taken as one row of `width` columns that the wide row is whole accesses long, and long enough
// for a warp: column w is of channel w % channels.
struct Rows {
  int64_t channels;
  int64_t size;
  int64_t width;
  int64_t partial_width;  // of what comes out: the width, or just the channels
  int64_t rows;
  int64_t chunk;  // rows per slice
};

constexpr int kColumns = 32;  // accesses of a row that a block takes
constexpr int kRowsAtOnce = kThreads / kColumns;

// Grid: columns in groups of kColumns, slices.  Block: columns, rows.
template <typename T, int V, typename Sums>
__global__ void __launch_bounds__(kThreads)
    ReduceRows(Rows rows, const T* a, const T* b, Sums sums, double* partial) {
  using W = Wide<T>;
  constexpr int kRun = 4 * kUnroll;  // rows
  const int64_t column = (int64_t(blockIdx.x) * kColumns + threadIdx.x) * V;
  double first[V] = {}, second[V] = {};
  const int64_t begin = int64_t(blockIdx.y) * rows.chunk + threadIdx.y;
  const int64_t end = Least(int64_t(blockIdx.y + 1) * rows.chunk, rows.rows);
  if (column < rows.width && begin < end) {
    int64_t at = begin * rows.width + column;
    const int64_t first_channel = column % rows.channels;
    const auto next = [&](int64_t c) { return c + 1 == rows.channels ? 0 : c + 1; };
    typename Sums::About about[V];
    const Pack<T, V> elements = Load<T, V>(a, at, rows.size);
#pragma unroll
    for (int64_t k = 0, c = first_channel; k < V; ++k, c = next(c)) {
      about[k] = sums.For(c, elements[k]);
    }
    const auto add = [&](const Pack<T, V>& as, const Pack<T, V>& bs, int k, RunSums<W>* run) {
      Sums::Add(about[k], as[k], Sums::kTwoArrays ? bs[k] : W(0), &run->first, &run->second);
    };
    const int64_t there = rows.size / rows.width;  // rows that are there to their end
    int64_t left = Least(end, there) - begin;
    const int64_t step = kRowsAtOnce * rows.width;
    constexpr int kLast = (kUnroll - 1) * kRowsAtOnce;
    while (left > kLast) {
      RunSums<W> run[V];
      for (int count = 0; left > kLast && count < kRun; count += kUnroll) {
        Pack<T, V> as[kUnroll], bs[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          as[u] = LoadWhole<T, V>(a, at);
          if (Sums::kTwoArrays) bs[u] = LoadWhole<T, V>(b, at);
          at += step;
        }
        left -= kUnroll * kRowsAtOnce;
#pragma unroll
        for (int k = 0; k < V; ++k) {
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) add(as[u], bs[u], k, &run[k]);
        }
      }
#pragma unroll
      for (int k = 0; k < V; ++k) run[k].AddTo(&first[k], &second[k]);
    }
    // What is left, row by row; the last one may end before its width.
    for (left += Greatest(end - there, 0); left > 0; left -= kRowsAtOnce, at += step) {
      const Pack<T, V> as = Load<T, V>(a, at, rows.size);
      Pack<T, V> bs = {};
      if (Sums::kTwoArrays) bs = Load<T, V>(b, at, rows.size);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (at + k >= rows.size) continue;
        RunSums<W> run;
        add(as, bs, k, &run);
        run.AddTo(&first[k], &second[k]);
      }
    }
    const int64_t last = at - step, mine = (end - begin + kRowsAtOnce - 1) / kRowsAtOnce;
#pragma unroll
    for (int64_t k = 0, c = first_channel; k < V; ++k, c = next(c)) {
      const int64_t count = mine - (last + k >= rows.size);
      sums.Finish(c, about[k], count, &first[k], &second[k]);
    }
  }
  // One sum after the other, to stay within the shared memory that every GPU has.
  __shared__ double shared[kRowsAtOnce][V][kColumns];
  const int me = threadIdx.y * kColumns + threadIdx.x;
  for (int which = 0; which < 2; ++which) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < V; ++k) {
      shared[threadIdx.y][k][threadIdx.x] = which == 0 ? first[k] : second[k];
    }
    __syncthreads();
    // Thread row k adds up element k of the accesses (V is at most kRowsAtOnce).
    double sum = 0;
    if (static_cast<int>(threadIdx.y) < V) {
      for (int y = 0; y < kRowsAtOnce; ++y) sum += shared[y][threadIdx.y][threadIdx.x];
    }
    double* slice = partial + (int64_t(blockIdx.y) * 2 + which) * rows.partial_width;
    if (rows.partial_width == rows.width) {
      if (static_cast<int>(threadIdx.y) < V && column < rows.width) {
        slice[column + threadIdx.y] = sum;
      }
    } else {  // one block has the whole width: it adds up each channel's columns
      double* columns = &shared[0][0][0];
      __syncthreads();
      if (static_cast<int>(threadIdx.y) < V) columns[threadIdx.x * V + threadIdx.y] = sum;
      __syncthreads();
      for (int64_t c = me; c < rows.channels; c += kThreads) {
        double total = 0;
        for (int64_t w = c; w < rows.width; w += rows.channels) total += columns[w];
        slice[c] = total;
      }
    }
  }
}

// How many slices for kernels of `groups` blocks each, so that the device is full and no blocks are
// left for a nearly empty last turn, and every slice has work of at least `least`.
inline int Slices(int64_t blocks_at_a_time, int64_t groups, int64_t work, int64_t least) {
  int64_t wanted = std::max<int64_t>(1, blocks_at_a_time / groups);
  const int64_t blocks = wanted * groups;
  if (blocks * 5 < blocks_at_a_time * 4 || blocks > blocks_at_a_time) {
    wanted = Ceil(4 * blocks_at_a_time, groups);
  }
  return static_cast<int>(std::max<int64_t>(1, std::min(wanted, work / least)));
}

template <int V, bool whole, typename T, typename Sums>
PartialSums ReducePlanesOf(const Gpu& gpu, const Extent& extent, const T* a, const T* b,
                           const Sums& sums) {
  const auto kernel = ReducePlanes<T, V, whole, Sums>;
  // A plane that begins within an access may need one more.
  const int64_t accesses =
      std::max<int64_t>(1, whole ? extent.inner / V : Ceil(extent.inner + V - 1, V));
  const int64_t work = extent.outer * accesses;
  int threads = 8;  // of a channel
  while (threads < kThreads && threads * kUnroll < work) threads *= 2;
  const int64_t groups = Ceil(extent.channels, kThreads / threads);
  const int slices =
      Slices(BlocksAtATime(gpu, kernel), groups, work, int64_t(threads) * 2 * kUnroll);
  PartialSums partial{extent.channels, extent.channels, slices, nullptr};
  partial.sums = Scratch<double>(gpu, Use::kPartialSums, slices * 2 * extent.channels);
  Launch(gpu, kernel, dim3(static_cast<unsigned>(groups), slices),
         dim3(threads, kThreads / threads), Planes{extent, accesses, Ceil(work, slices)}, a, b,
         sums, partial.sums);
  return partial;
}

// Rows of `channels` that are taken as one, so that nearly all threads of a block have a column.
template <int V>
int64_t RowsTakenAsOne(int64_t channels) {
  const int64_t least = V / std::gcd(channels, int64_t(V));  // whole accesses
  if (channels * least <= kColumns * V) return kColumns * V / (channels * least) * least;
  int64_t best = least;
  double best_share = 0;
  for (int64_t rows = least; rows <= 8 * least; rows += least) {
    const int64_t columns = channels * rows / V;
    const double share = double(columns) / double(Ceil(columns, kColumns) * kColumns);
    if (share > best_share + 0.05) {
      best = rows;
      best_share = share;
    }
  }
  return best;
}

template <int V, typename T, typename Sums>
PartialSums ReduceRowsOf(const Gpu& gpu, const Extent& extent, const T* a, const T* b,
                         const Sums& sums) {
  const auto kernel = ReduceRows<T, V, Sums>;
  const int64_t width = extent.channels * RowsTakenAsOne<V>(extent.channels);
  const int64_t rows = Ceil(extent.size(), width);
  const int64_t groups = Ceil(width / V, kColumns);
  const int slices = Slices(BlocksAtATime(gpu, kernel), groups, rows, 4 * kUnroll * kRowsAtOnce);
  const int64_t partial_width = groups == 1 ? extent.channels : width;
  PartialSums partial{extent.channels, partial_width, slices, nullptr};
  partial.sums = Scratch<double>(gpu, Use::kPartialSums, slices * 2 * partial_width);
  Launch(gpu, kernel, dim3(static_cast<unsigned>(groups), slices), dim3(kColumns, kRowsAtOnce),
         Rows{extent.channels, extent.size(), width, partial_width, rows, Ceil(rows, slices)}, a, b,
         sums, partial.sums);
  return partial;
}

// Two sums per channel over a, or over a and b.
template <typename T, typename Sums>
PartialSums Reduce(const Gpu& gpu, const Extent& extent, const T* a, const T* b, const Sums& sums) {
  if (extent.size() == 0) return {extent.channels, extent.channels, 0, nullptr};
  constexpr int V = kPerAccess<T>;
  const bool aligned = Aligned(a) && Aligned(b);  // a slice of an array may not be
  if (extent.inner == 1) {
    return aligned ? ReduceRowsOf<V>(gpu, extent, a, b, sums)
                   : ReduceRowsOf<1>(gpu, extent, a, b, sums);
  }
  if (!aligned) return ReducePlanesOf<1, true>(gpu, extent, a, b, sums);
  if (extent.inner % V == 0) return ReducePlanesOf<V, true>(gpu, extent, a, b, sums);
  // Half an access, without a look at each element, is faster: 14x14 in float16, say.
  if (extent.inner % (V / 2) == 0) return ReducePlanesOf<V / 2, true>(gpu, extent, a, b, sums);
  return ReducePlanesOf<V, false>(gpu, extent, a, b, sums);
}

}  // namespace gluon_syncbn
