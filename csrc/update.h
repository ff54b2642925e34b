// The update rules on one element, in the order of src/ebbtide/reference.py.
//
// V is the type of the arithmetic: double, float, lanes of float, or several vectors of them
// abreast; S is the type of the scalars. `madd`, `sqrt` and `pick`, which chooses by element, are
// the only primitives (lanes.h, abreast.h). Where float kernels contract (madd), they do so exactly
// where torch's fused CPU kernels do, so that the two agree bit for bit; for double madd never
// contracts and the result equals reference.py bit for bit. Build with -ffp-contract=off.
//
// Each rule returns a witness that, of state that steps have made, is finite if and only if the
// new state is: the kernel leaves elements with a non-finite witness as they were.
#pragma once
#include "lanes.h"

namespace ebbtide {

// The scalars of one step for one group and step count; the fields of rules.py's Scalars. A kernel
// for plain steps only (kPlain) is spared the questions.
template <typename S, bool kPlain = false>
struct Scalars {
  S lr;
  S keep;  // 1 - decay: the share of the parameter kept
  S l2;
  S cautious;
  S grad_scale;
  S exp_avg_weight;
  S beta2;
  S one_minus_beta2;
  S eps;
  S step_size;
  S sqrt_bias_correction2;
  S momentum;
  S buffer_keep;
  S buffer_add;
  S nesterov;

  bool plain() const {
    return l2 == 0 && cautious == 0 && eps > 0 && sqrt_bias_correction2 > 0 && weighs_little();
  }
  bool has_l2() const { return !kPlain && l2 != 0; }
  bool is_cautious() const { return !kPlain && cautious != 0; }
  bool may_divide_by_zero() const { return !kPlain; }
  bool weighs_little() const { return kPlain || exp_avg_weight < S(0.5); }
};

template <typename V, typename S, bool kPlain>
EBBTIDE_INLINE V decayed(V param, V update, const Scalars<S, kPlain>& s) {
  const V kept = param * s.keep;
  if (s.is_cautious()) return pick(update * param < splat<V>(S(0)), param, kept);
  return kept;
}

// Adam, AdamW; AMSGrad where max_exp_avg_sq is not null.
template <typename V, typename S, bool kPlain>
EBBTIDE_INLINE V adam(V& param, V grad, V& exp_avg, V& exp_avg_sq, V* max_exp_avg_sq,
                      const Scalars<S, kPlain>& s) {
  grad = grad * s.grad_scale;
  if (s.has_l2()) grad = madd(splat<V>(s.l2), param, grad);
  const S weight = s.exp_avg_weight;
  if (s.weighs_little()) {
    exp_avg = madd(splat<V>(weight), grad - exp_avg, exp_avg);
  } else {
    exp_avg = madd(splat<V>(weight - S(1)), grad - exp_avg, grad);
  }
  exp_avg_sq = madd(s.one_minus_beta2 * grad, grad, s.beta2 * exp_avg_sq);
  V second_moment = exp_avg_sq;
  if (max_exp_avg_sq != nullptr) {
    second_moment = pick(*max_exp_avg_sq < exp_avg_sq, exp_avg_sq, *max_exp_avg_sq);
    *max_exp_avg_sq = second_moment;
  }
  const V denom = sqrt(second_moment) / s.sqrt_bias_correction2 + s.eps;
  const V zero = splat<V>(S(0));
  const V quotient = s.step_size * exp_avg / denom;
  const V update = s.may_divide_by_zero() ? pick(denom == zero, zero, quotient) : quotient;
  param = decayed(param, update, s) - update;
  return exp_avg_sq;
}

// SGD, SGDW; momentum_buffer is null without momentum.
template <typename V, typename S, bool kPlain>
EBBTIDE_INLINE V sgd(V& param, V grad, V* momentum_buffer, const Scalars<S, kPlain>& s) {
  grad = grad * s.grad_scale;
  if (s.has_l2()) grad = madd(splat<V>(s.l2), param, grad);
  V direction = grad;
  if (momentum_buffer != nullptr) {
    V& buffer = *momentum_buffer;
    buffer = madd(splat<V>(s.buffer_add), grad, s.buffer_keep * buffer);
    direction = s.nesterov != 0 ? madd(splat<V>(s.momentum), buffer, grad) : buffer;
  }
  const V kept = decayed(param, s.lr * direction, s);
  param = madd(splat<V>(-s.lr), direction, kept);
  return direction;
}

}  // namespace ebbtide
