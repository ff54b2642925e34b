// The contract between the binding and the kernels: rows of pointers, counts, scalars.
//
// A row is one parameter with its gradient and state. The gradient is read only, nothing outside
// the given rows is written, and results do not depend on how blocks are shared among threads.
#pragma once
#include <cstdint>

namespace ebbtide {

enum class Format : int32_t { kF32, kF64, kBF16, kF16, kSigned8, kWindow8 };
enum class Rule : int32_t { kAdam, kSGD };
constexpr int kMaxState = 3;

struct Field {
  void* data = nullptr;
  void* scale = nullptr;  // beside 8-bit codes: one entry a block
  Format format = Format::kF32;
};

struct Row {
  Field param;
  Field grad;
  Field state[kMaxState];    // exp_avg, exp_avg_sq, max_exp_avg_sq; or momentum_buffer
  void* residual = nullptr;  // low bits of a 16-bit parameter
  int32_t residual_bits = 0;
  bool stochastic = false;  // round the parameter, or the last bit of its residual, stochastically
  int64_t numel = 0;
  // Blocks of 128 elements never cross a run of `run_length` elements (an index of the first
  // dimension where state is blockwise, the whole parameter elsewhere); a shard that starts inside
  // a block of the whole parameter has `lead` elements before it, and `first_block` blocks.
  int64_t run_length = 0;
  int64_t lead = 0;
  int64_t first_block = 0;
  uint64_t salt = 0;

  int64_t blocks_per_run() const { return (lead + run_length + 127) / 128; }
  int64_t blocks() const { return run_length > 0 ? numel / run_length * blocks_per_run() : 0; }
};

// The scalars as Python computes them, float64; rules.py has the same fields in the same order.
struct StepScalars {
  double lr, decay, l2, cautious, grad_scale, exp_avg_weight, beta2, one_minus_beta2, eps,
      step_size, sqrt_bias_correction2, momentum, buffer_keep, buffer_add, nesterov, step, seed;
};
constexpr int kScalarCount = sizeof(StepScalars) / sizeof(double);

// One instruction set's kernels; [begin, end) counts the row's blocks.
struct Kernels {
  const char* name;
  // Steps the blocks; returns how many elements were left as they were because the new state would
  // not be finite (guard), or 0.
  int64_t (*update)(Rule, const Row&, const StepScalars&, bool guard, int64_t begin, int64_t end);
  // Sum of squares of the gradient, in float64, in an order fixed by the element's place.
  double (*sum_squares)(const Row&, int64_t begin, int64_t end);
};

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace ebbtide
