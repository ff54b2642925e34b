// The kernels of one instruction set: blocks of rows → decode, update, encode.
//
// Compiled once for each instruction set with EBBTIDE_ISA naming it; the results differ only between
// builds with and without fma.
#include "step.h"

#include <type_traits>

#include "codec.h"
#include "update.h"

namespace ebbtide {
namespace {

template <typename S>
Scalars<S> narrow(const StepScalars& s) {
  return {S(s.lr),          S(1 - s.decay),
          S(s.l2),          S(s.cautious),
          S(s.grad_scale),  S(s.exp_avg_weight),
          S(s.beta2),       S(s.one_minus_beta2),
          S(s.eps),         S(s.step_size),
          S(s.sqrt_bias_correction2), S(s.momentum),
          S(s.buffer_keep), S(s.buffer_add),
          S(s.nesterov)};
}

// What a rule needs beside p and g: how many state streams, and which function.
struct Adam {
  static constexpr int kState = 2;
  template <typename V, typename S>
  static V apply(V& p, V g, V* state, const Scalars<S>& s) {
    return adam<V, S>(p, g, state[0], state[1], nullptr, s);
  }
};
struct AMSGrad {
  static constexpr int kState = 3;
  template <typename V, typename S>
  static V apply(V& p, V g, V* state, const Scalars<S>& s) {
    return adam<V, S>(p, g, state[0], state[1], &state[2], s);
  }
};
struct PlainSGD {
  static constexpr int kState = 0;
  template <typename V, typename S>
  static V apply(V& p, V g, V*, const Scalars<S>& s) {
    return sgd<V, S>(p, g, nullptr, s);
  }
};
struct MomentumSGD {
  static constexpr int kState = 1;
  template <typename V, typename S>
  static V apply(V& p, V g, V* state, const Scalars<S>& s) {
    return sgd<V, S>(p, g, &state[0], s);
  }
};

template <typename V>
inline auto finite(V x) {
  return x - x == V{};
}

// One V of elements: load, update, store; counts the elements left untouched.
template <class R, bool kGuard, typename V, typename S, typename Count>
inline void update_at(int64_t j, S* p, const S* g, S* const* state, const Scalars<S>& s,
                      Count& stepped) {
  const V old_p = load<V>(p + j);
  V new_p = old_p, old_state[R::kState + 1], new_state[R::kState + 1];
  for (int k = 0; k < R::kState; ++k) new_state[k] = old_state[k] = load<V>(state[k] + j);
  const V witness = R::template apply<V, S>(new_p, load<V>(g + j), new_state, s);
  if constexpr (kGuard) {
    const auto ok = finite(witness);
    if constexpr (std::is_same_v<V, S>) {
      stepped += ok;
    } else {
      stepped -= ok;  // lanes compare to -1
    }
    new_p = ok ? new_p : old_p;
    for (int k = 0; k < R::kState; ++k) new_state[k] = ok ? new_state[k] : old_state[k];
  }
  store(p + j, new_p);
  for (int k = 0; k < R::kState; ++k) store(state[k] + j, new_state[k]);
}

// One kB ahead: what one core's outstanding misses need (docs/log.md); a prefetch past the end is ignored.
constexpr int64_t kAhead = 1024;

template <typename T>
inline void prefetch(const T* at) {
  __builtin_prefetch(reinterpret_cast<const char*>(at) + kAhead);
}

// n consecutive elements; returns how many were left untouched.
template <class R, bool kGuard, typename S>
int64_t update_span(S* __restrict p, const S* __restrict g, S* const* state, int64_t n,
                    const Scalars<S> s) {
  using V = std::conditional_t<std::is_same_v<S, float>, Lanes, DoubleLanes>;
  constexpr int64_t kLine = 64 / sizeof(S), kStride = sizeof(V) / sizeof(S);
  S* const streams[3] = {state[0], state[1], state[2]};
  auto stepped_lanes = V{} != V{};
  int64_t stepped = 0, j = 0;
  for (; j + kLine <= n; j += kLine) {
    prefetch(p + j);
    prefetch(g + j);
    for (int k = 0; k < R::kState; ++k) prefetch(streams[k] + j);
    for (int64_t i = 0; i < kLine; i += kStride) {
      update_at<R, kGuard, V, S>(j + i, p, g, streams, s, stepped_lanes);
    }
  }
  for (; j < n; ++j) update_at<R, kGuard, S, S>(j, p, g, streams, s, stepped);
  if constexpr (!kGuard) return 0;
  for (int i = 0; i < int(kStride); ++i) stepped += stepped_lanes[i];
  return n - stepped;
}

// Blocks whose formats are not float: decode into L1, update, encode.
template <class R, bool kGuard>
int64_t update_coded(const Row& row, const StepScalars& scalars, int64_t begin, int64_t end) {
  const Scalars<float> s = narrow<float>(scalars);
  const uint64_t key = row_key(uint64_t(scalars.seed), uint64_t(scalars.step), row.salt);
  alignas(64) float buffers[2 + kMaxState][kBlock];
  int64_t untouched = 0;
  for (int64_t block = begin; block < end; ++block) {
    const Block b = locate(row, block);
    const uint64_t bits = block_bits(key, uint64_t(b.index));
    float* p = open(row.param, b, buffers[0]);
    const float* g = open(row.grad, b, buffers[1]);
    float* state[kMaxState] = {};
    for (int k = 0; k < R::kState; ++k) state[k] = open(row.state[k], b, buffers[2 + k]);
    untouched += update_span<R, kGuard, float>(p, g, state, b.n, s);
    close(row.param, b, p, {uint32_t(bits), row.stochastic});
    // The first moment is rounded to nearest; moments of squares would stall that way (a step
    // of β2 = .999 is below half an ulp of bfloat16), so they are rounded stochastically.
    for (int k = 0; k < R::kState; ++k) {
      close(row.state[k], b, state[k], {uint32_t(bits >> 32), k > 0});
    }
  }
  return untouched;
}

template <class R, bool kGuard>
int64_t update_row(const Row& row, const StepScalars& scalars, int64_t begin, int64_t end) {
  bool direct = row.grad.format == row.param.format;
  for (int k = 0; k < R::kState; ++k) direct &= row.state[k].format == row.param.format;
  const int64_t from = first_element(row, begin), n = first_element(row, end) - from;
  const auto span = [&](auto zero) {
    using S = decltype(zero);
    S* state[kMaxState] = {};
    for (int k = 0; k < R::kState; ++k) state[k] = static_cast<S*>(row.state[k].data) + from;
    return update_span<R, kGuard, S>(static_cast<S*>(row.param.data) + from,
                                     static_cast<const S*>(row.grad.data) + from, state, n,
                                     narrow<S>(scalars));
  };
  if (direct && row.param.format == Format::kF32) return span(0.0f);
  if (direct && row.param.format == Format::kF64) return span(0.0);
  return update_coded<R, kGuard>(row, scalars, begin, end);
}

template <class R>
int64_t update_rule(const Row& row, const StepScalars& s, bool guard, int64_t begin, int64_t end) {
  return guard ? update_row<R, true>(row, s, begin, end) : update_row<R, false>(row, s, begin, end);
}

int64_t update(Rule rule, const Row& row, const StepScalars& s, bool guard, int64_t begin,
               int64_t end) {
  if (rule == Rule::kAdam) {
    return row.state[2].data != nullptr ? update_rule<AMSGrad>(row, s, guard, begin, end)
                                        : update_rule<Adam>(row, s, guard, begin, end);
  }
  return row.state[0].data != nullptr ? update_rule<MomentumSGD>(row, s, guard, begin, end)
                                      : update_rule<PlainSGD>(row, s, guard, begin, end);
}

// Element j goes to accumulator j mod 16 on every instruction set, so the sum has the same bits.
template <typename T>
double sum_squares_of(const T* g, int64_t n) {
  using Narrow = std::conditional_t<std::is_same_v<T, float>, HalfLanes, DoubleLanes>;
  constexpr int kWidth = sizeof(DoubleLanes) / sizeof(double), kSums = 16 / kWidth;
  DoubleLanes sums[kSums] = {};
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) {
    prefetch(g + j);
    for (int k = 0; k < kSums; ++k) {
      const DoubleLanes x = widen(load<Narrow>(g + j + k * kWidth));
      sums[k] += x * x;
    }
  }
  double flat[16];
  for (int i = 0; i < 16; ++i) flat[i] = sums[i / kWidth][i % kWidth];
  for (; j < n; ++j) flat[j % 16] += double(g[j]) * double(g[j]);
  double total = 0;
  for (const double sum : flat) total += sum;
  return total;
}

double sum_squares(const Row& row, int64_t begin, int64_t end) {
  if (row.grad.format == Format::kF32 || row.grad.format == Format::kF64) {
    const int64_t from = first_element(row, begin), n = first_element(row, end) - from;
    if (row.grad.format == Format::kF64) {
      return sum_squares_of(static_cast<const double*>(row.grad.data) + from, n);
    }
    return sum_squares_of(static_cast<const float*>(row.grad.data) + from, n);
  }
  alignas(64) float buffer[kBlock];
  double total = 0;
  for (int64_t block = begin; block < end; ++block) {
    const Block b = locate(row, block);
    total += sum_squares_of(open(row.grad, b, buffer), b.n);
  }
  return total;
}

}  // namespace

#define EBBTIDE_JOIN_(a, b) a##b
#define EBBTIDE_JOIN(a, b) EBBTIDE_JOIN_(a, b)
#define EBBTIDE_STRING_(a) #a
#define EBBTIDE_STRING(a) EBBTIDE_STRING_(a)
const Kernels EBBTIDE_JOIN(kernels_, EBBTIDE_ISA) = {EBBTIDE_STRING(EBBTIDE_ISA), update,
                                                     sum_squares};

}  // namespace ebbtide
