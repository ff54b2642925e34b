// The moments of Adam over one block of 128 elements: as floats, as bfloat16, or in eight bits.
//
// `get` decodes one vector of lanes of every moment, `put` takes the new ones. When all are in,
// `settle` has what was gathered of them, `choose` decides how to encode the block and `encode`
// does. src/ebbtide/codecs/moments.py defines the eight bits and says why they are so.
#pragma once
#include <algorithm>

#include "streams.h"

namespace ebbtide {
namespace {

// The state of an element-wise format. The first moment, or the momentum, rounds to nearest;
// moments of squares would stall that way (a step of beta2 = .999 is below half an ulp of
// bfloat16), so they round stochastically.
template <class First, class Second, int kCount>
struct Elementwise {
  static constexpr int kState = kCount;
  First first;
  Second second[std::max(kCount - 1, 1)];

  struct Running {};

  EBBTIDE_INLINE Running open() { return {}; }
  EBBTIDE_INLINE void prefetch() const {
    if constexpr (kCount > 0) first.prefetch();
    for (int k = 1; k < kCount; ++k) second[k - 1].prefetch();
  }
  EBBTIDE_INLINE void get(int j, const Running&, Lanes* state) const {
    if constexpr (kCount > 0) state[0] = first.get(j);
    for (int k = 1; k < kCount; ++k) state[k] = second[k - 1].get(j);
  }
  EBBTIDE_INLINE void put(int j, Running&, const Lanes* state, uint32_t word) {
    if constexpr (kCount > 0) first.put(j, state[0], UintLanes{});
    for (int k = 1; k < kCount; ++k) second[k - 1].put(j, state[k], words_at(j, word));
  }
  EBBTIDE_INLINE void settle(const Running&) {}
  EBBTIDE_INLINE void choose() {}
  EBBTIDE_INLINE void encode(uint32_t) {}
};

constexpr uint32_t kSmallest = 1u << 24;      // bits of v; what is below counts as zero
constexpr uint32_t kLargest = 0x7E800000u;    // bits of v that still round up to a finite number
constexpr uint32_t kDormant = 16u << 23;      // how far below the largest v dormant elements count
constexpr uint32_t kMostRatio = 0x5F800000u;  // bits of the first m/S too large to keep

// 1/S of the number with these bits: S is the power of two nearest its root.
EBBTIDE_INLINE UintLanes inverse_unit(UintLanes bits) {
  return 0x5F000000u - ((bits >> 1) & 0x7F800000u);
}
EBBTIDE_INLINE uint32_t inverse_unit(uint32_t bits) {
  return 0x5F000000u - ((bits >> 1) & 0x7F800000u);
}

// A second moment in eight bits: codes on the float's own bits, shift and base in the window.
class Window8 {
 public:
  // What a block's loop goes by and gathers; apart from the rest, so that it stays in registers.
  struct Running {
    int shift;
    uint32_t base;
    UintLanes highest{}, lowest = ~UintLanes{}, lowest_moving = ~UintLanes{};
  };

  void at(uint8_t* codes, uint16_t* window) {
    codes_ = codes;
    window_ = window;
  }
  EBBTIDE_INLINE Running open() const {
    const int ones = std::min(std::countl_one(*window_), 7);
    return {16 + ones, *window_ & (0xFFFFu >> ones)};
  }
  EBBTIDE_INLINE UintLanes get(int j, const Running& running) const {
    const UintLanes codes = load_wide(codes_ + j);
    return where(nonzero(codes), (codes + running.base) << running.shift);
  }
  EBBTIDE_INLINE void put(int j, Running& running, UintLanes bits, Mask alive, Mask moving) {
    bits_[j / kLanes] = bits;
    running.highest = larger(running.highest, bits);
    running.lowest = smaller(alive, running.lowest, bits);
    running.lowest_moving = smaller(moving, running.lowest_moving, bits);
  }
  EBBTIDE_INLINE void settle(const Running& running) {
    highest_ = running.highest;
    lowest_ = running.lowest;
    lowest_moving_ = running.lowest_moving;
  }
  EBBTIDE_INLINE void prefetch() const { prefetch_block(codes_); }
  UintLanes bits(int i) const { return bits_[i]; }
  bool holds() const { return largest(highest_) <= kLargest; }

  // Chooses the window of what has been put.
  EBBTIDE_INLINE void choose() {
    const uint32_t highest = largest(highest_);
    shift_ = 16;
    base_ = 0;
    *window_ = 0;
    if (highest == 0) return;
    const uint32_t floor = highest > kDormant ? highest - kDormant : 0;
    const uint32_t lowest = std::max(smallest(lowest_), floor);
    const uint32_t low = std::min({smallest(lowest_moving_), lowest, highest});
    shift_ = std::max(int(std::bit_width(highest - low)) - 8, 16);
    shift_ += (highest >> shift_) - (low >> shift_) > 253;
    base_ = (low >> shift_) - 1;
    *window_ = uint16_t((0xFFFFu << (32 - shift_)) | base_);
  }
  // Encodes four vectors and returns the exponents, halved, of what will be decoded.
  EBBTIDE_INLINE void encode(int i, uint32_t word, UintLanes* halved) {
    IntLanes lifted[4];  // codes from the base on
    const int32_t lowest = int32_t(base_ + 1);
    for (int k = 0; k < 4; ++k) {
      const UintLanes bits = bits_[i + k];
      const UintLanes dither = words_at((i + k) * kLanes, word) >> (32 - shift_);
      const IntLanes rounded = (IntLanes)((bits + dither) >> shift_);
      lifted[k] = where(nonzero(bits), rounded > lowest ? rounded : lowest);
      halved[k] = ((UintLanes)lifted[k] << (shift_ - 1)) & 0x7F800000u;
    }
    store_above(codes_ + i * kLanes, lifted, base_);
  }
  void replace(const uint32_t* bits, const bool* moving) {
    Running running{};
    for (int j = 0; j < kBlock; j += kLanes) {
      UintLanes moves;
      for (int i = 0; i < kLanes; ++i) moves[i] = moving[j + i];
      const UintLanes here = load<UintLanes>(bits + j);
      put(j, running, here, nonzero(here), nonzero(moves));
    }
    settle(running);
  }

 private:
  uint8_t* codes_;
  uint16_t* window_;
  int shift_;
  uint32_t base_;
  UintLanes bits_[kVectors];
  UintLanes highest_, lowest_, lowest_moving_;
};

// Both moments in eight bits, and the maximum of the second where kCount is 3 (AMSGrad).
template <int kCount>
class Moments8 {
 public:
  static constexpr int kState = kCount;
  int8_t* codes;
  float* scale;
  Window8 second[kCount - 1];
  struct Running {
    float factor;
    Window8::Running second[kCount - 1];
    UintLanes largest{};
  };

  EBBTIDE_INLINE Running open() const {
    Running running{*scale * 0x1p64f, {}};
    for (int k = 0; k < kCount - 1; ++k) running.second[k] = second[k].open();
    return running;
  }
  EBBTIDE_INLINE void get(int j, const Running& running, Lanes* state) const {
    const UintLanes bits = second[0].get(j, running.second[0]);
    const Lanes code = to_float(load_wide(codes + j));
    const Lanes magnitude = from_bits(to_bits(code) & 0x7FFFFFFFu);
    state[0] = code * magnitude * running.factor * from_bits((bits >> 1) & 0x7F800000u);
    state[1] = from_bits(bits);
    if constexpr (kCount == 3) state[2] = from_bits(second[1].get(j, running.second[1]));
  }
  EBBTIDE_INLINE void put(int j, Running& running, const Lanes* state, uint32_t) {
    const Mask alive = lives(state[1]);
    const UintLanes bits = where(alive, to_bits(state[1]));
    const Lanes first = where(alive, state[0]);
    const Lanes ratio = first * from_bits(inverse_unit(bits));
    first_[j / kLanes] = first;
    running.largest = larger(running.largest, to_bits(ratio) & 0x7FFFFFFFu);
    const Mask moving = nonzero(ratio);
    second[0].put(j, running.second[0], bits, alive, moving);
    if constexpr (kCount == 3) {
      const Mask most_alive = lives(state[2]);
      const UintLanes most = where(most_alive, to_bits(state[2]));
      second[1].put(j, running.second[1], most, most_alive, moving);
    }
  }
  EBBTIDE_INLINE void prefetch() const {
    prefetch_block(codes);
    for (const Window8& window : second) window.prefetch();
  }
  EBBTIDE_INLINE void settle(const Running& running) {
    largest_ = running.largest;
    for (int k = 0; k < kCount - 1; ++k) second[k].settle(running.second[k]);
  }
  // Chooses scale and window of what has been put.
  EBBTIDE_INLINE void choose() {
    bool holds = largest(largest_) < kMostRatio;
    for (const Window8& window : second) holds &= window.holds();
    if (!holds) [[unlikely]]
      forget();
    for (Window8& window : second) window.choose();
    const float largest_ratio = from_bits(largest(largest_));
    const bool any_first = largest_ratio >= 0x1p-60f;
    *scale = any_first ? largest_ratio / 16129.0f : 0.0f;
    inverse_ = any_first ? 16128.9f / largest_ratio * 0x1p32f : 0.0f;
  }
  EBBTIDE_INLINE void encode(uint32_t word) {
    for (int i = 0; i < kVectors; i += 4) {
      UintLanes halved[4];
      IntLanes encoded[4];
      second[0].encode(i, word, halved);
      for (int k = 0; k < 4; ++k) {
        const UintLanes ratio = to_bits(first_[i + k] * from_bits(0x5F000000u - halved[k]));
        const Lanes root = sqrt(from_bits(ratio & 0x7FFFFFFFu) * inverse_);
        const Lanes code = from_bits(to_bits(root) | (ratio & 0x80000000u));
        const IntLanes dither = (IntLanes)(words_at((i + k) * kLanes, word) & 0xFFFFu);
        encoded[k] = truncate(code) + dither;
      }
      store_upper(codes + i * kLanes, encoded);
      if constexpr (kCount == 3) second[1].encode(i, word, halved);
    }
  }

 private:
  // Where a second moment does not count as zero.
  EBBTIDE_INLINE static Mask lives(Lanes x) { return above((IntLanes)to_bits(x), kSmallest - 1); }

  // What eight bits cannot hold is set to zero: it must not spoil the rest of the block.
  [[gnu::noinline, gnu::cold]] void forget() {
    float first[kBlock];
    uint32_t bits[kCount - 1][kBlock];
    bool moving[kBlock];
    for (int i = 0; i < kVectors; ++i) {
      store(first + i * kLanes, first_[i]);
      for (int k = 0; k < kCount - 1; ++k) store(bits[k] + i * kLanes, second[k].bits(i));
    }
    largest_ = UintLanes{};
    for (int j = 0; j < kBlock; ++j) {
      uint32_t ratio = 0;
      bool keeps = true;
      for (int k = 0; k < kCount - 1; ++k) {
        keeps &= bits[k][j] < 0x7F800000u;
        bits[k][j] = std::min(bits[k][j], kLargest);
      }
      if (bits[0][j] != 0) {
        ratio = to_bits(first[j] * from_bits(inverse_unit(bits[0][j]))) & 0x7FFFFFFFu;
      }
      keeps &= ratio < kMostRatio;
      if (!keeps) {
        for (int k = 0; k < kCount - 1; ++k) bits[k][j] = 0;
        first[j] = 0;
        ratio = 0;
      }
      moving[j] = ratio != 0;
      largest_[0] = std::max(uint32_t(largest_[0]), ratio);
    }
    for (int i = 0; i < kVectors; ++i) first_[i] = load<Lanes>(first + i * kLanes);
    for (int k = 0; k < kCount - 1; ++k) second[k].replace(bits[k], moving);
  }

  Lanes first_[kVectors];
  UintLanes largest_;
  float inverse_;
};

}  // namespace
}  // namespace ebbtide
