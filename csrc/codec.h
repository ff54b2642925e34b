// Codecs of single numbers, and where a block of at most 128 elements lies in a row.
// src/ebbtide/codecs is their definition. Nothing here has a name outside its object: each
// instruction set has its own.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>

#include "random.h"
#include "step.h"

namespace ebbtide {
namespace {

struct Block {
  int64_t index;   // in the whole parameter
  int64_t start;   // element of the row
  int n;           // elements
  int first_lane;  // lane of the first element: not 0 where a shard starts inside a block
  int64_t whole;   // whole blocks from here to the end of the run
};

inline Block locate(const Row& row, int64_t block) {
  const int64_t per_run = row.blocks_per_run();
  const int64_t run = block / per_run, in_run = block % per_run;
  const int64_t from = in_run * kBlock - row.lead;
  const int64_t start = from < 0 ? 0 : from;
  int64_t stop = from + kBlock;
  if (stop > row.run_length) stop = row.run_length;
  return {row.first_block + block, run * row.run_length + start, int(stop - start),
          int(start - from), (row.run_length - start) / kBlock};
}

// First element of a block; the number of elements for the block after the last.
inline int64_t first_element(const Row& row, int64_t block) {
  return block < row.blocks() ? locate(row, block).start : row.numel;
}

inline float from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t to_bits(float x) { return std::bit_cast<uint32_t>(x); }

inline float bf16_to_float(uint16_t h) { return from_bits(uint32_t(h) << 16); }

// Rounds by adding `bits` (16 of them) below the kept part: uniform bits round stochastically.
// A finite value never becomes infinite.
inline uint16_t float_to_bf16(float x, uint32_t bits) {
  const uint32_t u = to_bits(x), magnitude = u & 0x7FFFFFFFu;
  uint32_t rounded = (magnitude + bits) >> 16;
  rounded = magnitude < 0x7F800000u ? (rounded > 0x7F7Fu ? 0x7F7Fu : rounded)
                                    : (magnitude >> 16) | (magnitude > 0x7F800000u ? 0x40u : 0u);
  return uint16_t(rounded | ((u >> 16) & 0x8000u));
}
inline uint32_t bf16_nearest_bits(float x) { return 0x7FFFu + ((to_bits(x) >> 16) & 1u); }

inline float f16_to_float(uint16_t h) {
  const uint32_t magnitude = h & 0x7FFFu;
  uint32_t u = (magnitude << 13) + (112u << 23);
  if (magnitude >= 0x7C00u) u += 112u << 23;
  // Subnormals through an integer: their bits would be float denormals, which the kernel flushes.
  if (magnitude < 0x400u) u = to_bits(float(int32_t(magnitude)) * 0x1p-24f);
  return from_bits(u | (uint32_t(h & 0x8000u) << 16));
}
// Rounds by adding `bits` (13 of them) below the kept part; finite values stay finite.
inline uint16_t float_to_f16(float x, uint32_t bits) {
  const uint32_t u = to_bits(x), magnitude = u & 0x7FFFFFFFu, sign = (u >> 16) & 0x8000u;
  if (magnitude > 0x7F800000u) return uint16_t(sign | 0x7E00u);
  if (magnitude == 0x7F800000u) return uint16_t(sign | 0x7C00u);
  uint32_t h;
  if (magnitude < (113u << 23)) {  // below 2^-14: a multiple of 2^-24
    const float scaled = from_bits(magnitude) * 0x1p24f;
    h = uint32_t(int32_t(scaled + float(int32_t(bits & 0x1FFFu)) * 0x1p-13f));
  } else {
    h = ((magnitude + bits) >> 13) - (112u << 10);
    if (h > 0x7BFFu) h = 0x7BFFu;
  }
  return uint16_t(sign | h);
}
inline uint32_t f16_nearest_bits(float x) { return 0xFFFu + ((to_bits(x) >> 13) & 1u); }

// Where a number lies among the codes of float16, in steps of 2^-16 of a code, from the bits of its
// magnitude: exact from 2^-14 up to the last number that rounds to a finite float16, where it
// stops; to the nearest 2^-40 below.
inline uint32_t f16_position(uint32_t magnitude) {
  constexpr uint32_t kRebias = 112u << 23, kLast = 0x0F7FEFFFu;
  if (magnitude >= kRebias + (1u << 23)) return std::min(magnitude - kRebias, kLast) << 3;
  const uint32_t exponent = magnitude >> 23, significand = (magnitude & 0x7FFFFFu) | 0x800000u;
  if (exponent >= 110) return significand << (exponent - 110);
  const uint32_t shift = 110 - exponent;
  return shift > 24 ? 0 : (significand + (1u << (shift - 1))) >> shift;
}
inline float f16_at(uint32_t position) {
  if (position < 0x4000000u) return float(int32_t(position)) * 0x1p-40f;
  return from_bits((position >> 3) + (112u << 23));
}

// A float as a code of 16 bits and a signed residual: high·2^16 + residual·2^(16 - bits) is where
// it lies among the codes. For bfloat16 that is what its bits say.
struct Split {
  uint16_t high;
  int16_t residual;
};
// `round` is added below the kept part; 0 for 16 bits.
inline Split split(float x, int bits, bool half, uint32_t round) {
  const uint32_t u = to_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  if (magnitude >= 0x7F800000u) return {half ? float_to_f16(x, 0) : float_to_bf16(x, 0), 0};
  uint32_t position = half ? f16_position(magnitude) : magnitude;
  if (bits == 8) position = std::min(position + round, half ? 0x7BFF7FFFu : 0x7F7FFFFFu) & ~0xFFu;
  const uint32_t high = (position + 0x8000u) >> 16;
  return {uint16_t(sign | high), int16_t(int32_t(position - (high << 16)) >> (16 - bits))};
}
inline float f16_join(uint16_t high, int32_t residual, int bits) {
  const uint32_t code = high & 0x7FFFu;
  if (code >= 0x7C00u) return f16_to_float(high);
  // A parameter set to zero from outside is zero, whatever residual it had.
  if (code == 0 && residual < 0) residual = 0;
  const float x = f16_at((code << 16) + uint32_t(residual * (1 << (16 - bits))));
  return (high & 0x8000u) != 0 ? -x : x;
}

}  // namespace
}  // namespace ebbtide
