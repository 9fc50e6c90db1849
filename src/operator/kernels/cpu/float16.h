// IEEE binary16 as a storage type; arithmetic is done in float32.
//
// Everything but the type has internal linkage: this header is compiled for several instruction
// sets, and the linker must not use the code of one of them for all (see loops.inc).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace gluon_syncbn {

struct Float16 {
  std::uint16_t bits;
};

namespace {

#ifdef __F16C__

inline float ToFloat(Float16 value) { return _cvtsh_ss(value.bits); }
inline Float16 ToFloat16(float value) { return {_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)}; }

#else

inline std::uint32_t BitsOf(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float FloatOf(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// In these two functions branches only select values, so that loops around them are vectorized.
inline float ToFloat(Float16 value) {
  const std::uint32_t sign = (value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  // The shift moves exponent and mantissa into place; 2^112 corrects the bias of the exponent, and
  // scales subnormals exactly.
  const float finite = FloatOf(magnitude << 13) * 0x1p112f;
  const std::uint32_t infinite = 0x7f800000u | (magnitude << 13);
  return FloatOf(sign | (magnitude >= 0x7c00u ? infinite : BitsOf(finite)));
}

// Rounds to nearest, ties to even, as the hardware instruction does.
inline Float16 ToFloat16(float value) {
  const std::uint32_t bits = BitsOf(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t odd = (magnitude >> 13) & 1u;
  const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
  // Adding 0.5 rounds the mantissa of a subnormal into the lowest bits of the sum.
  const std::uint32_t subnormal = BitsOf(FloatOf(magnitude) + 0.5f) - 0x3f000000u;
  std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<std::uint16_t>(sign | half)};
}

#endif

}  // namespace
}  // namespace gluon_syncbn
