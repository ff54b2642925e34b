"""The standard rule: which parameters decay, and why.

Matrices, convolution kernels and other weights of linear maps decay; biases, gains and norms do
not. The class of the module that owns a parameter decides where it is known, then the words of its
name, each whole (`unbiased_head` is no bias), then its dimensions.
"""

from __future__ import annotations

import re
from enum import Enum

from ebbtide.groups.records import ParamInfo

__all__ = ["EMBEDDING_CHOICES", "is_embedding", "standard_rule"]

EMBEDDING_CHOICES = ("decay", "no_decay")


class _Kind(Enum):
    NORM = "norm"
    EMBEDDING = "embedding"
    LINEAR = "linear map"


# torch's own classes say what they are, and so do the classes derived from them.
_TORCH = {
    "torch.nn.modules.batchnorm.": _Kind.NORM,
    "torch.nn.modules.instancenorm.": _Kind.NORM,
    "torch.nn.modules.normalization.": _Kind.NORM,
    "torch.nn.modules.sparse.": _Kind.EMBEDDING,
    "torch.nn.modules.linear.": _Kind.LINEAR,
    "torch.nn.modules.conv.": _Kind.LINEAR,
    "torch.nn.modules.rnn.": _Kind.LINEAR,
}
# The noun comes last: a NormLinear is a linear map, a LinearNorm and a BatchNorm2d are norms.
_LINEAR_CLASS = re.compile(r"(?:[Ll]inear|[Cc]onv(?:olution)?|Dense|Projection)(?:\d[dD])?$")
# "Norm" ends a word: LayerNormalization and RMSNormGated, but not NormalizedLinear.
_NORM_CLASS = re.compile(r"(?:NORM|[Nn]orm)(?:alization)?(?![a-z])")
_EMBEDDING_CLASS = re.compile(
    r"(?:(?<!Patch)[Ee]mbed(?:ding|dings)?|Position(?:al)?Encoding)(?:Bag|Layer|Table|\d[dD])?$"
)

_NORM_WORD = re.compile(r"(?:layer|batch|group|instance|rms|sub|pre|post)?norm\d*|[lbg]n\d*|rms")
_LINEAR_WORD = re.compile(r"conv|proj|linear|dense|fc|pointwise|depthwise")
_NORM_PARAMETERS = frozenset(
    {"weight", "w", "scale", "gain", "g", "gamma", "alpha", "bias", "b", "beta", "shift", "loc"}
)
_EMBEDDING_WORDS = frozenset({"embed", "embeds", "embedding", "embeddings", "emb", "wte", "wpe"})
_EMBEDDING_NOUNS = _EMBEDDING_WORDS | {"token", "tokens", "positions"}
_GAIN_WORDS = frozenset({"scale", "scales", "gain", "gains", "gamma", "temperature"})
_BIAS_WORDS = frozenset({"bias", "biases"})
# State-space models keep time constants and skips in matrices; weight normalisation keeps the
# lengths of the rows apart from their directions.
_GAIN_NAMES = frozenset({"A_log", "D", "weight_g", "original0"})


def standard_rule(info: ParamInfo, embeddings: str = "decay") -> tuple[bool, str]:
    """Return whether the parameter decays, and the reason.

    Args:
        info: The parameter.
        embeddings: `"decay"` treats embeddings as the matrices they are; `"no_decay"` spares
            them, learned positions and tokens included.

    Example:
        >>> standard_rule(ParamInfo("unbiased_head.weight", (10, 64)))
        (True, '2-D')
        >>> standard_rule(ParamInfo("layer_scale", (64, 1, 1)))
        (False, 'gain')
    """
    if info.asked:
        return False, info.asked
    kind = _kind(info)
    words = _words(_leaf(info.name))
    rank = len(info.shape)
    if kind is _Kind.NORM:
        return False, _norm_reason(info)
    if words & _BIAS_WORDS or (kind is _Kind.EMBEDDING and _is_bias_table(info.name)):
        return False, "bias"
    if _leaf(info.name) in _GAIN_NAMES or words & _GAIN_WORDS:
        return False, "gain"
    if rank < 2:
        return False, f"{rank}-D"
    if kind is _Kind.EMBEDDING and embeddings == "no_decay":
        return False, "embedding"
    if _is_vector(info, kind):
        return False, f"a vector in {rank} dimensions"
    return True, "embedding" if kind is _Kind.EMBEDDING else f"{rank}-D"


def is_embedding(info: ParamInfo) -> bool:
    """Return whether the parameter is a table of vectors: of tokens, of positions.

    Example:
        >>> is_embedding(ParamInfo("transformer.wte.weight", (50257, 768)))
        True
        >>> is_embedding(ParamInfo("patch_embed.proj.weight", (768, 3, 16, 16)))
        False
    """
    return len(info.shape) >= 2 and _kind(info) is _Kind.EMBEDDING


def _is_vector(info: ParamInfo, kind: _Kind | None) -> bool:
    """Whether only one dimension of several is longer than 1, and it is no weight or small table.

    In two dimensions that is the weight of a linear map with one output, tokens apart.
    """
    if sum(size > 1 for size in info.shape) > 1:
        return False
    weight = _leaf(info.name).startswith(("weight", "kernel", "original"))
    if kind is _Kind.EMBEDDING:
        return not weight
    return len(info.shape) > 2 and not (weight and kind is _Kind.LINEAR)


def _kind(info: ParamInfo) -> _Kind | None:
    kinds = [_kind_of_class(bases, _leaf(info.name)) for bases in info.owners]
    for kind in (_Kind.EMBEDDING, _Kind.NORM, _Kind.LINEAR):  # of tied weights, the embedding
        if kind in kinds:
            return kind
    return _kind_of_name(info)


def _kind_of_class(bases: tuple[str, ...], leaf: str) -> _Kind | None:
    for base in bases:
        for prefix, kind in _TORCH.items():
            if base.startswith(prefix):
                return kind
    for base in bases:
        name = base.rpartition(".")[2]
        if name.endswith("Mixin"):
            continue
        if _LINEAR_CLASS.search(name):
            return _Kind.LINEAR
        # A block that is only named after its norm holds weights under other names.
        if _NORM_CLASS.search(name) and leaf in _NORM_PARAMETERS:
            return _Kind.NORM
        if _EMBEDDING_CLASS.search(name):
            return _Kind.EMBEDDING
    return None


def _kind_of_name(info: ParamInfo) -> _Kind | None:
    leaf, holder = _leaf(info.name), info.name.split(".")[-2:-1]
    if _says_norm(leaf) or (leaf in _NORM_PARAMETERS and any(map(_says_norm, holder))):
        return _Kind.NORM
    if _words(leaf) & _EMBEDDING_WORDS or _noun(leaf) in _EMBEDDING_NOUNS:
        return _Kind.EMBEDDING
    if leaf != "weight" or not holder:
        return None
    if _LINEAR_WORD.search(holder[0].lower()):
        return _Kind.LINEAR
    # The kernel of a patch embedding is a linear map.
    table = len(info.shape) == 2 and "patch" not in _words(holder[0])
    return _Kind.EMBEDDING if table and _noun(holder[0]) in _EMBEDDING_NOUNS else None


def _says_norm(component: str) -> bool:
    """Whether a component means a norm: norm1, ln_f, bn, norm_weight, but not norm_proj."""
    words = component.lower().split("_")
    rest = [word for word in words if not _NORM_WORD.fullmatch(word)]
    return len(rest) < len(words) and all(
        word in _NORM_PARAMETERS or len(word) < 2 or word in ("layer", "final") for word in rest
    )


def _is_bias_table(name: str) -> bool:
    """Whether an embedding is a table of biases, as T5's relative_attention_bias."""
    return any(_noun(part) in _BIAS_WORDS for part in name.split(".")[-2:-1])


def _norm_reason(info: ParamInfo) -> str:
    for bases in info.owners:
        if _kind_of_class(bases, _leaf(info.name)) is _Kind.NORM:
            return f"norm ({bases[0].rpartition('.')[2]})"
    return "norm"


def _leaf(name: str) -> str:
    """Return the last component that is not a number, as in a ParameterList called gains."""
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), "")


def _words(component: str) -> frozenset[str]:
    return frozenset(component.lower().split("_"))


def _noun(component: str) -> str:
    return component.lower().rpartition("_")[2]
