// IEEE binary16 for the CPU kernels: storage only, arithmetic is float32.
#pragma once

#include <cstdint>
#include <cstring>

namespace gluon_syncbn {

class Float16 {
 public:
  Float16() = default;
  explicit Float16(float value) : bits_(FromFloat(value)) {}
  explicit operator float() const { return ToFloat(bits_); }

 private:
  static std::uint32_t Bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
  }
  static float Value(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

  // Branches only choose between values, so that the loops around these vectorize.
  static float ToFloat(std::uint16_t half) {
    const std::uint32_t sign = (half & 0x8000u) << 16;
    const std::uint32_t magnitude = half & 0x7fffu;
    // Exponent and mantissa move into place; 2^112 mends the bias and scales subnormals exactly.
    const float finite = Value(magnitude << 13) * 0x1p112f;
    const std::uint32_t infinite = 0x7f800000u | (magnitude << 13);
    return Value(sign | (magnitude >= 0x7c00u ? infinite : Bits(finite)));
  }

  // Rounds to nearest, ties to even, as the hardware instruction does.
  static std::uint16_t FromFloat(float value) {
    const std::uint32_t bits = Bits(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    const std::uint32_t odd = (magnitude >> 13) & 1u;
    const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
    // Adding 0.5 leaves a subnormal's rounded mantissa in the lowest bits of the sum.
    const std::uint32_t subnormal = Bits(Value(magnitude) + 0.5f) - 0x3f000000u;
    std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return static_cast<std::uint16_t>(sign | half);
  }

  std::uint16_t bits_;
};

}  // namespace gluon_syncbn
