// The inner loops of the CPU kernels, over the elements of one tile of a feature map.
//
// They are compiled once per instruction set (loops_*.cc, all from loops.inc), and one set of them
// is chosen when the library is loaded, so that one binary is limited by memory bandwidth on every
// x86-64.  Nothing here may have code with external linkage; loops.inc says why.
#pragma once

#include <cstddef>

#include "kernels/acc_type.h"
#include "kernels/cpu/float16.h"

namespace gluon_syncbn {

// A part of a feature map: `groups` of `rows` runs of columns * inner contiguous elements.  The
// first run begins at element `offset`, each of the others of its group `stride` elements after the
// one before, and each group `group_stride` elements after the one before.
struct FeatureTile {
  std::size_t offset;
  std::size_t groups;
  std::size_t group_stride;
  std::size_t rows;
  std::size_t stride;
  std::size_t first_column;
  std::size_t columns;
  std::size_t inner;

  std::size_t count() const { return groups * rows * inner; }  // elements per column
};

// Arrays with a number per column of the map, for (x - mean) * scale + shift.
template <typename Acc>
struct Affine {
  const Acc* mean;
  const Acc* scale;
  const Acc* shift;
};

// What becomes of z = (x - mean) * scale + shift: y = activation(z + residual).
template <typename T>
struct Epilogue {
  const T* residual;  // null: none
  bool activate;
  AccType<T> slope;  // of the activation, where its argument is negative
};

template <typename T>
struct CpuLoops {
  // sums = sum(x - pivot) and squares = sum((x - pivot)^2) per column of the tile, in float64.
  // The pivot of the tile's column c is pivots[c * step].
  void (*moments)(const FeatureTile& tile, const T* pivots, std::size_t step, const T* x,
                  double* sums, double* squares);
  // sums = sum(dy) and products = sum(dy * (x - mean)) per column of the tile, in float64.  `mean`
  // has a number per column of the map.
  void (*products)(const FeatureTile& tile, const AccType<T>* mean, const T* dy, const T* x,
                   double* sums, double* products);
  // y = (x - mean) * scale + shift, or y += ... if `add`.  y may be x.
  void (*affine)(const FeatureTile& tile, const Affine<AccType<T>>& affine, const T* x, T* y,
                 bool add);
  // The same with an epilogue.  y may be x or the residual.
  void (*activate)(const FeatureTile& tile, const Affine<AccType<T>>& affine,
                   const Epilogue<T>& epilogue, const T* x, T* y, bool add);
  // The gradient before the activation: g = dy, slope * dy where z <= 0, and NaN where z is, z as
  // above.  g may be dy.
  void (*gate)(const FeatureTile& tile, const Affine<AccType<T>>& affine, AccType<T> slope,
               const T* dy, const T* x, T* g);
  // dx = factor * dy + (x - mean) * scale + shift, or dx += ... if `add`.  dx may be dy.
  void (*combine)(const FeatureTile& tile, const Affine<AccType<T>>& affine,
                  const AccType<T>* factor, const T* dy, const T* x, T* dx, bool add);
};

struct CpuLoopSet {
  CpuLoops<Float16> float16;
  CpuLoops<float> float32;
  CpuLoops<double> float64;
};

extern const CpuLoopSet kBaselineLoops;
#if GLUON_SYNCBN_X86_LOOPS
extern const CpuLoopSet kAvx2Loops;
extern const CpuLoopSet kAvx512Loops;
#endif

}  // namespace gluon_syncbn
