// Codecs: how a block of at most 128 elements is read into floats and written back.
//
// `open` gives floats to work on: the memory itself where it already holds floats, else a decoded
// copy in the buffer; `close` encodes the buffer again. A codec knows no rule.
#pragma once
#include <bit>
#include <cstdint>

#include "random.h"
#include "step.h"

namespace ebbtide {

struct Block {
  int64_t index;   // in the whole parameter
  int64_t start;   // element of the row
  int n;           // elements
  int first_lane;  // lane of the first element: not 0 where a shard starts inside a block
};

inline Block locate(const Row& row, int64_t block) {
  const int64_t per_run = row.blocks_per_run();
  const int64_t run = block / per_run, in_run = block % per_run;
  const int64_t from = in_run * kBlock - row.lead;
  const int64_t start = from < 0 ? 0 : from;
  int64_t stop = from + kBlock;
  if (stop > row.run_length) stop = row.run_length;
  return {row.first_block + block, run * row.run_length + start, int(stop - start),
          int(start - from)};
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

// Random bits of a block for one field, or none: round to nearest.
struct Dither {
  uint32_t hash = 0;
  bool on = false;
  uint32_t at(int lane) const { return kLaneConstants[lane] ^ hash; }
};

inline float* open(const Field& field, const Block& b, float* buffer) {
  switch (field.format) {
    case Format::kF32:
      return static_cast<float*>(field.data) + b.start;
    case Format::kBF16: {
      const uint16_t* from = static_cast<const uint16_t*>(field.data) + b.start;
      for (int j = 0; j < b.n; ++j) buffer[j] = bf16_to_float(from[j]);
      return buffer;
    }
    case Format::kF16: {
      const uint16_t* from = static_cast<const uint16_t*>(field.data) + b.start;
      for (int j = 0; j < b.n; ++j) buffer[j] = f16_to_float(from[j]);
      return buffer;
    }
    default:
      return nullptr;
  }
}

inline void close(const Field& field, const Block& b, const float* buffer, Dither dither) {
  uint16_t* to = static_cast<uint16_t*>(field.data) + b.start;
  switch (field.format) {
    case Format::kBF16:
      for (int j = 0; j < b.n; ++j) {
        const float x = buffer[j];
        to[j] =
            float_to_bf16(x, dither.on ? dither.at(b.first_lane + j) >> 16 : bf16_nearest_bits(x));
      }
      return;
    case Format::kF16:
      for (int j = 0; j < b.n; ++j) {
        const float x = buffer[j];
        to[j] =
            float_to_f16(x, dither.on ? dither.at(b.first_lane + j) >> 19 : f16_nearest_bits(x));
      }
      return;
    default:
      return;  // kF32: worked on in place
  }
}

}  // namespace ebbtide
