// Counter-based random bits for stochastic rounding: no state, the same whatever the threads.
//
// One hash a block of 128 elements, of (seed, step, salt of the parameter, index of the block in
// the whole parameter); the elements of the block vary it by a constant of their lane. The top
// seven bits of the constants are a permutation of 0..127, so the 128 roundings of a block are
// spread evenly over [0, 1) whatever the hash: each is unbiased and their mean has less noise than
// independent bits.
#pragma once
#include <array>
#include <cstdint>

namespace ebbtide {

constexpr int kBlock = 128;

// The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection that mixes every bit.
constexpr uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

constexpr std::array<uint32_t, kBlock> lane_constants() {
  std::array<uint32_t, kBlock> constants{};
  for (uint32_t lane = 0; lane < kBlock; ++lane) {
    uint32_t reversed = 0;
    for (int bit = 0; bit < 7; ++bit) reversed |= ((lane >> bit) & 1u) << (6 - bit);
    constants[lane] = (reversed << 25) | uint32_t(mix(lane) >> 39);
  }
  return constants;
}
inline constexpr std::array<uint32_t, kBlock> kLaneConstants = lane_constants();

// The key of one parameter at one step; `block_bits` of it and a block index gives the block's
// hash.
constexpr uint64_t row_key(uint64_t seed, uint64_t step, uint64_t salt) {
  return mix(mix(seed) ^ mix(step * 0xD1342543DE82EF95u) ^ salt);
}
constexpr uint64_t block_bits(uint64_t key, uint64_t block) { return mix(key ^ (block << 1)); }

}  // namespace ebbtide
