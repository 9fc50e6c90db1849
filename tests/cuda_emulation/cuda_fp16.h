// CUDA's float16 and its casts between bits and numbers, for the emulation.
#pragma once

#include <cstring>

#include "../../src/operator/kernels/cpu/float16.h"

struct __half {
  std::uint16_t bits;
};
inline float __half2float(__half value) { return gluon_syncbn::ToFloat({value.bits}); }
inline __half __float2half_rn(float value) { return {gluon_syncbn::ToFloat16(value).bits}; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }

template <typename To, typename From>
To EmulatedCast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned bits) { return EmulatedCast<float>(bits); }
inline unsigned __float_as_uint(float value) { return EmulatedCast<unsigned>(value); }
inline double __hiloint2double(int high, int low) {
  return EmulatedCast<double>(std::uint64_t(unsigned(high)) << 32 | unsigned(low));
}
inline int __double2loint(double value) {
  return static_cast<int>(static_cast<unsigned>(EmulatedCast<std::uint64_t>(value)));
}
inline int __double2hiint(double value) {
  return static_cast<int>(static_cast<unsigned>(EmulatedCast<std::uint64_t>(value) >> 32));
}
