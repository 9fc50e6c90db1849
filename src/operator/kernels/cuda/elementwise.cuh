// Elementwise arithmetic on a GPU:
//
//   y = z [+ factor * other],  z = (x - mean) * scale + shift
//   y = other, slope * other where z <= 0, NaN where z is
//
// with four numbers per channel; the first one may be followed by an activation.  Whatever its
// layout, the feature map is treated as one row of accesses of 16 bytes.  The accesses of a thread
// are a fixed distance apart, so it advances the channel index from one to the next without a
// division.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "kernels/batch_norm_math.h"
#include "kernels/cuda/runtime.cuh"

namespace gluon_syncbn {

// (Field by field: the compiler would put whole entries into local memory.)
template <typename Acc>
__device__ ChannelEntry<Acc> Choose(bool first, const ChannelEntry<Acc>& a,
                                    const ChannelEntry<Acc>& b) {
  return {first ? a.mean : b.mean, first ? a.scale : b.scale, first ? a.shift : b.shift,
          first ? a.factor : b.factor};
}

// How the channels of an access are determined.
enum class IndexMode {
  kOneChannel,    // one channel per access: channels first, planes of whole accesses
  kTwoChannels,   // an access may extend into the next plane: channels first, other planes
  kSameChannels,  // the same channels for all accesses of a thread: channels last
  kEveryElement,  // element by element: everything else
};

enum class Epilogue {
  kNone,
  kActivate,  // y = slope * y where it is negative
  kGate,      // the second formula: the backward pass of the activation
};

template <typename T>
struct ElementwiseArgs {
  Extent extent;
  const T* x;
  const T* other;  // null: none
  T* y;            // may be x or other
  bool add;
  Epilogue epilogue;
  AccType<T> slope;
};

template <typename T, int V>
__device__ void StorePart(const Pack<T, V>& pack, T* to, int64_t at, int64_t size) {
#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (at + k < size) to[at + k] = pack.At(k);
  }
}

template <typename T, int V, IndexMode mode>
__global__ void __launch_bounds__(kThreads)
    ElementwiseKernel(ElementwiseArgs<T> args, const ChannelEntry<AccType<T>>* table) {
  using Acc = AccType<T>;
  const Extent extent = args.extent;
  const int64_t size = extent.size();
  const int64_t step = int64_t(gridDim.x) * blockDim.x * V;
  int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (at >= size) return;
  // The position of the access's first element in its plane, and its increment per access.
  int64_t i = at % extent.inner, c = at / extent.inner % extent.channels;
  const int64_t step_i = step % extent.inner, step_c = step / extent.inner % extent.channels;
  ChannelEntry<Acc> entry[V];
  if (mode == IndexMode::kSameChannels) {
#pragma unroll
    for (int k = 0; k < V; ++k) entry[k] = table[(c + k) % extent.channels];
  }
  const auto apply = [&](auto is_whole) {  // whether the array has all elements of the access
    constexpr bool whole = decltype(is_whole)::value;
    const auto load = [&](const T* from) {
      return whole ? LoadWhole<T, V>(from, at) : Load<T, V>(from, at, size);
    };
    if (mode == IndexMode::kOneChannel) {
      entry[0] = table[c];
    } else if (mode == IndexMode::kTwoChannels) {
      const ChannelEntry<Acc> here = table[c], next = table[c + 1 == extent.channels ? 0 : c + 1];
      const int64_t left = extent.inner - i;
#pragma unroll
      for (int k = 0; k < V; ++k) entry[k] = Choose(k < left, here, next);
    } else if (mode == IndexMode::kEveryElement) {
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
    const Pack<T, V> x = load(args.x);
    Pack<T, V> other = {}, before = {}, y = {};
    if (args.other != nullptr) other = load(args.other);
    if (args.add) before = load(args.y);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const ChannelEntry<Acc>& e = entry[mode == IndexMode::kOneChannel ? 0 : k];
      Acc value = (x[k] - e.mean) * e.scale + e.shift;
      if (args.epilogue == Epilogue::kGate) {
        // A factor, so that no NaN is lost.
        value = other[k] * (value > 0 ? Acc(1) : value <= 0 ? args.slope : value);
      } else {
        if (args.other != nullptr) value += e.factor * other[k];
        if (args.epilogue == Epilogue::kActivate && value < 0) {
          value = args.slope == 0 ? Acc(0) : args.slope * value;  // infinity must not become NaN
        }
      }
      if (args.add) value += before[k];
      T element;
      FromAcc(value, &element);
      y.Set(k, element);
    }
    if (whole) {
      *reinterpret_cast<Pack<T, V>*>(args.y + at) = y;
    } else {
      StorePart<T, V>(y, args.y, at, size);
    }
  };
  for (; at + V <= size; at += step) {
    apply(std::true_type());
    if (mode != IndexMode::kSameChannels) {
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

// Channels last: the channels of a thread stay the same if the step of all threads is a number of
// whole rows, that is, if the number of blocks is a multiple of this.
template <int V>
int64_t BlocksOfRows(const Extent& extent) {
  return extent.channels / std::gcd(extent.channels, int64_t(kThreads) * V);
}

template <int V, IndexMode mode, typename T>
void LaunchElementwise(const Gpu& gpu, const ElementwiseArgs<T>& args,
                       const ChannelEntry<AccType<T>>* table) {
  const auto kernel = ElementwiseKernel<T, V, mode>;
  const int64_t all =
      CeilDiv(CeilDiv(args.extent.size(), V), kThreads);  // for one access per thread
  int64_t blocks = std::min<int64_t>(all, ResidentBlocks(gpu, kernel));
  if (mode == IndexMode::kSameChannels) {
    const int64_t rows = BlocksOfRows<V>(args.extent);
    blocks = std::max<int64_t>(1, blocks / rows) * rows;
  }
  Launch(gpu, kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), args, table);
}

template <int V, typename T>
void ElementwiseOf(const Gpu& gpu, const ElementwiseArgs<T>& args,
                   const ChannelEntry<AccType<T>>* table) {
  const Extent& extent = args.extent;
  if (extent.inner > 1 && extent.inner % V == 0) {
    LaunchElementwise<V, IndexMode::kOneChannel>(gpu, args, table);
  } else if (extent.inner > 1 && extent.inner >= V) {
    LaunchElementwise<V, IndexMode::kTwoChannels>(gpu, args, table);
  } else if (extent.inner == 1 && 4 * BlocksOfRows<V>(extent) * kThreads * V <= extent.size()) {
    LaunchElementwise<V, IndexMode::kSameChannels>(gpu, args, table);
  } else {
    LaunchElementwise<V, IndexMode::kEveryElement>(gpu, args, table);
  }
}

template <typename T>
void Elementwise(const Gpu& gpu, const Extent& extent, const ChannelEntry<AccType<T>>* table,
                 const T* x, const T* other, T* y, bool add, Epilogue epilogue = Epilogue::kNone,
                 double slope = 0.0) {
  if (extent.size() == 0) return;
  const ElementwiseArgs<T> args{extent, x, other, y, add, epilogue, static_cast<AccType<T>>(slope)};
  if (Aligned(x) && Aligned(other) && Aligned(y)) {
    ElementwiseOf<kPerAccess<T>>(gpu, args, table);
  } else {
    ElementwiseOf<1>(gpu, args, table);
  }
}

}  // namespace gluon_syncbn
