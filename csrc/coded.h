// Steps over rows that are not plain floats: one block of 128 elements at a time is decoded,
// updated and encoded again, all in lanes.
#pragma once
#include <cstring>

#include "moments.h"
#include "update.h"

namespace ebbtide {
namespace {

template <typename S, bool kPlain = false>
Scalars<S, kPlain> narrow(const StepScalars& s) {
  return {S(s.lr),
          S(1 - s.decay),
          S(s.l2),
          S(s.cautious),
          S(s.grad_scale),
          S(s.exp_avg_weight),
          S(s.beta2),
          S(s.one_minus_beta2),
          S(s.eps),
          S(s.step_size),
          S(s.sqrt_bias_correction2),
          S(s.momentum),
          S(s.buffer_keep),
          S(s.buffer_add),
          S(s.nesterov)};
}

template <typename V>
inline auto finite(V x) {
  return x - x == V{};
}

// Updates one block and leaves its state to be encoded; returns how many elements were left
// untouched.
template <class R, class P, class G, class S, class Numbers>
EBBTIDE_INLINE int64_t update_block(const P& param, const G& grad, S& state, Words words,
                                    const Numbers& s, bool guard) {
  int64_t untouched = 0;
  auto running = state.open();
  for (int j = 0; j < kBlock; j += kWide) {
    const Wide old_p = param.get(j);
    Wide new_p = old_p, old_state[S::kState + 1], new_state[S::kState + 1];
    state.get(j, running, old_state);
    for (int i = 0; i < S::kState; ++i) new_state[i] = old_state[i];
    const Wide witness = R::apply(new_p, grad.get(j), new_state, s);
    Mask fine = R::finite(witness.of[0]);
    for (int k = 1; k < kAbreast; ++k) fine &= R::finite(witness.of[k]);
    if (!all(fine) && guard) [[unlikely]] {
      for (int k = 0; k < kAbreast; ++k) {
        const Mask ok = R::finite(witness.of[k]);
        untouched += kLanes - count(ok);
        new_p.of[k] = choose(ok, new_p.of[k], old_p.of[k]);
        for (int i = 0; i < S::kState; ++i) {
          new_state[i].of[k] = choose(ok, new_state[i].of[k], old_state[i].of[k]);
        }
      }
    }
    state.put(j, running, new_state, words.state);
    param.put(j, new_p, words_at(j, words.param));
  }
  state.settle(running);
  return untouched;
}

// The arrays of a row: parameter, gradient, residual, state.
constexpr int kGrad = 1, kResidual = 2, kState = 3, kArrays = kState + kMaxState;

// The arrays of a row with the bytes of their elements; those a row lacks have none.
struct Arrays {
  char* data[kArrays];
  int bytes[kArrays];

  explicit Arrays(const Row& row, int states) {
    const Field* fields[kArrays] = {&row.param, &row.grad};
    for (int k = 0; k < states; ++k) fields[kState + k] = &row.state[k];
    for (int k = 0; k < kArrays; ++k) {
      data[k] = fields[k] == nullptr ? nullptr : static_cast<char*>(fields[k]->data);
      bytes[k] = fields[k] == nullptr ? 0 : bytes_of(fields[k]->format);
    }
    data[kResidual] = static_cast<char*>(row.residual);
    bytes[kResidual] = row.residual_bits / 8;
  }
  static int bytes_of(Format format) {
    constexpr int kBytes[] = {4, 8, 2, 2, 1, 1};
    return kBytes[int(format)];
  }
};

// A block that is not whole is stepped on a copy, with zeros around it.
class Staging {
 public:
  void copy_in(const Arrays& arrays, const Block& b, char** at) {
    for (int k = 0; k < kArrays; ++k) {
      if (arrays.bytes[k] == 0) continue;
      std::memset(copies_[k], 0, sizeof copies_[k]);
      std::memcpy(copies_[k] + b.first_lane * arrays.bytes[k],
                  arrays.data[k] + b.start * arrays.bytes[k], size_t(b.n * arrays.bytes[k]));
      at[k] = copies_[k];
    }
  }
  void copy_out(const Arrays& arrays, const Block& b) const {
    for (int k = 0; k < kArrays; ++k) {
      if (k == kGrad || arrays.bytes[k] == 0) continue;
      std::memcpy(arrays.data[k] + b.start * arrays.bytes[k],
                  copies_[k] + b.first_lane * arrays.bytes[k], size_t(b.n * arrays.bytes[k]));
    }
  }

 private:
  alignas(64) char copies_[kArrays][kBlock * sizeof(float)];
};

template <int kBits>
inline SplitStream<kBits> split_at(char* const* at) {
  using Residual = typename SplitStream<kBits>::Residual;
  return {reinterpret_cast<uint16_t*>(at[0]), reinterpret_cast<Residual*>(at[2])};
}
// Blocks that are updated before the first of them is encoded: how to encode one depends on all its
// elements, and the time that this takes to be known passes with the next one's arithmetic.
constexpr int kTogether = 4;

// The blocks [begin, end) of a row; `param_at(at)` and `grad_at(at)` make the streams of one block.
template <class R, bool kPlain, class State, class ParamAt, class GradAt>
int64_t step_blocks(const Row& row, const StepScalars& scalars, bool guard, int64_t begin,
                    int64_t end, const ParamAt& param_at, const GradAt& grad_at) {
  const auto s = narrow<float, kPlain>(scalars);
  const RowBits bits(uint64_t(scalars.seed), uint64_t(scalars.step), row.salt);
  const Arrays arrays(row, R::kState);
  State states[kTogether];
  Staging staging;
  int64_t untouched = 0;
  for (int64_t block = begin; block < end;) {
    const Block b = locate(row, block);
    const bool whole = b.n == kBlock;
    const int count = whole ? int(std::min({int64_t(kTogether), b.whole, end - block})) : 1;
    char* at[kArrays] = {};
    if (whole) {
      for (int k = 0; k < kArrays; ++k) at[k] = arrays.data[k] + b.start * arrays.bytes[k];
    } else {
      staging.copy_in(arrays, b, at);
    }
    Words words[kTogether];
    for (int i = 0; i < count; ++i) {
      words[i] = bits.of(b.index + i);
      states[i].place(row.state, at + kState, block + i);
      const auto param = param_at(at);
      const auto grad = grad_at(at);
      untouched += update_block<R>(param, grad, states[i], words[i], s, guard);
      if (whole) {
        param.prefetch();
        grad.prefetch();
        states[i].prefetch();
      }
      for (int k = 0; k < kArrays; ++k) at[k] += kBlock * arrays.bytes[k];
    }
    for (int i = 0; i < count; ++i) states[i].choose();
    for (int i = 0; i < count; ++i) states[i].encode(words[i].state);
    if (!whole) staging.copy_out(arrays, b);
    block += count;
  }
  return untouched;
}

}  // namespace
}  // namespace ebbtide
