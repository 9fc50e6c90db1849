// One result per element of a feature map, from one array or two, on a GPU:
//
//   y = (x - mean) * scale + shift [+ factor * other]
//
// with four numbers per channel.  The map is taken as one long row of accesses of 16 bytes,
// whatever its layout; every thread takes accesses that lie a fixed number apart, and knows their
// channels by walking, without a division per access.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "kernels/batch_norm_math.h"
#include "kernels/cuda/runtime.cuh"

namespace gluon_syncbn {

// (Field by field: a choice between whole entries would go through memory.)
template <typename W>
__device__ TableEntry<W> Choose(bool first, const TableEntry<W>& a, const TableEntry<W>& b) {
  return {first ? a.mean : b.mean, first ? a.scale : b.scale, first ? a.shift : b.shift,
          first ? a.factor : b.factor};
}

// How the channels of an access are found.
enum class Walk {
  kOneChannel,    // all its elements are of one channel: channels first, planes of whole accesses
  kTwoChannels,   // it may go over from one plane to the next: channels first, other planes
  kSameChannels,  // every access of a thread has the same channels: channels last
  kEveryElement,  // each element by itself: anything else
};

template <typename T>
struct Map {
  Extent extent;
  const T* x;
  const T* other;  // null: none
  T* y;            // may be x or other
  bool add;
};

template <typename T, int V>
__device__ void Store(const Pack<T, V>& pack, T* to, int64_t at, int64_t size) {
#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (at + k < size) to[at + k] = pack.At(k);
  }
}

template <typename T, int V, Walk walk>
__global__ void __launch_bounds__(kThreads)
    ElementwiseKernel(Map<T> map, const TableEntry<Wide<T>>* table) {
  using W = Wide<T>;
  const Extent extent = map.extent;
  const int64_t size = extent.size();
  const int64_t step = int64_t(gridDim.x) * blockDim.x * V;
  int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (at >= size) return;
  // Where the first element of the access lies in its plane, and how that changes from one to the
  // next.
  int64_t i = at % extent.inner, c = at / extent.inner % extent.channels;
  const int64_t step_i = step % extent.inner, step_c = step / extent.inner % extent.channels;
  TableEntry<W> entry[V];
  if (walk == Walk::kSameChannels) {
#pragma unroll
    for (int k = 0; k < V; ++k) entry[k] = table[(c + k) % extent.channels];
  }
  const auto apply = [&](auto is_whole) {  // whether all the access's elements are there
    constexpr bool whole = decltype(is_whole)::value;
    const auto load = [&](const T* from) {
      return whole ? LoadWhole<T, V>(from, at) : Load<T, V>(from, at, size);
    };
    if (walk == Walk::kOneChannel) {
      entry[0] = table[c];
    } else if (walk == Walk::kTwoChannels) {
      const TableEntry<W> here = table[c], next = table[c + 1 == extent.channels ? 0 : c + 1];
      const int64_t left = extent.inner - i;
#pragma unroll
      for (int k = 0; k < V; ++k) entry[k] = Choose(k < left, here, next);
    } else if (walk == Walk::kEveryElement) {
      int64_t element_i = i, element_c = c;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        entry[k] = table[element_c];
        if (++element_i == extent.inner) {
          element_i = 0;
          if (++element_c == extent.channels) element_c = 0;
        }
      }
    }
    const Pack<T, V> x = load(map.x);
    Pack<T, V> other = {}, before = {}, y = {};
    if (map.other != nullptr) other = load(map.other);
    if (map.add) before = load(map.y);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const TableEntry<W>& e = entry[walk == Walk::kOneChannel ? 0 : k];
      W value = (x[k] - e.mean) * e.scale + e.shift;
      if (map.other != nullptr) value += e.factor * other[k];
      if (map.add) value += before[k];
      T element;
      FromWide(value, &element);
      y.Set(k, element);
    }
    if (whole) {
      *reinterpret_cast<Pack<T, V>*>(map.y + at) = y;
    } else {
      Store<T, V>(y, map.y, at, size);
    }
  };
  for (; at + V <= size; at += step) {
    apply(std::true_type());
    if (walk != Walk::kSameChannels) {
      i += step_i;
      c += step_c;
      if (i >= extent.inner) {
        i -= extent.inner;
        ++c;
      }
      if (c >= extent.channels) c -= extent.channels;
    }
  }
  if (at < size) apply(std::false_type());
}

// Channels last: a thread's channels stay the same if all threads together step over whole rows.
// That takes a multiple of so many blocks.
template <int V>
int64_t BlocksOfRows(const Extent& extent) {
  return extent.channels / std::gcd(extent.channels, int64_t(kThreads) * V);
}

template <int V, Walk walk, typename T>
void LaunchElementwise(const Gpu& gpu, const Map<T>& map, const TableEntry<Wide<T>>* table) {
  const auto kernel = ElementwiseKernel<T, V, walk>;
  const int64_t all = Ceil(Ceil(map.extent.size(), V), kThreads);  // with one access a thread
  int64_t blocks = std::min<int64_t>(all, BlocksAtATime(gpu, kernel));
  if (walk == Walk::kSameChannels) {
    const int64_t rows = BlocksOfRows<V>(map.extent);
    blocks = std::max<int64_t>(1, blocks / rows) * rows;
  }
  Launch(gpu, kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), map, table);
}

template <int V, typename T>
void ElementwiseOf(const Gpu& gpu, const Map<T>& map, const TableEntry<Wide<T>>* table) {
  const Extent& extent = map.extent;
  if (extent.inner > 1 && extent.inner % V == 0) {
    LaunchElementwise<V, Walk::kOneChannel>(gpu, map, table);
  } else if (extent.inner > 1 && extent.inner >= V) {
    LaunchElementwise<V, Walk::kTwoChannels>(gpu, map, table);
  } else if (extent.inner == 1 && 4 * BlocksOfRows<V>(extent) * kThreads * V <= extent.size()) {
    LaunchElementwise<V, Walk::kSameChannels>(gpu, map, table);
  } else {
    LaunchElementwise<V, Walk::kEveryElement>(gpu, map, table);
  }
}

template <typename T>
void Elementwise(const Gpu& gpu, const Extent& extent, const TableEntry<Wide<T>>* table, const T* x,
                 const T* other, T* y, bool add) {
  if (extent.size() == 0) return;
  const Map<T> map{extent, x, other, y, add};
  if (Aligned(x) && Aligned(other) && Aligned(y)) {
    ElementwiseOf<kPerAccess<T>>(gpu, map, table);
  } else {
    ElementwiseOf<1>(gpu, map, table);
  }
}

}  // namespace gluon_syncbn
