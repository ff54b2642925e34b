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

  void place(const Field* state, char* const* at, int64_t) {
    if constexpr (kCount > 0) first.place(at[0], state[0].format, false);
    for (int k = 1; k < kCount; ++k) second[k - 1].place(at[k], state[k].format, true);
  }
  EBBTIDE_INLINE Running open() { return {}; }
  EBBTIDE_INLINE void prefetch() const {
    if constexpr (kCount > 0) first.prefetch();
    for (int k = 1; k < kCount; ++k) second[k - 1].prefetch();
  }
  EBBTIDE_INLINE void get(int j, const Running&, Wide* state) const {
    if constexpr (kCount > 0) state[0] = first.get(j);
    for (int k = 1; k < kCount; ++k) state[k] = second[k - 1].get(j);
  }
  EBBTIDE_INLINE void put(int j, Running&, const Wide* state, uint32_t word) {
    const WideBits words = words_at(j, word);
    if constexpr (kCount > 0) first.put(j, state[0], words);
    for (int k = 1; k < kCount; ++k) second[k - 1].put(j, state[k], words);
  }
  EBBTIDE_INLINE void settle(const Running&) {}
  EBBTIDE_INLINE void choose() {}
  EBBTIDE_INLINE void encode(uint32_t) {}
};

constexpr uint32_t kSmallest = 1u << 24;      // bits of v; what is below counts as zero
constexpr uint32_t kLargest = 0x7E800000u;    // bits of v that still round up to a finite number
constexpr uint32_t kDormant = 28u << 23;      // how far below the largest v dormant elements count
constexpr uint32_t kMostRatio = 0x5F800000u;  // bits of the first m/S too large to keep

// 1/S of the number with these bits: S is the power of two nearest its root.
EBBTIDE_INLINE UintLanes inverse_unit(UintLanes bits) {
  return 0x5F000000u - ((bits >> 1) & 0x7F800000u);
}
EBBTIDE_INLINE uint32_t inverse_unit(uint32_t bits) {
  return 0x5F000000u - ((bits >> 1) & 0x7F800000u);
}

// The numbers that the codes of one window stand for, by their bits: code c for
// base + c + min(c, coarse), times 2^shift.
struct Grid {
  int shift = 16;
  uint32_t base = 0, coarse = 0;

  Grid() = default;
  EBBTIDE_INLINE explicit Grid(uint16_t window) {
    shift = 16 + std::min(std::countl_one(window), 7);
    coarse = (window >> (23 - shift)) & (256 - (256 >> unit()));
    base = (window << unit()) & ((1u << (31 - shift)) - 1);
  }
  // The finest that holds the numbers from lowest to highest.
  EBBTIDE_INLINE Grid(uint32_t lowest, uint32_t highest) {
    shift = std::max(int(std::bit_width(highest - lowest)) - 9, 16);
    shift += (highest >> shift) - (lowest >> shift) > 509u - (1u << unit()) - (256u >> unit());
    base = ((lowest >> shift) - 2) & -(1u << unit());
    const int missing = std::max(int((highest >> shift) - base) - 254, 0);
    coarse = (uint32_t(missing) + (256u >> unit()) - 1) & -(256u >> unit());
  }
  EBBTIDE_INLINE uint16_t window() const {
    return uint16_t((0xFFFFu << (32 - shift)) | coarse << (23 - shift) | base >> unit());
  }
  EBBTIDE_INLINE UintLanes at(UintLanes codes) const {
    return (codes + smaller(codes, splat_bits(coarse)) + base) << shift;
  }

 private:
  // The base is counted by 2^unit steps, which make a factor of four at most, and the coarse codes
  // by 2^(8 - unit).
  int unit() const { return std::min(24 - shift, 4); }
};

// A second moment in eight bits: codes on the float's own bits.
class Window8 {
 public:
  // What a block's loop goes by and gathers; apart from the rest, so that it stays in registers.
  struct Running {
    Grid grid;
    UintLanes highest{}, lowest = ~UintLanes{};
  };

  void place(char* codes, void* windows, int64_t block) {
    codes_ = reinterpret_cast<uint8_t*>(codes);
    window_ = static_cast<uint16_t*>(windows) + block;
  }
  EBBTIDE_INLINE Running open() const { return {Grid(*window_)}; }
  EBBTIDE_INLINE WideBits get(int j, const Running& running) const {
    return each_from(j, [&](int i) {
      const UintLanes codes = load_wide(codes_ + i);
      return where(nonzero(codes), running.grid.at(codes));
    });
  }
  EBBTIDE_INLINE void put(int j, Running& running, const WideBits& bits) {
    store(bits_ + j, bits);
    for (int k = 0; k < kAbreast; ++k) {
      running.highest = larger(running.highest, bits.of[k]);
      running.lowest = smaller(running.lowest, bits.of[k]);
    }
  }
  EBBTIDE_INLINE void settle(uint32_t highest, uint32_t lowest) {
    highest_ = highest;
    lowest_ = lowest;
  }
  EBBTIDE_INLINE void prefetch() const { prefetch_block(codes_); }
  bool holds() const { return highest_ <= kLargest; }
  bool lives() const { return lowest_ >= kSmallest; }

  // Chooses the window from the lowest element that counts.
  EBBTIDE_INLINE void choose() {
    grid_ = highest_ == 0 ? Grid() : Grid(lowest_, highest_);
    *window_ = grid_.window();
  }
  // Encodes four vectors, and returns the exponents, halved, of what will be decoded.
  template <bool kOrdinary>
  EBBTIDE_INLINE void encode(int j, const UintLanes* words, UintLanes* halved) {
    const Grid grid = grid_;
    const UintLanes edge = splat_bits((grid.base + 2 * grid.coarse) << grid.shift);
    const UintLanes least = splat_bits((grid.base + 2) << grid.shift);
    UintLanes steps[4];
    for (int k = 0; k < 4; ++k) {
      const UintLanes bits = load<UintLanes>(bits_ + j + k * kLanes);
      const UintLanes dither = words[k] >> (32 - grid.shift);
      UintLanes kept = smaller(bits + 2 * dither, larger(bits + dither, edge));
      if (!kOrdinary) kept = where(nonzero(bits), larger(kept, least));
      steps[k] = kept >> grid.shift;
      halved[k] = (kept >> 1) & 0x7F800000u;
    }
    store_codes(codes_ + j, steps, grid.base, grid.coarse);
  }
  uint32_t* bits() { return bits_; }
  // Gathers anew: elements that count as zero become zero, and what rests counts within kDormant of
  // the largest only. `moving` has lanes that are not zero.
  void gather(const UintLanes* moving) {
    UintLanes highest{}, lowest = ~UintLanes{}, lowest_moving = lowest;
    for (int i = 0; i < kBlock; i += kLanes) {
      const UintLanes found = load<UintLanes>(bits_ + i);
      const Mask alive = above((IntLanes)found, kSmallest - 1);
      const UintLanes bits = where(alive, found);
      store(bits_ + i, bits);
      highest = larger(highest, bits);
      lowest = smaller(alive, lowest, bits);
      lowest_moving = smaller(nonzero(where(alive, moving[i / kLanes])), lowest_moving, bits);
    }
    highest_ = largest(highest);
    const uint32_t floor = highest_ - std::min(highest_, kDormant);
    lowest_ = std::min({smallest(lowest_moving), std::max(smallest(lowest), floor), highest_});
  }

 private:
  uint8_t* codes_;
  uint16_t* window_;
  Grid grid_;
  uint32_t highest_, lowest_;
  alignas(64) uint32_t bits_[kBlock];
};

// Both moments in eight bits, and the maximum of the second where kCount is 3 (AMSGrad).
template <int kCount>
class Moments8 {
 public:
  static constexpr int kState = kCount;
  struct Running {
    float factor;
    Window8::Running second[kCount - 1];
    UintLanes largest{}, least = ~UintLanes{};  // of |m/S|
  };

  void place(const Field* state, char* const* at, int64_t block) {
    codes_ = reinterpret_cast<int8_t*>(at[0]);
    scale_ = static_cast<float*>(state[0].scale) + block;
    for (int k = 1; k < kCount; ++k) second_[k - 1].place(at[k], state[k].scale, block);
  }
  EBBTIDE_INLINE Running open() const {
    Running running{*scale_ * 0x1p64f, {}};
    for (int k = 0; k < kCount - 1; ++k) running.second[k] = second_[k].open();
    return running;
  }
  EBBTIDE_INLINE void get(int j, const Running& running, Wide* state) const {
    const WideBits bits = second_[0].get(j, running.second[0]);
    const Wide code = each_from(j, [&](int i) { return to_float(load_wide(codes_ + i)); });
    state[0] = each(
        [&](Lanes q, UintLanes v) {
          return q * magnitude(q) * running.factor * from_bits((v >> 1) & 0x7F800000u);
        },
        code, bits);
    state[1] = floats(bits);
    if constexpr (kCount == 3) state[2] = floats(second_[1].get(j, running.second[1]));
  }
  EBBTIDE_INLINE void put(int j, Running& running, const Wide* state, uint32_t) {
    store(first_ + j, state[0]);
    for (int k = 0; k < kAbreast; ++k) {
      const UintLanes unit = inverse_unit(to_bits(state[1].of[k]));
      const UintLanes ratio = to_bits(magnitude(state[0].of[k] * from_bits(unit)));
      running.largest = larger(running.largest, ratio);
      running.least = smaller(running.least, ratio);
    }
    for (int k = 1; k < kCount; ++k) {
      second_[k - 1].put(j, running.second[k - 1],
                         each([](Lanes v) { return to_bits(v); }, state[k]));
    }
  }
  EBBTIDE_INLINE void prefetch() const {
    prefetch_block(codes_);
    for (const Window8& window : second_) window.prefetch();
  }
  EBBTIDE_INLINE void settle(const Running& running) {
    ordinary_ = all(nonzero(running.least));
    for (int k = 0; k < kCount - 1; ++k) {
      const auto& window = running.second[k];
      const Maxima found = maxima(window.highest, ~window.lowest, running.largest);
      second_[k].settle(found.a, ~found.b);
      ordinary_ &= second_[k].lives() && second_[k].holds();
      largest_ = found.c;
    }
    ordinary_ &= largest_ < kMostRatio;
  }
  // Chooses scale and windows of what has been put.
  EBBTIDE_INLINE void choose() {
    if (!ordinary_) [[unlikely]]
      tell_apart();
    for (Window8& window : second_) window.choose();
    const float largest_ratio = from_bits(largest_);
    const bool any_first = largest_ratio >= 0x1p-60f;
    *scale_ = any_first ? largest_ratio / 16129.0f : 0.0f;
    inverse_ = any_first ? 16128.9f / largest_ratio * 0x1p32f : 0.0f;
  }
  EBBTIDE_INLINE void encode(uint32_t word) {
    if (ordinary_) [[likely]] {
      encode_as<true>(word);
    } else {
      encode_as<false>(word);
    }
  }

 private:
  EBBTIDE_INLINE static Wide floats(const WideBits& bits) {
    return each([](UintLanes x) { return from_bits(x); }, bits);
  }
  template <bool kOrdinary>
  EBBTIDE_INLINE void encode_as(uint32_t word) {
    for (int j = 0; j < kBlock; j += 4 * kLanes) {
      UintLanes words[4], halved[4];
      IntLanes codes[4];
      for (int k = 0; k < 4; ++k) words[k] = word_at(j + k * kLanes, word);
      second_[0].template encode<kOrdinary>(j, words, halved);
      for (int k = 0; k < 4; ++k) {
        const Lanes first = load<Lanes>(first_ + j + k * kLanes);
        const UintLanes ratio = to_bits(first * from_bits(0x5F000000u - halved[k]));
        const Lanes root = sqrt(magnitude(from_bits(ratio)) * inverse_);
        const Lanes signed_root = from_bits(to_bits(root) | (ratio & 0x80000000u));
        codes[k] = truncate(signed_root) + (IntLanes)(words[k] & 0xFFFFu);
      }
      store_upper(codes_ + j, codes);
      if constexpr (kCount == 3) second_[1].template encode<kOrdinary>(j, words, halved);
    }
  }

  // A block with elements that count as zero, that rest or cannot be held.
  [[gnu::noinline]] void tell_apart() {
    bool holds = largest_ < kMostRatio;
    for (const Window8& window : second_) holds &= window.holds();
    if (!holds) [[unlikely]]
      forget();
    UintLanes most{}, ratios[kVectors];
    for (int i = 0; i < kBlock; i += kLanes) {
      const UintLanes bits = load<UintLanes>(second_[0].bits() + i);
      const Lanes first = where(above((IntLanes)bits, kSmallest - 1), load<Lanes>(first_ + i));
      const UintLanes ratio = to_bits(magnitude(first * from_bits(inverse_unit(bits))));
      store(first_ + i, first);
      most = larger(most, ratio);
      ratios[i / kLanes] = ratio;
    }
    largest_ = largest(most);
    for (Window8& window : second_) window.gather(ratios);
  }
  // Sets to zero what eight bits cannot hold: it must not spoil the rest of the block.
  [[gnu::noinline, gnu::cold]] void forget() {
    for (int i = 0; i < kBlock; ++i) {
      const uint32_t unit = inverse_unit(second_[0].bits()[i]);
      bool keeps = (to_bits(first_[i] * from_bits(unit)) & 0x7FFFFFFFu) < kMostRatio;
      for (Window8& window : second_) keeps &= window.bits()[i] < 0x7F800000u;
      for (Window8& window : second_) {
        window.bits()[i] = keeps ? std::min(window.bits()[i], kLargest) : 0;
      }
      if (!keeps) first_[i] = 0;
    }
  }

  int8_t* codes_;
  float* scale_;
  Window8 second_[kCount - 1];
  bool ordinary_;  // every element can be held, lives and moves
  uint32_t largest_;
  float inverse_;
  alignas(64) float first_[kBlock];
};

}  // namespace
}  // namespace ebbtide
