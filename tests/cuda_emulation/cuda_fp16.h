// CUDA's float16, for the emulation.
#pragma once

#include "../../src/operator/float16.h"

struct __half {
  std::uint16_t bits;
};
inline float __half2float(__half value) { return gluon_syncbn::ToFloat({value.bits}); }
inline __half __float2half_rn(float value) { return {gluon_syncbn::ToFloat16(value).bits}; }
