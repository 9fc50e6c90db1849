// Two sums per channel over a feature map, on a GPU.
//
// Every block sums a part of the map for some channels and stores its partial sums in scratch
// memory; PartialSums::Total adds them up.  There are no atomic additions, and the order depends on
// the shape and the device alone: the result is the same, bit for bit, on every run.
//
// A thread sums short runs of elements in the accumulator type (acc_type.h), and the runs in
// float64.  The runs are long enough that float64, 64 times slower on some GPUs, does not matter.
//
// A `Sums` class, such as MomentsSums, says what is summed.  ThreadPivot(c, element) is the pivot
// of a thread's sums for channel c, where `element` is the first that the thread reads; Add adds an
// element; Finish(c, pivot, count, first, second) prepares the sums of a thread, over `count`
// elements, for being added to those of other threads.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "kernels/cuda/runtime.cuh"

namespace gluon_syncbn {

// What PartialSums::Total returns to a thread.
struct ChannelSums {
  bool is_owner;  // this thread has the channel's total; the others have helped
  double first, second;
};

// Partial sums, [splits][2][width]: column w belongs to channel w % channels.
struct PartialSums {
  static constexpr int kHelpers = 32;  // threads per channel
  static constexpr int kChannels = kThreads / kHelpers;

  int64_t channels;
  int64_t width;
  int splits;
  double* sums;

  dim3 Grid() const { return dim3(static_cast<unsigned>(CeilDiv(channels, kChannels))); }
  dim3 Block() const { return dim3(kHelpers, kChannels); }

  __device__ int64_t Channel() const { return int64_t(blockIdx.x) * kChannels + threadIdx.y; }

  // To be called by all threads of a block.
  __device__ ChannelSums Total(int64_t c) const {
    __shared__ double first[kChannels][kHelpers], second[kChannels][kHelpers];
    double a = 0, b = 0;
    if (c < channels) {
#pragma unroll 4
      for (int split = threadIdx.x; split < splits; split += kHelpers) {
        const double* columns = sums + int64_t(split) * 2 * width;
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

// How many accesses a thread has in flight.
constexpr int kUnroll = 4;

// Channels first.  A channel consists of `outer` planes of `inner` elements.  A plane is read in
// whole accesses; elements of its neighbours in the first and the last one are ignored.
struct Planes {
  Extent extent;
  int64_t accesses;  // per plane
  int64_t chunk;     // accesses per split, of a channel
};

// The accesses of a thread: every blockDim.x-th of its channel's split.
class PlaneCursor {
 public:
  __device__ PlaneCursor(const Planes& planes, int64_t c)
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
  // Accesses left.
  __device__ int Left() const { return left_; }
  // The index of the plane's first element, and the number of the access in the plane.
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

// The sums of a run.
template <typename Acc>
struct RunSums {
  Acc first = 0, second = 0;
  __device__ void AddTo(double* firsts, double* seconds) const {
    *firsts += first;
    *seconds += second;
  }
};

// Planes of whole accesses.
template <typename T, int V, typename Sums>
__device__ void AddWholePlanes(PlaneCursor cursor, int64_t c, const T* a, const T* b,
                               const Sums& sums, double* first, double* second) {
  using Acc = AccType<T>;
  const int64_t count = int64_t(cursor.Left()) * V;
  if (count == 0) return;
  const auto pivot = sums.ThreadPivot(c, ToAcc(a[cursor.Start() + int64_t(cursor.Access()) * V]));
  const auto add = [&](auto unroll) {
    constexpr int kCount = decltype(unroll)::value;
    int64_t at[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      at[u] = cursor.Start() + cursor.Access() * V;
      cursor.Next();
    }
    Pack<T, V> as[kCount], bs[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      as[u] = LoadWhole<T, V>(a, at[u]);
      if (Sums::kTwoArrays) bs[u] = LoadWhole<T, V>(b, at[u]);
    }
    RunSums<Acc> run;
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        Sums::Add(pivot, as[u][k], Sums::kTwoArrays ? bs[u][k] : Acc(0), &run.first, &run.second);
      }
    }
    run.AddTo(first, second);
  };
  while (cursor.Left() >= kUnroll) add(std::integral_constant<int, kUnroll>());
  while (cursor.Left() > 0) add(std::integral_constant<int, 1>());
  sums.Finish(c, pivot, count, first, second);
}

// Planes that begin and end anywhere in an access.
template <typename T, int V, typename Sums>
__device__ void AddAnyPlanes(PlaneCursor cursor, const Extent& extent, int64_t c, const T* a,
                             const T* b, const Sums& sums, double* first, double* second) {
  using Acc = AccType<T>;
  if (cursor.Left() <= 0) return;
  const int64_t size = extent.size();
  // The index of the access's first element, which may belong to the plane before.
  const auto place = [&] { return (cursor.Start() / V + cursor.Access()) * V; };
  const int64_t plane = cursor.Start();
  const auto pivot =
      sums.ThreadPivot(c, ToAcc(a[Min(Max(place(), plane), plane + extent.inner - 1)]));
  int64_t count = 0;
  while (cursor.Left() > 0) {
    Pack<T, V> as[kUnroll], bs[kUnroll];
    int begins[kUnroll], ends[kUnroll];  // the channel's elements of each access
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      begins[u] = ends[u] = 0;
      if (cursor.Left() > 0) {
        const int64_t start = cursor.Start(), end = start + extent.inner, at = place();
        as[u] = Load<T, V>(a, at, size);
        if (Sums::kTwoArrays) bs[u] = Load<T, V>(b, at, size);
        begins[u] = static_cast<int>(start > at ? start - at : 0);
        const int64_t left = end - at;  // negative: no element of it
        ends[u] = static_cast<int>(left < begins[u] ? begins[u] : left < V ? left : V);
      }
      count += ends[u] - begins[u];
      cursor.Next();
    }
    RunSums<Acc> run;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (k >= begins[u] && k < ends[u]) {
          Sums::Add(pivot, as[u][k], Sums::kTwoArrays ? bs[u][k] : Acc(0), &run.first, &run.second);
        }
      }
    }
    run.AddTo(first, second);
  }
  sums.Finish(c, pivot, count, first, second);
}

// Grid: channels in groups of blockDim.y, splits.  Block: threads of a channel, channels.
template <typename T, int V, bool whole, typename Sums>
__global__ void __launch_bounds__(kThreads)
    ReducePlanes(Planes planes, const T* a, const T* b, Sums sums, double* partial) {
  const Extent extent = planes.extent;
  const int64_t c = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  double first = 0, second = 0;
  if (c < extent.channels) {
    const PlaneCursor cursor(planes, c);
    if constexpr (whole) {
      AddWholePlanes<T, V>(cursor, c, a, b, sums, &first, &second);
    } else {
      AddAnyPlanes<T, V>(cursor, extent, c, a, b, sums, &first, &second);
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
    double* split = partial + int64_t(blockIdx.y) * 2 * extent.channels;
    split[c] = firsts[me];
    split[extent.channels + c] = seconds[me];
  }
}

// Channels last: the map is a matrix of `outer` rows and `channels` columns.  Several rows are
// joined to one of `width` columns, which consists of whole accesses and is long enough for a warp.
// Column w belongs to channel w % channels.
struct Rows {
  int64_t channels;
  int64_t size;
  int64_t width;
  int64_t partial_width;  // of the partial sums: `width` or `channels`
  int64_t rows;
  int64_t chunk;  // rows per split
};

constexpr int kColumns = 32;  // accesses per row and block
constexpr int kRowsAtOnce = kThreads / kColumns;

// Grid: columns in groups of kColumns, splits.  Block: columns, rows.
template <typename T, int V, typename Sums>
__global__ void __launch_bounds__(kThreads)
    ReduceRows(Rows rows, const T* a, const T* b, Sums sums, double* partial) {
  using Acc = AccType<T>;
  constexpr int kRun = 4 * kUnroll;  // rows
  const int64_t column = (int64_t(blockIdx.x) * kColumns + threadIdx.x) * V;
  double first[V] = {}, second[V] = {};
  const int64_t begin = int64_t(blockIdx.y) * rows.chunk + threadIdx.y;
  const int64_t end = Min(int64_t(blockIdx.y + 1) * rows.chunk, rows.rows);
  if (column < rows.width && begin < end) {
    int64_t at = begin * rows.width + column;
    const int64_t first_channel = column % rows.channels;
    const auto next = [&](int64_t c) { return c + 1 == rows.channels ? 0 : c + 1; };
    typename Sums::Pivot pivot[V];
    const Pack<T, V> elements = Load<T, V>(a, at, rows.size);
#pragma unroll
    for (int64_t k = 0, c = first_channel; k < V; ++k, c = next(c)) {
      pivot[k] = sums.ThreadPivot(c, elements[k]);
    }
    const auto add = [&](const Pack<T, V>& as, const Pack<T, V>& bs, int k, RunSums<Acc>* run) {
      Sums::Add(pivot[k], as[k], Sums::kTwoArrays ? bs[k] : Acc(0), &run->first, &run->second);
    };
    const int64_t there = rows.size / rows.width;  // complete rows
    int64_t left = Min(end, there) - begin;
    const int64_t step = kRowsAtOnce * rows.width;
    constexpr int kLast = (kUnroll - 1) * kRowsAtOnce;
    while (left > kLast) {
      RunSums<Acc> run[V];
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
    // The remainder, row by row; the last row may be incomplete.
    for (left += Max(end - there, 0); left > 0; left -= kRowsAtOnce, at += step) {
      const Pack<T, V> as = Load<T, V>(a, at, rows.size);
      Pack<T, V> bs = {};
      if (Sums::kTwoArrays) bs = Load<T, V>(b, at, rows.size);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (at + k >= rows.size) continue;
        RunSums<Acc> run;
        add(as, bs, k, &run);
        run.AddTo(&first[k], &second[k]);
      }
    }
    const int64_t last = at - step, mine = (end - begin + kRowsAtOnce - 1) / kRowsAtOnce;
#pragma unroll
    for (int64_t k = 0, c = first_channel; k < V; ++k, c = next(c)) {
      const int64_t count = mine - (last + k >= rows.size);
      sums.Finish(c, pivot[k], count, &first[k], &second[k]);
    }
  }
  // One of the two sums at a time, to stay within the shared memory that every GPU has.
  __shared__ double shared[kRowsAtOnce][V][kColumns];
  const int me = threadIdx.y * kColumns + threadIdx.x;
  for (int which = 0; which < 2; ++which) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < V; ++k) {
      shared[threadIdx.y][k][threadIdx.x] = which == 0 ? first[k] : second[k];
    }
    __syncthreads();
    // The threads of row k add up element k of the accesses (V is at most kRowsAtOnce).
    double sum = 0;
    if (static_cast<int>(threadIdx.y) < V) {
      for (int y = 0; y < kRowsAtOnce; ++y) sum += shared[y][threadIdx.y][threadIdx.x];
    }
    double* split = partial + (int64_t(blockIdx.y) * 2 + which) * rows.partial_width;
    if (rows.partial_width == rows.width) {
      if (static_cast<int>(threadIdx.y) < V && column < rows.width) {
        split[column + threadIdx.y] = sum;
      }
    } else {  // the block has the whole width: add up the columns of each channel
      double* columns = &shared[0][0][0];
      __syncthreads();
      if (static_cast<int>(threadIdx.y) < V) columns[threadIdx.x * V + threadIdx.y] = sum;
      __syncthreads();
      for (int64_t c = me; c < rows.channels; c += kThreads) {
        double total = 0;
        for (int64_t w = c; w < rows.width; w += rows.channels) total += columns[w];
        split[c] = total;
      }
    }
  }
}

// Into how many splits to divide `work`, with `groups` blocks each, so that the device is full, the
// last wave of blocks is not nearly empty, and each split has work of at least `least`.
inline int NumSplits(int64_t resident_blocks, int64_t groups, int64_t work, int64_t least) {
  int64_t wanted = std::max<int64_t>(1, resident_blocks / groups);
  const int64_t blocks = wanted * groups;
  if (blocks * 5 < resident_blocks * 4 || blocks > resident_blocks) {
    wanted = CeilDiv(4 * resident_blocks, groups);
  }
  return static_cast<int>(std::max<int64_t>(1, std::min(wanted, work / least)));
}

template <int V, bool whole, typename T, typename Sums>
PartialSums ReducePlanesOf(const Gpu& gpu, const Extent& extent, const T* a, const T* b,
                           const Sums& sums) {
  const auto kernel = ReducePlanes<T, V, whole, Sums>;
  // A plane that begins inside an access may extend over one more.
  const int64_t accesses =
      std::max<int64_t>(1, whole ? extent.inner / V : CeilDiv(extent.inner + V - 1, V));
  const int64_t work = extent.outer * accesses;
  int threads = 8;  // per channel
  while (threads < kThreads && threads * kUnroll < work) threads *= 2;
  const int64_t groups = CeilDiv(extent.channels, kThreads / threads);
  const int splits =
      NumSplits(ResidentBlocks(gpu, kernel), groups, work, int64_t(threads) * 2 * kUnroll);
  PartialSums partial{extent.channels, extent.channels, splits, nullptr};
  partial.sums = Scratch<double>(gpu, Use::kPartialSums, splits * 2 * extent.channels);
  Launch(gpu, kernel, dim3(static_cast<unsigned>(groups), splits),
         dim3(threads, kThreads / threads), Planes{extent, accesses, CeilDiv(work, splits)}, a, b,
         sums, partial.sums);
  return partial;
}

// How many rows to join to one, so that nearly all threads of a block have a column.
template <int V>
int64_t RowsToJoin(int64_t channels) {
  const int64_t least = V / std::gcd(channels, int64_t(V));  // whole accesses
  if (channels * least <= kColumns * V) return kColumns * V / (channels * least) * least;
  int64_t best = least;
  double best_use = 0;
  for (int64_t rows = least; rows <= 8 * least; rows += least) {
    const int64_t columns = channels * rows / V;
    const double use = double(columns) / double(CeilDiv(columns, kColumns) * kColumns);
    if (use > best_use + 0.05) {
      best = rows;
      best_use = use;
    }
  }
  return best;
}

template <int V, typename T, typename Sums>
PartialSums ReduceRowsOf(const Gpu& gpu, const Extent& extent, const T* a, const T* b,
                         const Sums& sums) {
  const auto kernel = ReduceRows<T, V, Sums>;
  const int64_t width = extent.channels * RowsToJoin<V>(extent.channels);
  const int64_t rows = CeilDiv(extent.size(), width);
  const int64_t groups = CeilDiv(width / V, kColumns);
  const int splits =
      NumSplits(ResidentBlocks(gpu, kernel), groups, rows, 4 * kUnroll * kRowsAtOnce);
  const int64_t partial_width = groups == 1 ? extent.channels : width;
  PartialSums partial{extent.channels, partial_width, splits, nullptr};
  partial.sums = Scratch<double>(gpu, Use::kPartialSums, splits * 2 * partial_width);
  Launch(gpu, kernel, dim3(static_cast<unsigned>(groups), splits), dim3(kColumns, kRowsAtOnce),
         Rows{extent.channels, extent.size(), width, partial_width, rows, CeilDiv(rows, splits)}, a,
         b, sums, partial.sums);
  return partial;
}

// Two sums per channel over a, or over a and b.
template <typename T, typename Sums>
PartialSums Reduce(const Gpu& gpu, const Extent& extent, const T* a, const T* b, const Sums& sums) {
  if (extent.size() == 0) return {extent.channels, extent.channels, 0, nullptr};
  constexpr int V = kPerAccess<T>;
  const bool aligned = Aligned(a) && Aligned(b);  // a view of an array may not be
  if (extent.inner == 1) {
    return aligned ? ReduceRowsOf<V>(gpu, extent, a, b, sums)
                   : ReduceRowsOf<1>(gpu, extent, a, b, sums);
  }
  if (!aligned) return ReducePlanesOf<1, true>(gpu, extent, a, b, sums);
  if (extent.inner % V == 0) return ReducePlanesOf<V, true>(gpu, extent, a, b, sums);
  // Half an access without a check per element is faster: 14x14 in float16, for example.
  if (extent.inner % (V / 2) == 0) return ReducePlanesOf<V / 2, true>(gpu, extent, a, b, sums);
  return ReducePlanesOf<V, false>(gpu, extent, a, b, sums);
}

}  // namespace gluon_syncbn
