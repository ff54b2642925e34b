"""How many bytes the state of a parameter takes, and in which format it is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ebbtide.codecs import MASTER_FORMATS, STATE_FORMATS
from ebbtide.groups.kinds import is_embedding
from ebbtide.groups.records import ParamInfo

__all__ = [
    "ELEMENT_BYTES",
    "MASTER_FORMATS",
    "SMALL_NUMEL",
    "STATE_FORMATS",
    "embedding_names",
    "is_embedding_of_group",
    "master_format_for",
    "moments_of_group",
    "param_state_bytes",
    "state_bytes",
    "state_format_for",
]

# Low-bit state of fewer elements saves nothing worth its error.
SMALL_NUMEL = 4096
# Each index of the first dimension has scales of its own; shorter ones save too little.
_SHORTEST_RUN = 16

ELEMENT_BYTES: Mapping[str, int] = {
    "float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "complex32": 4, "complex64": 8,
    "complex128": 16, "8bit": 1,
}  # fmt: skip

_BLOCK = 128
_SCALE_BYTES = (4, 2, 2)  # beside each block of 8-bit codes: first moment, second, its maximum
_RESIDUAL_BYTES: Mapping[str, int] = {"none": 0, "stochastic": 0, "24bit": 1, "32bit": 2}
_LOW_PRECISION = ("bfloat16", "float16")


def state_format_for(
    shape: Sequence[int],
    *,
    requested: str | None = None,
    dtype: str = "float32",
    embedding: bool = False,
    low_bit_embeddings: bool = False,
) -> str:
    """Return the format in which the moments of a parameter are kept.

    Small parameters, those below two dimensions and embeddings stay in float32 where `bfloat16` or
    `8bit` is requested, and those with fewer than 16 elements for each index of the first
    dimension where `8bit` is. Without a request, float32 parameters have float32 state and
    bfloat16 and float16 parameters bfloat16 state, as many bytes as in torch. Parameters of other
    types keep state of their own type.

    Args:
        shape: Of the whole parameter, never of a shard.
        requested: One of `STATE_FORMATS`, or None.
        dtype: Of the parameter, such as `bfloat16`.
        embedding: Whether it is an embedding, see `is_embedding`.
        low_bit_embeddings: Treat embeddings as any other matrix.

    Example:
        >>> state_format_for((4096, 4096), requested="8bit")
        '8bit'
        >>> state_format_for((4096,), requested="8bit")
        'float32'
        >>> state_format_for((10,), dtype="bfloat16")
        'bfloat16'
    """
    if requested is not None and requested not in STATE_FORMATS:
        raise ValueError(f"Invalid state_format: {requested!r}; one of {', '.join(STATE_FORMATS)}")
    if dtype not in ("float32", *_LOW_PRECISION):
        return dtype
    if requested is None:
        return "bfloat16" if dtype in _LOW_PRECISION else "float32"
    exempt = (
        len(shape) < 2
        or math.prod(shape) < SMALL_NUMEL
        or (embedding and not low_bit_embeddings)
        or (requested == "8bit" and math.prod(shape[1:]) < _SHORTEST_RUN)
    )
    return "float32" if exempt else requested


def master_format_for(dtype: str, requested: str | None = None) -> str:
    """Return how the bits that a low-precision parameter cannot hold are kept.

    Args:
        dtype: Of the parameter.
        requested: One of `MASTER_FORMATS`; None is `stochastic` for bfloat16 and float16.

    Example:
        >>> master_format_for("bfloat16"), master_format_for("float32", "24bit")
        ('stochastic', 'none')
    """
    if requested is not None and requested not in MASTER_FORMATS:
        valid = ", ".join(MASTER_FORMATS)
        raise ValueError(f"Invalid master_format: {requested!r}; one of {valid}")
    if dtype not in _LOW_PRECISION:
        return "none"
    return "stochastic" if requested is None else requested


def state_bytes(
    shape: Sequence[int], state_format: str, moments: int = 2, local_numel: int | None = None
) -> int:
    """Return the bytes of the moments of a parameter.

    Eight-bit codes have a scale for each block of 128 elements, and a block ends with its index of
    the first dimension.

    Args:
        shape: Of the whole parameter.
        state_format: From `state_format_for`.
        moments: How many there are.
        local_numel: Elements that this process holds; all of them by default.

    Example:
        >>> state_bytes((1024, 1024), "float32"), state_bytes((1024, 1024), "8bit")
        (8388608, 2146304)
    """
    whole = math.prod(shape)
    held = whole if local_numel is None else local_numel
    if state_format != "8bit" or not whole:
        return moments * held * ELEMENT_BYTES[state_format]
    run = whole // shape[0]
    blocks = math.ceil(held / run) * math.ceil(run / _BLOCK)
    return moments * held + blocks * sum(_SCALE_BYTES[:moments])


def param_state_bytes(
    info: ParamInfo, *, state_format: str, master_format: str, moments: int
) -> int:
    """Return the bytes that the state of a parameter takes on this process.

    Args:
        info: The parameter.
        state_format: From `state_format_for`.
        master_format: From `master_format_for`.
        moments: From `moments_of_group`; with two or more there is a step count of 4 bytes, as
            there is where random bits depend on it, for 16-bit parameters.

    Example:
        >>> info = ParamInfo("fc.weight", (1024, 1024), dtype="bfloat16")
        >>> param_state_bytes(info, state_format="8bit", master_format="24bit", moments=2) / 2**20
        3.0468788146972656
    """
    held = info.numel if info.local_numel is None else info.local_numel
    residual = held * _RESIDUAL_BYTES[master_format]
    count = 4 if moments > 1 or info.dtype in _LOW_PRECISION else 0
    return state_bytes(info.shape, state_format, moments, held) + residual + count


def moments_of_group(group: Mapping[str, Any]) -> int:
    """Return how many tensors of a parameter's size its state holds.

    Two for Adam and AdamW, three with `amsgrad`; one for SGD with momentum, none without. A group
    that no optimizer has completed yet counts as AdamW's.
    """
    if "momentum" in group and "betas" not in group:
        return 1 if group["momentum"] else 0
    return 3 if group.get("amsgrad") else 2


def embedding_names(group: Mapping[str, Any]) -> frozenset[str]:
    """Return the embeddings of a group that `param_groups` made, from its key `embeddings`."""
    return frozenset(name for name in str(group.get("embeddings", "")).split(",") if name)


def is_embedding_of_group(name: str, shape: Sequence[int], group: Mapping[str, Any]) -> bool:
    """Return whether a parameter is an embedding, as its group says, else as its name does.

    Example:
        >>> is_embedding_of_group("shared.weight", (50, 16), {"embeddings": "shared.weight"})
        True
        >>> is_embedding_of_group("embed_tokens.weight", (50, 16), {})
        True
    """
    if "embeddings" in group:
        return name in embedding_names(group)
    return is_embedding(ParamInfo(name, tuple(shape)))
