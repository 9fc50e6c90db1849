// Two sums per channel over a feature map, on a GPU.
//
// Every block sums a part of the map for some channels, and leaves its partial sums in scratch
// memory; PartialSums::Total adds them up.  Nothing is added atomically, and who adds what depends
// on the shape and the device alone: the result is the same, bit for bit, on every run.
//
// A thread adds up runs of a few elements in the data's wide type, float32 for float16 and float32,
// and the runs in float64: memory is the limit, even where float64 is 64 times slower.
#pragma once

#include <algorithm>
#include <numeric>

#include "gpu_runtime.cuh"

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
      const int64_t repeats = width / channels;
      for (int64_t i = threadIdx.x; i < slices * repeats; i += kHelpers) {
        const double* slice = sums + (i / repeats) * 2 * width + (i % repeats) * channels + c;
        a += slice[0];
        b += slice[width];
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

// How many accesses a thread has under way at a time; they make one run.
constexpr int kUnroll = 4;

// Channels first.  A channel is `outer` planes of `inner` elements.  A plane is read in whole
// accesses: where it does not begin or end with one, the elements of its neighbours are left out.
struct Planes {
  Extent extent;
  int64_t accesses;  // per plane
  int64_t chunk;     // accesses per slice, of a channel
};

// The elements [begin, end) of an access count.
template <typename T, int V>
struct Access {
  Pack<T, V> pack;
  int begin, end;
};

// Grid: channels in groups of blockDim.y, slices.  Block: threads of a channel, channels.
template <typename T, int V, typename Sums>
__global__ void __launch_bounds__(kThreads)
    ReducePlanes(Planes planes, const T* a, const T* b, Sums sums, double* partial) {
  using W = Wide<T>;
  const Extent extent = planes.extent;
  const int64_t c = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t size = extent.size();
  double first = 0, second = 0;
  if (c < extent.channels) {
    const auto channel = sums.For(c);
    const int64_t begin = int64_t(blockIdx.y) * planes.chunk;
    const int64_t all = extent.outer * planes.accesses;
    const int64_t end = begin + planes.chunk < all ? begin + planes.chunk : all;
    // A division once; then a walk.
    const int64_t step_n = blockDim.x / planes.accesses, step_i = blockDim.x % planes.accesses;
    int64_t e = begin + threadIdx.x;
    int64_t n = e / planes.accesses, i = e % planes.accesses;
    while (e < end) {
      Access<T, V> as[kUnroll], bs[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        as[u].begin = as[u].end = 0;
        if (e < end) {
          const int64_t start = (n * extent.channels + c) * extent.inner;
          const int64_t at = (start / V + i) * V;
          as[u].pack = Load<T, V>(a, at, size);
          if (Sums::kTwoArrays) bs[u].pack = Load<T, V>(b, at, size);
          as[u].begin = static_cast<int>(start > at ? start - at : 0);
          const int64_t left = start + extent.inner - at;
          as[u].end = static_cast<int>(left < V ? left : V);  // below 0: nothing of it
        }
        e += blockDim.x;
        n += step_n;
        i += step_i;
        if (i >= planes.accesses) {
          i -= planes.accesses;
          ++n;
        }
      }
      typename Sums::Run run;
      run.Clear();
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
          if (k >= as[u].begin && k < as[u].end) {
            run.Add(channel, ToWide(as[u].pack.element[k]),
                    Sums::kTwoArrays ? ToWide(bs[u].pack.element[k]) : W(0));
          }
        }
      }
      run.AddTo(&first, &second);
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
  const int64_t column = (int64_t(blockIdx.x) * kColumns + threadIdx.x) * V;
  double first[V] = {}, second[V] = {};
  if (column < rows.width) {
    decltype(sums.For(0)) channel[V];
#pragma unroll
    for (int k = 0; k < V; ++k) channel[k] = sums.For((column + k) % rows.channels);
    const int64_t begin = int64_t(blockIdx.y) * rows.chunk;
    const int64_t end = begin + rows.chunk < rows.rows ? begin + rows.chunk : rows.rows;
    for (int64_t r = begin + threadIdx.y; r < end; r += kUnroll * kRowsAtOnce) {
      Access<T, V> as[kUnroll], bs[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t row = r + u * kRowsAtOnce;
        const int64_t at = row * rows.width + column;
        const int64_t left = row < end ? rows.size - at : 0;
        as[u].end = static_cast<int>(left < 0 ? 0 : left < V ? left : V);
        if (as[u].end > 0) {
          as[u].pack = Load<T, V>(a, at, rows.size);
          if (Sums::kTwoArrays) bs[u].pack = Load<T, V>(b, at, rows.size);
        }
      }
#pragma unroll
      for (int k = 0; k < V; ++k) {
        typename Sums::Run run;
        run.Clear();
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (k < as[u].end) {
            run.Add(channel[k], ToWide(as[u].pack.element[k]),
                    Sums::kTwoArrays ? ToWide(bs[u].pack.element[k]) : W(0));
          }
        }
        run.AddTo(&first[k], &second[k]);
      }
    }
  }
  // One sum after the other, to stay within the shared memory that every GPU has.
  __shared__ double shared[kRowsAtOnce][V][kColumns];
  for (int which = 0; which < 2; ++which) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < V; ++k) {
      shared[threadIdx.y][k][threadIdx.x] = which == 0 ? first[k] : second[k];
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.y) < V && column < rows.width) {
      // Thread row k adds up element k of the accesses.
      for (int k = threadIdx.y; k < V; k += kRowsAtOnce) {
        double sum = 0;
        for (int y = 0; y < kRowsAtOnce; ++y) sum += shared[y][k][threadIdx.x];
        partial[(int64_t(blockIdx.y) * 2 + which) * rows.width + column + k] = sum;
      }
    }
  }
}

// How many slices, so that the device is full, and every slice has work of at least `least`.
inline int Slices(const Gpu& gpu, int64_t groups, int64_t work, int64_t least) {
  constexpr int kBlocksPerMultiprocessor = 4;
  const int64_t wanted =
      Ceil(static_cast<int64_t>(kBlocksPerMultiprocessor) * Multiprocessors(gpu), groups);
  return static_cast<int>(std::max<int64_t>(1, std::min(wanted, Ceil(work, least))));
}

template <int V, typename T, typename Sums>
PartialSums ReducePlanesOf(const Gpu& gpu, const Extent& extent, const T* a, const T* b,
                           const Sums& sums) {
  // A plane that begins within an access may need one more.
  const int64_t accesses = std::max<int64_t>(
      1, extent.inner % V == 0 ? extent.inner / V : Ceil(extent.inner + V - 1, V));
  const int64_t work = extent.outer * accesses;
  int threads = 8;  // of a channel
  while (threads < kThreads && threads * kUnroll < work) threads *= 2;
  const int64_t groups = Ceil(extent.channels, kThreads / threads);
  const int slices = Slices(gpu, groups, work, int64_t(threads) * kUnroll);
  PartialSums partial{extent.channels, extent.channels, slices, nullptr};
  partial.sums = Scratch<double>(gpu, Use::kPartialSums, slices * 2 * extent.channels);
  Launch(gpu, ReducePlanes<T, V, Sums>, dim3(static_cast<unsigned>(groups), slices),
         dim3(threads, kThreads / threads), Planes{extent, accesses, Ceil(work, slices)}, a, b,
         sums, partial.sums);
  return partial;
}

template <int V, typename T, typename Sums>
PartialSums ReduceRowsOf(const Gpu& gpu, const Extent& extent, const T* a, const T* b,
                         const Sums& sums) {
  int64_t repeat = V / std::gcd(extent.channels, int64_t(V));
  repeat *= std::max<int64_t>(1, kColumns * V / (extent.channels * repeat));
  const int64_t width = extent.channels * repeat;
  const int64_t rows = Ceil(extent.outer, repeat);
  const int64_t groups = Ceil(width / V, kColumns);
  const int slices = Slices(gpu, groups, rows, kUnroll * kRowsAtOnce);
  PartialSums partial{extent.channels, width, slices, nullptr};
  partial.sums = Scratch<double>(gpu, Use::kPartialSums, slices * 2 * width);
  Launch(gpu, ReduceRows<T, V, Sums>, dim3(static_cast<unsigned>(groups), slices),
         dim3(kColumns, kRowsAtOnce),
         Rows{extent.channels, extent.size(), width, rows, Ceil(rows, slices)}, a, b, sums,
         partial.sums);
  return partial;
}

// Two sums per channel over a, or over a and b.  `Sums` says of what: see MomentsSums.
template <typename T, typename Sums>
PartialSums Reduce(const Gpu& gpu, const Extent& extent, const T* a, const T* b, const Sums& sums) {
  constexpr int V = kPerAccess<T>;
  const bool aligned = Aligned(a) && Aligned(b);  // a slice of an array may not be
  if (extent.inner == 1) {
    return aligned ? ReduceRowsOf<V>(gpu, extent, a, b, sums)
                   : ReduceRowsOf<1>(gpu, extent, a, b, sums);
  }
  return aligned ? ReducePlanesOf<V>(gpu, extent, a, b, sums)
                 : ReducePlanesOf<1>(gpu, extent, a, b, sums);
}

}  // namespace gluon_syncbn
