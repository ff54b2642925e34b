"""Every tolerance of the suite, each with its reason."""

from __future__ import annotations

# 30 steps of float32 against float64 with the same float32 gradients. A step rounds θ by half an
# ulp (6e-8 of θ ~ 1) and u by a few ulps of u ≤ 0.1; L2 and SGD feed θ back into the gradient.
FLOAT32_AGAINST_FLOAT64 = {"rtol": 3e-6, "atol": 3e-6}

# torch computes the same formulas in another order; both are float64 here.
TORCH_FLOAT64 = {"rtol": 1e-11, "atol": 1e-12}

# torch's scalar tail (numel mod 8 elements) contracts another product than its vector body.
TORCH_TAIL_ULP = 2

# The same in float32, seven steps: torch's loops round where the kernels fuse a product and a sum.
TORCH_FLOAT32 = {"rtol": 2e-6, "atol": 1e-7}

# With differentiable=True or capturable=True torch computes 1 - βᵗ from a float32 count: the
# scalars of a step, whatever the parameter's dtype, are good to 1e-6 or so (β2 = .999 at step 1:
# 1e-5).
TORCH_FLOAT32_SCALARS = {"rtol": 2e-5, "atol": 1e-7}

# Squares of float64 are added in chunks and then in order: some hundred roundings of 1e-16.
GRAD_NORM = {"rel": 1e-12}

# torch's float64 square root (MKL's) is now and then one ulp off; 30 steps, L2 feeds back.
TORCH_SQRT = {"rtol": 1e-14, "atol": 1e-15}

# Counted on a GPU: βᵗ is 2^(t·log2 β) there, 1e-15 of it at worst; a scalar rounded to float32 can
# then differ in its last bit, and three steps feed that back.
TRITON_DEVICE_SCALARS = {"rtol": 1e-6, "atol": 1e-8}

# Sums in another order than the CPU's: the clipping scale can differ in the last bit of float32.
TRITON_CLIPPED = {"rtol": 1e-6, "atol": 1e-8}
# Some tens of float32 steps through a model: what one ulp in a step makes of later gradients.
TRAINING_FLOAT32 = {"rtol": 1e-4, "atol": 1e-6}
