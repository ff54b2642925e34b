// The kernels of one instruction set: blocks of rows → decode, update, encode.
//
// Compiled once for each instruction set with EBBTIDE_ISA naming it; the results differ only
// between builds with and without fma.
#include "step.h"

#include <type_traits>

#include "coded.h"
#include "update.h"

namespace ebbtide {
namespace {

// What a rule needs beside p and g: how many state streams, and which function. The witness of Adam
// is a sum of squares, never negative.
struct Adam {
  static constexpr int kState = 2;
  template <typename V, class Numbers>
  EBBTIDE_INLINE static V apply(V& p, V g, V* state, const Numbers& s) {
    return adam<V>(p, g, state[0], state[1], nullptr, s);
  }
  EBBTIDE_INLINE static Mask finite(Lanes witness) { return below(witness, infinity()); }
};
struct AMSGrad {
  static constexpr int kState = 3;
  template <typename V, class Numbers>
  EBBTIDE_INLINE static V apply(V& p, V g, V* state, const Numbers& s) {
    return adam<V>(p, g, state[0], state[1], &state[2], s);
  }
  EBBTIDE_INLINE static Mask finite(Lanes witness) { return below(witness, infinity()); }
};
struct PlainSGD {
  static constexpr int kState = 0;
  template <typename V, class Numbers>
  EBBTIDE_INLINE static V apply(V& p, V g, V*, const Numbers& s) {
    return sgd<V>(p, g, static_cast<V*>(nullptr), s);
  }
  EBBTIDE_INLINE static Mask finite(Lanes witness) { return below(magnitude(witness), infinity()); }
};
struct MomentumSGD {
  static constexpr int kState = 1;
  template <typename V, class Numbers>
  EBBTIDE_INLINE static V apply(V& p, V g, V* state, const Numbers& s) {
    return sgd<V>(p, g, &state[0], s);
  }
  EBBTIDE_INLINE static Mask finite(Lanes witness) { return below(magnitude(witness), infinity()); }
};

// One V of elements: load, update, store; counts the elements left untouched.
template <class R, bool kGuard, typename V, typename S, typename Count>
EBBTIDE_INLINE void update_at(int64_t j, S* p, const S* g, S* const* state, const Scalars<S>& s,
                              Count& stepped) {
  const V old_p = load<V>(p + j);
  V new_p = old_p, old_state[R::kState + 1], new_state[R::kState + 1];
  for (int k = 0; k < R::kState; ++k) new_state[k] = old_state[k] = load<V>(state[k] + j);
  const V witness = R::apply(new_p, load<V>(g + j), new_state, s);
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

// One kB ahead: what one core's outstanding misses need (docs/log.md); a prefetch past the end is
// ignored.
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

// A row of any formats, decided at run time; slower.
template <class R>
int64_t update_any(const Row& row, const StepScalars& scalars, bool guard, int64_t begin,
                   int64_t end) {
  const auto param = [&](char* const* at) {
    return AnyStream{at[0], row.param.format, row.stochastic, at[2], row.residual_bits};
  };
  const auto grad = [&](char* const* at) { return AnyStream{at[1], row.grad.format, false}; };
  if constexpr (R::kState >= 2) {
    if (row.state[0].format == Format::kSigned8) {
      return step_blocks<R, false, Moments8<R::kState>>(row, scalars, guard, begin, end, param,
                                                        grad);
    }
  }
  using State = Elementwise<AnyStream, AnyStream, R::kState>;
  return step_blocks<R, false, State>(row, scalars, guard, begin, end, param, grad);
}

// The streams of the usual formats: everything is known when this is compiled.
template <bool kPlain, class ParamAt, class Grad>
int64_t update_usual(const Row& row, const StepScalars& scalars, bool guard, int64_t begin,
                     int64_t end, const ParamAt& param_at, Grad) {
  const auto grad_at = [](char* const* at) {
    return Grad{reinterpret_cast<decltype(Grad::at)>(at[1])};
  };
  const auto blocks = [&]<class State>(std::type_identity<State>) {
    return step_blocks<Adam, kPlain, State>(row, scalars, guard, begin, end, param_at, grad_at);
  };
  if (row.state[0].format == Format::kSigned8) return blocks(std::type_identity<Moments8<2>>());
  if (row.state[0].format == Format::kBF16) {
    return blocks(std::type_identity<Elementwise<BFloatStream<false>, BFloatStream<true>, 2>>());
  }
  return blocks(std::type_identity<Elementwise<FloatStream, FloatStream, 2>>());
}

// Blocks whose formats are not float: decode, update, encode.
template <class R>
int64_t update_coded(const Row& row, const StepScalars& scalars, bool guard, int64_t begin,
                     int64_t end) {
  if constexpr (std::is_same_v<R, Adam>) {
    const bool alike =
        row.state[0].format == row.state[1].format || row.state[0].format == Format::kSigned8;
    const bool known = row.state[0].format != Format::kF16 && row.param.format == row.grad.format;
    if (alike && known) {
      const auto usual = [&](const auto& param_at, auto grad) {
        return narrow<float>(scalars).plain()
                   ? update_usual<true>(row, scalars, guard, begin, end, param_at, grad)
                   : update_usual<false>(row, scalars, guard, begin, end, param_at, grad);
      };
      if (row.param.format == Format::kF32) {
        return usual([](char* const* at) { return FloatStream{reinterpret_cast<float*>(at[0])}; },
                     FloatStream{});
      }
      if (row.param.format == Format::kBF16) {
        if (row.residual_bits == 8) {
          return usual([](char* const* at) { return split_at<8>(at); }, BFloatStream<false>{});
        }
        if (row.residual_bits == 16) {
          return usual([](char* const* at) { return split_at<16>(at); }, BFloatStream<false>{});
        }
        if (row.stochastic) {
          return usual(
              [](char* const* at) {
                return BFloatStream<true>{reinterpret_cast<uint16_t*>(at[0])};
              },
              BFloatStream<false>{});
        }
      }
    }
  }
  return update_any<R>(row, scalars, guard, begin, end);
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
  return update_coded<R>(row, scalars, kGuard, begin, end);
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
    const uint16_t* from = static_cast<const uint16_t*>(row.grad.data) + b.start;
    const bool half = row.grad.format == Format::kF16;
    for (int j = 0; j < b.n; ++j) buffer[j] = half ? f16_to_float(from[j]) : bf16_to_float(from[j]);
    total += sum_squares_of(buffer, b.n);
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
