"""The grouping engine, without a framework: rules, layers, names of groups."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.groups import (
    Grouping,
    ParamInfo,
    assign,
    bare_names,
    depths_below_top,
    is_embedding,
    standard_rule,
)

TORCH = "torch.nn.modules."
LINEAR = ("torch.nn.modules.linear.Linear", "torch.nn.modules.module.Module")


def info(name: str, *shape: int, owner: str = "", frozen: bool = False) -> ParamInfo:
    owners = ((owner,),) if owner else ()
    return ParamInfo(name, shape, owners=owners, inside=frozenset({owner}), frozen=frozen)


def groups_of(infos: list[ParamInfo], **arguments: object) -> dict[str, str]:
    grouping = Grouping(**{"weight_decay": 0.1, **arguments})  # type: ignore[arg-type]
    return {a.info.name: a.group for a in assign(infos, grouping)}


# Name, shape, class of the owner ("" where only names are known), whether it decays.
STANDARD = [
    ("fc.weight", (10, 4), TORCH + "linear.Linear", True),
    ("fc.bias", (10,), TORCH + "linear.Linear", False),
    ("fc.weight", (1, 4), TORCH + "linear.Linear", True),
    ("unbiased_head.weight", (10, 4), TORCH + "linear.Linear", True),
    ("unbiased_head.weight", (10, 4), "", True),
    ("abnormal.weight", (10, 4), "", True),
    ("denorm_proj.weight", (10, 4), "", True),
    ("w", (10, 4), "", True),
    ("w", (1, 4), "", True),
    ("conv.weight", (8, 1, 1, 1), TORCH + "conv.Conv2d", True),
    ("conv.weight", (8, 1, 1, 1), "", True),
    ("dwconv.weight", (8, 1, 7, 7), "", True),
    ("bilinear.weight", (3, 4, 5), TORCH + "linear.Bilinear", True),
    ("attn.in_proj_weight", (12, 4), TORCH + "activation.MultiheadAttention", True),
    ("attn.in_proj_bias", (12,), TORCH + "activation.MultiheadAttention", False),
    ("attn.bias_k", (1, 1, 4), TORCH + "activation.MultiheadAttention", False),
    ("rnn.weight_hh_l0", (12, 4), TORCH + "rnn.GRU", True),
    ("rnn.bias_hh_l0", (12,), TORCH + "rnn.GRU", False),
    ("experts.gate_up_proj", (4, 8, 16), "a.Experts", True),
    ("experts.down_proj_bias", (4, 16), "a.Experts", False),
    ("ln1.weight", (8,), "a.Anything", False),
    ("norm.weight", (8, 4, 4), TORCH + "normalization.LayerNorm", False),
    ("norm.weight", (8, 4, 4), "", False),
    ("ln_f.weight", (4, 8), "", False),
    ("blocks.ln1_weight", (4, 8), "", False),
    ("x.weight", (4, 8), "a.RMSNorm", False),
    ("x.weight", (4, 8), "a.LayerNorm2d", False),
    ("x.weight", (4, 8), "a.FancyNormalization", False),
    ("x.weight", (4, 8), "a.RMSNormGated", False),
    ("x.weight", (4, 8), "a.NormalizedLinear", True),
    ("x.weight", (4, 8), "a.NormLinear", True),
    ("x.weight", (4, 8), "a.NormedHead", True),
    ("x.w1", (4, 8), "a.PreNormBlock", True),
    ("layer_scale", (8,), "a.Block", False),
    ("layer_scale", (8, 1, 1), "a.Block", False),
    ("layer_scale_parameter", (8, 1, 1), "a.ConvNextLayer", False),
    ("block.gamma", (8, 1, 1), "a.Block", False),
    ("block.ls", (8, 1, 1), "a.Block", False),
    ("logit_scale", (), "", False),
    ("upscale.weight", (4, 8), "", True),
    ("gains.0", (4, 8), TORCH + "container.ParameterList", False),
    ("mixer.A_log", (8, 4), "a.MambaMixer", False),
    ("mixer.D", (8,), "a.MambaMixer", False),
    ("mixer.D", (8, 4), "a.MambaMixer", False),
    ("conv.weight_g", (8, 1, 1), TORCH + "conv.Conv1d", False),
    ("conv.weight_v", (8, 4, 3), TORCH + "conv.Conv1d", True),
    ("fc.parametrizations.weight.original0", (8, 1), "", False),
    ("fc.parametrizations.weight.original1", (8, 4), "", True),
    ("embed.weight", (50, 8), TORCH + "sparse.Embedding", True),
    ("relative_attention_bias.weight", (32, 2), TORCH + "sparse.Embedding", False),
    ("relative_position_bias_table", (49, 2), "a.SwinAttention", False),
    ("cls_token", (1, 1, 8), "a.ViTEmbeddings", False),
    ("mask_token", (1, 8), "a.ViTEmbeddings", False),
    ("pos_embed", (1, 5, 8), "a.VisionTransformer", True),
]


@pytest.mark.parametrize(("name", "shape", "owner", "decays"), STANDARD)
def test_the_standard_rule_decays_weights_and_nothing_else(
    name: str, shape: tuple[int, ...], owner: str, decays: bool
) -> None:
    assert standard_rule(info(name, *shape, owner=owner))[0] is decays


def test_a_class_derived_from_torchs_is_what_its_base_is_whatever_its_name() -> None:
    bases = ("a.Norm", *LINEAR)
    assert standard_rule(ParamInfo("x.weight", (4, 8), owners=(bases,)))[0]
    bases = ("a.Scale", "torch.nn.modules.normalization.LayerNorm")
    assert standard_rule(ParamInfo("x.weight", (4, 8), owners=(bases,))) == (False, "norm (Scale)")


@pytest.mark.parametrize(
    ("name", "shape", "owner", "expected"),
    [
        ("wte.weight", (50, 8), "", True),
        ("model.embed_tokens.weight", (50, 8), "", True),
        ("embed_positions.weight", (50, 8), "", True),
        ("x.weight", (50, 8), TORCH + "sparse.EmbeddingBag", True),
        ("x.weight", (50, 8), "a.ScaledWordEmbedding", True),
        ("pos_embed", (1, 5, 8), "", True),
        ("patch_embed.weight", (8, 48), "", False),
        ("embeddings.patch_embedding.weight", (8, 3, 4, 4), "", False),
        ("embedding_proj.weight", (8, 48), "", False),
        ("time_embed.0.weight", (8, 48), "", False),
        ("token_mixer.weight", (8, 8), "", False),
        ("embed.weight", (8, 48), TORCH + "linear.Linear", False),
        ("class_embedding", (8,), "", False),
    ],
)
def test_embeddings_are_told_from_linear_maps(
    name: str, shape: tuple[int, ...], owner: str, expected: bool
) -> None:
    assert is_embedding(info(name, *shape, owner=owner)) is expected


def test_a_mixin_says_nothing_of_the_parameters() -> None:
    for mixin in ("a.EmbeddingAccessMixin", "a.EmbeddingMixin", "a.LayerNormMixin"):
        matrix = ParamInfo("weight", (4, 8), owners=(("a.Model", mixin),))
        assert not is_embedding(matrix)
        assert standard_rule(matrix) == (True, "2-D")


def test_tied_to_a_head_an_embedding_stays_an_embedding() -> None:
    owners = (LINEAR, ("torch.nn.modules.sparse.Embedding",))
    tied = ParamInfo("head.weight", (50, 8), ("wte.weight",), owners=owners)
    assert is_embedding(tied)
    assert standard_rule(tied, "no_decay") == (False, "embedding")


def test_first_matching_rule_wins_and_leaves_decay_to_the_standard_rule() -> None:
    infos = [info("head.weight", 4, 4), info("head.bias", 4), info("body.weight", 4, 4)]
    rules = {"head.*": {"lr": 1.0}, re.compile("weight$"): {"lr": 2.0}}
    found = assign(infos, Grouping(0.1, rules=rules))
    assert [(a.settings["lr"], a.settings["weight_decay"]) for a in found] == [
        (1.0, 0.1), (1.0, 0.0), (2.0, 0.1)
    ]  # fmt: skip
    assert [a.group for a in found] == ["decay.lr_1.0", "no_decay.lr_1.0", "decay.lr_2.0"]
    assert found[1].reason == "bias; rule 'head.*'"


def test_rules_match_by_class_of_an_enclosing_module_and_by_function() -> None:
    class Head:
        pass

    inside = frozenset({f"{__name__}.{Head.__qualname__}"})
    infos = [ParamInfo("a.weight", (4, 4), inside=inside), info("b.weight", 4, 4, 4)]
    rules = [
        (Head, {"weight_decay": 0.3}),
        (lambda found: len(found.shape) == 3, {"weight_decay": 0.2}),
    ]
    assert groups_of(infos, rules=rules) == {"a.weight": "decay_0.3", "b.weight": "decay_0.2"}


def test_a_rule_that_names_its_group_gets_it() -> None:
    infos = [info("a.weight", 4, 4), info("b.weight", 4, 4), info("b.bias", 4)]
    rules = [("b.*", {"name": "probe", "lr": 1.0})]
    assert groups_of(infos, rules=rules) == {
        "a.weight": "decay", "b.weight": "probe.decay", "b.bias": "probe.no_decay"
    }  # fmt: skip
    rules = [("b.*", {"name": "probe", "weight_decay": 0.0})]
    assert groups_of(infos, rules=rules) == {
        "a.weight": "decay", "b.weight": "probe", "b.bias": "probe"
    }  # fmt: skip


def test_equal_settings_share_a_group_and_names_stay_apart() -> None:
    infos = [info("a.weight", 4, 4), info("a.bias", 4), info("b.weight", 4, 4)]
    assert set(groups_of(infos, weight_decay=0.0).values()) == {"no_decay"}
    by_hand = groups_of(infos, rules={"b.*": {"weight_decay": 0.1}, "a.b*": {"weight_decay": 0}})
    assert by_hand == groups_of(infos)
    same_lr = groups_of(infos, lr=1.0, rules={"b.*": {"lr": 1.0}})
    assert same_lr["b.weight"] == same_lr["a.weight"] == "decay"
    clash = groups_of(infos, rules={"b.*": {"weight_decay": 0.5, "name": "decay"}})
    assert clash == {"a.weight": "decay", "a.bias": "no_decay", "b.weight": "decay_2"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rules": {"hed.*": {"lr": 1.0}}}, r"'hed\.\*' matches no parameter.*'head\.weight'"),
        ({"rules": {"head": {"lr": 1.0}}}, r"a glob matches whole names, such as 'head\.weight'"),
        ({"rules": {re.compile("x{3}"): {"lr": 1.0}}}, r"re\.compile\('x\{3\}'\) matches no"),
        ({"rules": {int: {"lr": 1.0}}}, "the class of a module needs the model"),
        ({"rules": {"head.*": {"weigth_decay": 0}}}, "unknown setting 'weigth_decay'.*'weight_d"),
        ({"rules": {"head.*": {"lr": -1.0}}}, r"lr must be at least 0.*rule 'head\.\*'"),
        ({"rules": {"*.w*": {"weight_decay": 0}}, "standard": False}, "no rule .* 'head.bias'"),
        ({"rules": {"*": {"lr": 1.0}}, "standard": False}, "sets no weight_decay for 'head.weigh"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0 and finite"),
        ({"lr": float("inf")}, "lr must be at least 0 and finite"),
        ({"embeddings": "none"}, "embeddings must be 'decay' or 'no_decay', got 'none'"),
        ({"layer_decay": 0.5}, "pass lr too"),
        ({"layer_decay": 0.0, "lr": 1.0}, r"layer_decay must be in \(0, 1\]"),
        ({"layer_decay": 0.5, "lr": 1.0}, "finds no numbered layers"),
        ({"layers": ["head.*"]}, "layers are given without a layer_decay"),
        ({"layers": ["head.w*"], "layer_decay": 0.5, "lr": 1.0}, "'head.bias' is in none of the"),
        ({"layers": ["head*", "x"], "layer_decay": 0.5, "lr": 1.0}, "layer 'x' matches no param"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        groups_of([info("head.weight", 4, 4), info("head.bias", 4)], **arguments)


@pytest.mark.parametrize(
    "rules", ["head", ["head.*"], [("head.*", 0.1)], [(3, {"lr": 1.0})], {"head.*": {"lr": "1e-3"}}]
)
def test_what_is_no_rule_is_a_type_error(rules: object) -> None:
    with pytest.raises(TypeError):
        groups_of([info("head.weight", 4, 4)], rules=rules)


def test_a_rule_hidden_behind_earlier_ones_is_warned_about() -> None:
    rules = [("*", {"lr": 1.0}), ("head.*", {"lr": 2.0})]
    with pytest.warns(UserWarning, match=r"'head\.\*' has no effect"):
        groups_of([info("head.weight", 4, 4)], rules=rules)


def test_nothing_to_group_is_refused() -> None:
    with pytest.raises(ValueError, match="generator already consumed"):
        groups_of([])
    with pytest.raises(ValueError, match="all 1 parameters are frozen"):
        groups_of([info("a", 4, 4, frozen=True)])
    with pytest.raises(ValueError, match="two parameters are called 'a'"):
        groups_of([info("a", 4, 4), info("a", 4)])


def test_frozen_parameters_get_a_reason_and_no_group() -> None:
    found = assign([info("a", 4, 4, frozen=True), info("b", 4, 4)], Grouping(0.1))
    assert [a.group for a in found] == ["", "decay"]
    only_frozen = {"a": {"lr": 1.0}}
    assert groups_of([info("a", 4, 4, frozen=True), info("b", 4)], rules=only_frozen)["a"] == ""


LAYERED = {
    # Each name with the number of layers above it.
    "bert": {
        "bert.embeddings.word.weight": 3, "bert.encoder.layer.0.fc.weight": 2,
        "bert.encoder.layer.1.fc.weight": 1, "bert.pooler.weight": 0, "classifier.weight": 0,
    },
    "torchvision resnet": {
        "conv1.weight": 4, "layer1.0.conv1.weight": 3, "layer1.1.downsample.0.weight": 2,
        "layer2.0.conv1.weight": 1, "fc.weight": 0,
    },
    "stages": {
        "stem.weight": 5, "stages.0.layers.0.layer.0.weight": 4, "stages.0.layers.1.layer.2.w": 3,
        "stages.1.down.0.weight": 2, "stages.1.layers.0.fc.weight": 1, "head.weight": 0,
    },
    "a block's own list is no layer": {
        "embed.weight": 3, "encoder.block.0.layer.0.q.weight": 2, "encoder.block.0.layer.1.wi.w": 2,
        "encoder.block.1.layer.0.q.weight": 1, "final.weight": 0,
    },
    "two towers": {
        "logit_scale": 0, "text.embed.weight": 3, "text.layers.0.fc.weight": 2,
        "text.layers.1.fc.weight": 1, "text.proj.weight": 0, "vision.patch.conv.weight": 4,
        "vision.layers.0.fc.weight": 3, "vision.layers.1.fc.weight": 2,
        "vision.layers.2.fc.weight": 1, "vision.post.weight": 0,
    },
    "a small head of numbered modules is no tower": {
        "patch.weight": 3, "blocks.0.fc.weight": 2, "blocks.1.fc.weight": 1, "head.0.weight": 0,
        "head.2.weight": 0,
    },
    "a plain sequence": {"0.weight": 3, "2.weight": 2, "4.weight": 1},
}  # fmt: skip


@pytest.mark.parametrize("model", LAYERED)
def test_depths_are_read_from_the_names(model: str) -> None:
    expected = LAYERED[model]
    infos = [ParamInfo(name, () if name == "logit_scale" else (4, 4)) for name in expected]
    depths, bottom = depths_below_top(infos)
    assert dict(zip(expected, depths, strict=True)) == expected
    assert bottom >= max(depths)


def test_layer_decay_scales_lr_and_a_rule_overrides_it() -> None:
    names = ["embed.weight", "blocks.0.fc.weight", "blocks.1.fc.weight", "head.weight"]
    grouping = Grouping(0.1, lr=1.0, layer_decay=0.5, rules={"head.*": {"lr": 3.0}})
    found = assign([ParamInfo(name, (4, 4)) for name in names], grouping)
    assert [a.settings["lr"] for a in found] == [0.125, 0.25, 0.5, 3.0]
    assert [a.group for a in found] == [
        "layer_0.decay", "layer_1.decay", "layer_2.decay", "decay.lr_3.0"
    ]  # fmt: skip
    same = Grouping(0.1, lr=1.0, layer_decay=1.0)
    assert {a.group for a in assign([ParamInfo(name, (4, 4)) for name in names], same)} == {"decay"}


def test_layers_given_by_hand_go_from_the_bottom_to_the_top() -> None:
    infos = [ParamInfo(name, (4, 4)) for name in ("z.weight", "y.weight", "x.weight")]
    assert depths_below_top(infos, ["z*", "y*", "*"]) == ([2, 1, 0], 2)


@pytest.mark.parametrize(
    ("wrapped", "bare"),
    [
        (["module.a.w", "module.b.w"], ["a.w", "b.w"]),
        (["module.a.w", "b.w"], ["module.a.w", "b.w"]),
        (["_orig_mod.module.a.w"], ["a.w"]),
        (["module.layers.0._checkpoint_wrapped_module.fc.w"], ["layers.0.fc.w"]),
        (["_fsdp_wrapped_module.a._fsdp_wrapped_module.w"], ["a.w"]),
        (
            ["base_model.model.a.base_layer.weight", "base_model.model.a.lora_A.default.weight"],
            ["a.weight", "a.lora_A.default.weight"],
        ),
        (["a.base_layer.w", "a.w"], ["a.base_layer.w", "a.w"]),
        ([], []),
    ],
)
def test_bare_names_are_those_before_wrapping(wrapped: list[str], bare: list[str]) -> None:
    assert bare_names(wrapped) == bare


NAMES = st.lists(
    st.lists(st.sampled_from(["fc", "norm", "bias", "embed", "weight", "0", "1"]), min_size=1)
    .map(".".join),
    min_size=1, max_size=12, unique=True,
)  # fmt: skip


@given(names=NAMES, data=st.data())
def test_no_standard_decay_below_two_dimensions_and_no_more_groups_than_settings(
    names: list[str], data: st.DataObject
) -> None:
    shapes = st.lists(st.integers(0, 3), max_size=4)
    infos = [ParamInfo(name, tuple(data.draw(shapes))) for name in names]
    found = assign(infos, Grouping(0.1))
    assert not [a for a in found if a.decays and len(a.info.shape) < 2]
    assert len({a.group for a in found}) == len({a.settings["weight_decay"] for a in found})
