"""Grouping of torch models: what the walk sees and what the table shows."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import ebbtide.torch
from ebbtide.torch.groups import explain_groups, param_groups


class RMS(nn.Module):
    """A norm that is called nothing of the kind."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class ChannelNorm(nn.Module):
    """A norm of images, with weights of three dimensions."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, 1, 1))
        self.shift = nn.Parameter(torch.ones(size, 2, 2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln1 = RMS(8)
        self.attn = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.ln2 = nn.RMSNorm(8)
        self.fc = nn.Linear(8, 8)
        self.layer_scale = nn.Parameter(torch.ones(8, 1, 1))


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.ones(()))
        self.wte = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 1, groups=8)
        self.bn1 = nn.BatchNorm2d(8)
        self.gn = nn.GroupNorm(2, 8)
        self.channels = ChannelNorm(8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.rnn = nn.LSTM(8, 8, proj_size=4)
        self.gru = nn.GRU(8, 8)
        self.bilinear = nn.Bilinear(2, 3, 4)
        self.prelu = nn.PReLU(8)
        self.mixture = nn.ParameterList([nn.Parameter(torch.ones(4, 4)) for _ in range(2)])
        self.extra = nn.ParameterDict(
            {"gain": nn.Parameter(torch.ones(4, 4)), "matrix": nn.Parameter(torch.ones(4, 4))}
        )
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.unbiased_head = nn.Linear(8, 4)
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.wte.weight


SPARED_WITH_TWO_DIMENSIONS = {
    "channels.weight", "channels.shift", "extra.gain", "normed.parametrizations.weight.original0",
    "blocks.0.layer_scale", "blocks.1.layer_scale", "blocks.0.attn.bias_k", "blocks.0.attn.bias_v",
    "blocks.1.attn.bias_k", "blocks.1.attn.bias_v",
}  # fmt: skip


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 16, bias=False))
    return nn.Sequential(nn.Embedding(11, 8), body, nn.Linear(16, 3))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def signature(groups: list[dict[str, Any]]) -> list[Any]:
    return [(g["name"], g["weight_decay"], [name for name, _ in g["params"]]) for g in groups]


def names(groups: list[dict[str, Any]], group: str) -> set[str]:
    return {name for g in groups if g["name"] == group for name, _ in g["params"]}


def test_every_weight_of_a_zoo_of_layers_decays_and_nothing_else() -> None:
    model = Zoo()
    groups = param_groups(model, weight_decay=0.1)
    assert [group["name"] for group in groups] == ["decay", "no_decay"]
    expected = {
        name
        for name, tensor in model.named_parameters()
        if tensor.ndim >= 2 and name not in SPARED_WITH_TWO_DIMENSIONS
    }
    assert names(groups, "decay") == expected
    everything = {name for name, _ in model.named_parameters()}
    assert names(groups, "no_decay") == everything - expected


def test_names_alone_give_the_same_groups() -> None:
    model = Zoo()
    assert signature(param_groups(model.named_parameters(), 0.1)) == signature(
        param_groups(dict(model.named_parameters()), 0.1)
    )
    by_name = param_groups(model.named_parameters(), 0.1)
    by_module = param_groups(model, 0.1)
    # A three-dimensional parameter called shift is told from a weight by its class alone.
    assert names(by_name, "decay") - names(by_module, "decay") == {"channels.shift"}
    assert names(by_module, "decay") <= names(by_name, "decay")


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, ebbtide.torch.AdamW])
def test_the_groups_train_under_any_optimizer(optimizer: Callable[..., Any]) -> None:
    model = plain()
    before = copy.deepcopy(model.state_dict())
    taken = optimizer(param_groups(model, weight_decay=0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    taken.step()
    for name, tensor in model.state_dict().items():
        kept = 0.95 if tensor.ndim > 1 else 1.0
        torch.testing.assert_close(tensor, before[name] * kept, msg=name)
    assert taken.param_groups[0]["param_names"] == [
        "0.weight", "1.0.weight", "1.2.weight", "2.weight"
    ]  # fmt: skip


def test_group_values_are_plain_so_that_distributed_checkpoints_keep_them() -> None:
    groups = param_groups(Zoo(), 0.1, lr=1e-3, layer_decay=0.9)
    for group in groups:
        assert all(type(v) in (str, float) for k, v in group.items() if k != "params")
    assert len({frozenset(group) for group in groups}) == 1


def test_tied_weights_are_there_once_with_both_names() -> None:
    model = Zoo()
    groups = param_groups(model, 0.1)
    tensors = [tensor for group in groups for _, tensor in group["params"]]
    assert len(tensors) == len({id(tensor) for tensor in tensors}) == len([*model.parameters()])
    row = next(row for row in explain_groups(groups).rows if row.name == "wte.weight")
    assert row.tied == ("lm_head.weight",)
    assert "embedding, tied to lm_head.weight" in str(explain_groups(groups))
    by_second_name = param_groups(model, 0.1, rules={"lm_head.*": {"weight_decay": 0.0}})
    assert "wte.weight" in names(by_second_name, "no_decay")
    pairs = [*model.named_parameters(remove_duplicate=False)]
    assert signature(param_groups(pairs, 0.1)) == signature(
        param_groups(model.named_parameters(), 0.1)
    )


def test_a_module_in_two_places_is_there_once_with_both_names() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"encoder": shared, "decoder": shared})
    groups = param_groups(model, 0.1, rules={"decoder.weight": {"weight_decay": 0.2}})
    assert names(groups, "decay_0.2") == {"encoder.weight"}
    assert explain_groups(groups).rows[0].tied == ("decoder.weight",)


def test_frozen_parameters_are_shown_and_not_grouped() -> None:
    model = plain()
    model[0].weight.requires_grad_(False)
    groups = param_groups(model, 0.1)
    assert {group["name"] for group in groups} == {"decay", "no_decay"}
    assert "0.weight" not in names(groups, "decay") | names(groups, "no_decay")
    table = explain_groups(groups)
    assert table.frozen == ("0.weight",)
    assert "frozen: 1 tensor, 88 elements" in str(table)
    assert [row.name for row in table.rows] == [name for name, _ in model.named_parameters()]


def test_embeddings_are_configurable_and_listed() -> None:
    groups = param_groups(plain(), 0.1, embeddings="no_decay")
    assert "0.weight" in names(groups, "no_decay")
    assert {group["name"]: group["embeddings"] for group in groups} == {
        "decay": "", "no_decay": "0.weight"
    }  # fmt: skip


def test_a_rule_names_its_groups() -> None:
    rules = {"2.*": {"lr": 1.0, "name": "head"}}
    groups = param_groups(plain(), 0.1, rules=rules)
    assert [group["name"] for group in groups] == [
        "decay", "no_decay", "head.decay", "head.no_decay"
    ]  # fmt: skip
    assert {row.group for row in explain_groups(groups).rows} == {g["name"] for g in groups}


def test_a_module_class_is_a_pattern_for_what_is_inside() -> None:
    groups = param_groups(Zoo(), 0.1, rules={Block: {"lr": 1.0}, nn.LSTM: {"lr": 2.0}})
    assert names(groups, "decay.lr_1.0") == {
        f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("attn.out_proj", "fc")
    } | {f"blocks.{i}.attn.in_proj_weight" for i in (0, 1)}
    assert "rnn.weight_hh_l0" in names(groups, "decay.lr_2.0")


class Asking(nn.Module):
    def __init__(self, asked: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.ones(4, 4))
        self.inner = nn.Linear(4, 4)
        self.asked = asked

    def no_weight_decay(self) -> Any:
        return self.asked


@pytest.mark.parametrize("wrap", [nn.Sequential, compiled, checkpoint_wrapper])
def test_no_weight_decay_of_a_module_is_honoured_below_it(wrap: Callable[..., nn.Module]) -> None:
    model = nn.ModuleDict({"a": wrap(Asking({"table", "inner.weight", "absent"})), "b": Asking(())})
    spared = names(param_groups(model, 0.1), "no_decay")
    assert len([name for name in spared if name.startswith("a") and "bias" not in name]) == 2
    assert [name for name in spared if name.startswith("b.") and "bias" not in name] == []
    table = explain_groups(param_groups(model, 0.1))
    assert {row.reason for row in table.rows if row.name.endswith("table")} >= {"2-D"}
    assert "no_weight_decay() of Asking" in str(table)


def test_what_a_module_asks_holds_for_what_is_wrapped_inside_it() -> None:
    model = Asking({"inner.weight"})
    model.inner = checkpoint_wrapper(model.inner)
    assert "inner.weight" in names(param_groups(model, 0.1), "no_decay")


def test_other_ways_to_ask_are_honoured() -> None:
    model = plain()
    model[2].weight._no_weight_decay = True  # type: ignore[attr-defined]
    model[1].no_weight_decay_keywords = lambda: {"0.we"}  # type: ignore[assignment]
    spared = names(param_groups(model, 0.1), "no_decay")
    assert spared >= {"2.weight", "1.0.weight"}
    assert "1.2.weight" not in spared


def test_what_cannot_be_grouped_is_refused_by_name() -> None:
    model = plain()
    spent = model.named_parameters()
    list(spent)
    with pytest.raises(ValueError, match="generator already consumed"):
        param_groups(spent, 0.1)
    with pytest.raises(ValueError, match="no parameters"):
        param_groups(nn.ReLU(), 0.1)
    with pytest.raises(TypeError, match=r"model\.named_parameters\(\), not model\.parameters\(\)"):
        param_groups(model.parameters(), 0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not a Parameter"):
        param_groups(model[0].weight, 0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"pass the model or .* not a NoneType"):
        param_groups(None, 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'2\.bias' is there twice"):
        param_groups([*model.named_parameters(), ("2.bias", model[2].bias)], 0.1)
    with pytest.raises(ValueError, match=r"'1\.weight' has no shape yet"):
        param_groups(nn.Sequential(nn.ReLU(), nn.LazyLinear(3)), 0.1)
    with pytest.raises(ValueError, match=r"'x\*' matches no parameter"):
        param_groups(model, 0.1, rules={"x*": {"lr": 1.0}})
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="all 8 parameters are frozen"):
        param_groups(model, 0.1)


def test_two_parameters_on_one_memory_are_a_duplicate() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    with pytest.raises(
        ValueError, match=r"'0\.weight' and '1\.weight' are two parameters on the s"
    ):
        param_groups(model, 0.1)


def test_views_of_one_buffer_are_no_duplicates() -> None:
    buffer = torch.zeros(32)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[0].weight.data, model[1].weight.data = buffer[:16].view(4, 4), buffer[16:].view(4, 4)
    assert len(names(param_groups(model, 0.1), "decay")) == 2


def test_the_table_lists_what_decays_below_two_dimensions() -> None:
    assert explain_groups(param_groups(Zoo(), 0.1)).decayed_below_2d == ()
    by_hand = param_groups(plain(), 0.1, rules={"2.bias": {"weight_decay": 0.1}})
    assert explain_groups(by_hand).decayed_below_2d == ("2.bias",)
    assert "decayed below 2-D: 2.bias" in str(by_hand)


def test_the_table_shows_the_decay_in_force() -> None:
    groups = param_groups(plain(), 0.1)
    groups[0]["weight_decay"] = 0.2
    row = explain_groups(groups).rows[0]
    assert (row.weight_decay, row.reason) == (0.2, "changed from 0.1 (embedding)")


def test_the_table_becomes_json() -> None:
    groups = param_groups(Zoo(), 0.1, lr=1e-3)
    found = json.loads(explain_groups(groups).to_json())
    assert [row["name"] for row in found["parameters"]] == [n for n, _ in Zoo().named_parameters()]
    assert found["parameters"][0] == {
        "name": "logit_scale", "shape": [], "dtype": "float32", "group": "no_decay",
        "weight_decay": 0.0, "lr": 0.001, "reason": "gain", "state_format": "float32",
        "state_bytes": 12, "tied": [], "frozen": False, "numel": 1, "decays": False,
    }  # fmt: skip
    assert [group["name"] for group in found["groups"]] == ["no_decay", "decay"]
    assert sum(group["tensors"] for group in found["groups"]) == len(found["parameters"])
    assert found["decayed_below_2d"] == found["missing"] == []


def test_any_optimizer_can_be_audited() -> None:
    model = Zoo()
    optimizer = torch.optim.AdamW(model.named_parameters(), weight_decay=0.1)
    table = explain_groups(optimizer)
    assert "bn1.weight" in table.decayed_below_2d
    by_name = {row.name: row for row in table.rows}
    assert by_name["bn1.weight"].reason == "set by its group (standard rule: no decay, norm)"
    assert by_name["conv.weight"].reason == "4-D"
    with_model = {row.name: row for row in explain_groups(optimizer, model).rows}
    assert with_model["bn1.weight"].reason.endswith("no decay, norm (BatchNorm2d))")
    assert with_model["wte.weight"].tied == ("lm_head.weight",)


def test_what_an_optimizer_was_not_given_is_reported() -> None:
    model = plain()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1, momentum=0.9)
    table = explain_groups(optimizer.param_groups, model)
    assert table.missing == ("2.weight", "2.bias")
    assert table.frozen == ("0.weight",)
    assert "trainable but in no group: 2.weight, 2.bias" in str(table)
    assert {row.name: row.state_bytes for row in table.rows}["1.0.weight"] == 8 * 8 * 4
    unnamed = explain_groups(optimizer)
    assert [row.name for row in unnamed.rows] == ["0.0", "0.1", "0.2", "0.3", "0.4"]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, ebbtide.torch.AdamW])
def test_the_groups_still_explain_themselves_after_an_optimizer_took_them(
    optimizer: Callable[..., Any],
) -> None:
    groups = param_groups(Zoo(), 0.1)
    before = [(row.name, row.reason) for row in explain_groups(groups).rows]
    optimizer(groups)
    assert [(row.name, row.reason) for row in explain_groups(groups).rows] == before


def test_groups_can_be_copied_and_pickled() -> None:
    groups = param_groups(plain(), 0.1)
    for twin in (copy.deepcopy(groups), pickle.loads(pickle.dumps(groups))):
        assert signature(twin) == signature(groups)
        assert str(twin) == str(groups)


def test_the_table_shows_low_bit_state() -> None:
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 100), nn.Linear(100, 100))
    groups = param_groups(model, 0.1, rules={"*": {"state_format": "8bit"}})
    rows = {row.name: row for row in explain_groups(groups).rows}
    assert {name: row.state_format for name, row in rows.items()} == {
        "0.weight": "float32", "1.weight": "8bit", "1.bias": "float32", "2.weight": "8bit",
        "2.bias": "float32",
    }  # fmt: skip
    assert rows["2.weight"].state_bytes == 2 * 100 * 100 + 100 * (4 + 2) + 4


def test_layer_decay_reaches_the_groups_from_the_bottom_up() -> None:
    groups = param_groups(Zoo(), 0.1, lr=1.0, layer_decay=0.5)
    rates = {name: group["lr"] for group in groups for name, _ in group["params"]}
    assert rates["conv.weight"] == rates["wte.weight"] == 0.125
    assert rates["blocks.0.fc.weight"] == rates["blocks.0.ln1.weight"] == 0.25
    assert rates["blocks.1.attn.in_proj_weight"] == 0.5
    assert rates["unbiased_head.weight"] == rates["logit_scale"] == 1.0
    assert [group["lr"] for group in groups] == sorted(group["lr"] for group in groups)
    assert len(groups) == 8
