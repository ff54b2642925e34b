"""Matching saved parameters with ours, merging groups, flat arrays, summaries: no framework."""

from __future__ import annotations

from typing import Any

import pytest

from ebbtide.checkpoint import (
    Facts,
    Match,
    Slot,
    find_states,
    flatten,
    kind_of,
    match,
    merged_groups,
    saved_slots,
    summarize,
    unflatten,
)

Names = list[list[str]]


def slots(groups: Names, shape: tuple[int, ...] = (2,)) -> list[Slot]:
    flat = [(name, group) for group, names in enumerate(groups) for name in names]
    return [Slot(i, name, group, shape) for i, (name, group) in enumerate(flat)]


def matched(saved: Names, mine: Names) -> Match:
    return match(slots(saved), slots(mine), (len(saved), len(mine)))


@pytest.mark.parametrize(
    ("saved", "mine"),
    [
        ([["a", "b"]], [["b", "a"]]),
        ([["a", "b"]], [["b"], ["a"]]),
        ([["a"], ["b"]], [["a", "b"]]),
        ([["module.a", "module.b"]], [["b", "a"]]),
        ([["a", "b"]], [["_orig_mod.b", "_orig_mod.a"]]),
        ([["0", "1"]], [["1", "0"]]),  # real names of a ParameterList
    ],
    ids=str,
)
def test_names_decide(saved: Names, mine: Names) -> None:
    found = matched(saved, mine)
    by_index = [slot.name for slot in slots(saved)]
    for slot in slots(mine):
        assert slot.name is not None
        theirs = by_index[found.pairs[slot.index]]
        assert theirs is not None
        assert theirs.rpartition(".")[2] == slot.name.rpartition(".")[2]
    assert found.by_name
    assert not found.difference


def test_wrappers_that_tell_two_parameters_apart_stay() -> None:
    found = matched([["module.a", "a"]], [["a", "module.a"]])
    assert found.pairs == {0: 1, 1: 0}


@pytest.mark.parametrize(
    ("saved", "mine"),
    [
        ([["0", "1"]], [["w", "b"]]),  # from the NumPy face, given a list
        ([["w", "b"]], [["0", "1"]]),
    ],
    ids=str,
)
def test_names_that_are_positions_are_none(saved: Names, mine: Names) -> None:
    found = matched(saved, mine)
    assert found.pairs == {0: 0, 1: 1}
    assert not found.by_name


def test_other_names_are_a_difference_not_an_order() -> None:
    found = matched([["a", "b"]], [["c", "d"]])
    assert found.difference.missing == ["'c'", "'d'"]
    assert found.difference.unexpected == ["'a'", "'b'"]
    assert found.pairs == {}


def test_names_of_a_distributed_checkpoint_are_its_ids() -> None:
    state_dict: dict[str, Any] = {
        "state": {},
        "param_groups": [{"params": ["b", "a"], "param_names": ["x", "y"]}],
    }
    found = match(saved_slots(state_dict), slots([["a", "b"]]), (1, 1))
    assert found.pairs == {0: "a", 1: "b"}
    # Torch puts them into our order where our names are in another language.
    found = match(saved_slots(state_dict), slots([["net.b", "net.a"]]), (1, 1))
    assert found.pairs == {0: "b", 1: "a"}


def test_without_names_positions_decide_if_groups_agree() -> None:
    unnamed = [slot._replace(name=None) for slot in slots([["a"], ["b", "c"]])]
    assert match(unnamed, unnamed, (2, 2)).pairs == {0: 0, 1: 1, 2: 2}
    other = [slot._replace(name=None) for slot in slots([["a", "b"], ["c"]])]
    difference = match(unnamed, other, (2, 2)).difference
    assert "doesn't match the size of optimizer's group" in difference.unmatched
    assert "[1, 2] parameters, here [2, 1]" in difference.unmatched
    difference = match(unnamed[:1], other, (1, 2)).difference
    assert "different number of parameter groups" in str(difference)


def test_the_difference_names_everything() -> None:
    saved = [Slot(0, "a", 0, (2, 3)), Slot(1, "b", 0, (4,)), Slot(2, "c", 0, (5,))]
    mine = [Slot(0, "a", 0, (3, 2)), Slot(1, "d", 0, (1,)), Slot(2, "b", 1, (4,))]
    assert str(match(saved, mine, (1, 2)).difference).splitlines() == [
        "  missing in the file (1): 'd'",
        "  unexpected in the file (1): 'c'",
        "  shape changed (1): 'a' saved (2, 3), here (3, 2)",
        "  moved between groups (1): 'b' 0 → 1",
    ]


def test_a_long_difference_is_cut_short() -> None:
    found = matched([[f"x{i}" for i in range(20)]], [["a"]])
    assert str(found.difference).endswith("'x7' and 12 more")


def settings(**values: Any) -> dict[str, Any]:
    return {"lr": 0.1, "weight_decay": 0.5, "decay_policy": "decoupled", "fused": None, **values}


def merge(
    saved: Names, theirs: list[dict[str, Any]], mine: Names, ours: list[dict[str, Any]], **kw: Any
) -> tuple[list[dict[str, Any]], list[str]]:
    return merged_groups(theirs, ours, matched(saved, mine), **kw)


def test_equal_grouping_takes_every_setting_but_the_runs_choices() -> None:
    saved = settings(lr=0.3, weight_decay=0.7, fused=True, initial_lr=1.0)
    (new,), notes = merge([["a", "b"]], [saved], [["b", "a"]], [settings(extra=1)])
    assert new == settings(lr=0.3, weight_decay=0.7, initial_lr=1.0, extra=1)
    assert notes == []


def test_groups_in_another_order_take_their_own_settings() -> None:
    saved = [settings(lr=0.1), settings(lr=0.2)]
    new, _ = merge([["a"], ["b", "c"]], saved, [["b", "c"], ["a"]], [settings(), settings()])
    assert [group["lr"] for group in new] == [0.2, 0.1]


def test_splitting_a_group_keeps_what_it_was_split_by() -> None:
    ours = [settings(weight_decay=0.9), settings(weight_decay=0.0)]
    new, notes = merge([["a", "b"]], [settings(lr=0.3)], [["a"], ["b"]], ours)
    assert [(group["lr"], group["weight_decay"]) for group in new] == [(0.3, 0.9), (0.3, 0.0)]
    assert "weight_decay kept as here" in notes[0]


def test_joining_groups_keeps_what_they_differed_by() -> None:
    saved = [settings(lr=0.3, weight_decay=0.0), settings(lr=0.3)]
    (new,), _ = merge([["a"], ["b"]], saved, [["a", "b"]], [settings(weight_decay=0.25)])
    assert (new["lr"], new["weight_decay"]) == (0.3, 0.25)


def test_keep_keeps_what_hangs_together() -> None:
    saved = settings(lr=0.3, initial_lr=0.4, base_lr=0.5, weight_decay=0.7)
    ours = settings(base_lr=0.1)
    (new,), _ = merge([["a"]], [saved], [["a"]], [ours], keep="lr")
    assert new == {**ours, "weight_decay": 0.7}
    scheduled = {**saved, "initial_weight_decay": 0.7}
    (new,), _ = merge([["a"]], [scheduled], [["a"]], [ours], keep=["weight_decay"])
    assert (new["weight_decay"], "initial_weight_decay" in new) == (0.5, False)
    with pytest.raises(ValueError, match="keep='learning_rate'"):
        merge([["a"]], [saved], [["a"]], [ours], keep=("learning_rate",))


@pytest.mark.parametrize(
    ("saved", "mine", "expected"),
    [
        ({"decay_policy": "independent"}, "decoupled", "independent"),
        ({"decay_policy": "l2"}, "decoupled", "decoupled"),
        ({"decay_policy": "corrected"}, "l2", "l2"),
        ({"decoupled_weight_decay": True}, "independent", "independent"),
        ({"decoupled_weight_decay": False}, "decoupled", "decoupled"),
        ({}, "corrected", "corrected"),
    ],
)
def test_the_kind_of_decay_is_the_constructors(
    saved: dict[str, Any], mine: str, expected: str
) -> None:
    theirs = {"lr": 0.1, **saved}
    (new,), notes = merge([["a"]], [theirs], [["a"]], [settings(decay_policy=mine)])
    assert new["decay_policy"] == expected
    other_kind = bool(saved) and (
        saved.get("decay_policy", "" if saved.get("decoupled_weight_decay") else "l2") == "l2"
    ) != (mine == "l2")
    assert bool(notes) == other_kind


@pytest.mark.parametrize(
    ("keys", "group", "kind"),
    [
        (["step", "exp_avg", "exp_avg_sq"], {"betas": (0.9, 0.99), "eps": 1e-8}, "Adam"),
        (["step", "exp_avg"], {"betas": (0.9, 0.99), "eps": 1e-8}, "Adam"),  # damaged
        (["exp_avg"], {"betas": (0.9, 0.99)}, "Lion or Muon"),
        (["momentum_buffer"], {"momentum": 0.9}, "SGD"),
        ([], {"momentum": 0.0, "dampening": 0}, "SGD"),
        ([], {"betas": (0.9, 0.99)}, "Adam"),
        ([], {}, None),
        (["step", "square_avg"], {"alpha": 0.9, "momentum": 0}, "RMSprop or Adadelta"),
        (["step", "exp_avg", "exp_inf"], {"betas": (0.9, 0.99)}, "Adamax"),
        (["step", "mu_product", "exp_avg"], {"betas": (0.9, 0.99)}, "NAdam"),
        (["step", "state1", "state2"], {"betas": (0.9, 0.99)}, "bitsandbytes"),
        (["momentum_buffer"], {"momentum": 0.9, "ns_steps": 5}, "Muon"),
        # What their owner keeps in a group: SAM its radius, others a factor of the rate.
        (["step", "exp_avg", "exp_avg_sq"], {"amsgrad": False, "rho": 0.05}, "Adam"),
        (["momentum_buffer"], {"nesterov": False, "momentum": 0.9, "lr_decay": 0.8}, "SGD"),
        ([], {"rho": 0.9}, "Adadelta"),
    ],
)
def test_state_tells_whose_it_is(keys: list[str], group: dict[str, Any], kind: str | None) -> None:
    state = {0: dict.fromkeys(keys, 1.0)}
    assert kind_of({"state": state, "param_groups": [{"params": [0], **group}]}) == kind


STATE_DICT: dict[str, Any] = {
    "state": {0: {"step": 3.0, "exp_avg": [1.0, 2.0]}, 1: {"step": 4.0, "exp_avg": None}},
    "param_groups": [
        {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "params": [0], "param_names": ["layer/w"]},
        {"lr": 0.2, "betas": (0.9, 0.99), "eps": 1e-8, "params": [1], "param_names": ["b"]},
    ],
}


def test_flat_and_back() -> None:
    flat = flatten(STATE_DICT)
    assert [*flat] == ["layer/w/step", "layer/w/exp_avg", "b/step", "param_groups"]
    back = unflatten(flat)
    assert back["param_groups"] == STATE_DICT["param_groups"]
    assert back["state"] == {0: STATE_DICT["state"][0], 1: {"step": 4.0}}


def test_flat_refuses_what_belongs_to_nothing() -> None:
    with pytest.raises(ValueError, match="no entry"):
        unflatten({"w/step": 1})
    with pytest.raises(ValueError, match="'c/step' belongs to no parameter"):
        unflatten({**flatten(STATE_DICT), "c/step": 1})
    with pytest.raises(ValueError, match="'ema' belongs to no parameter"):
        flatten({**STATE_DICT, "state": {"ema": 0.9}})


def test_a_summary_has_the_facts() -> None:
    def facts_of(key: str, value: Any) -> Facts | None:
        if isinstance(value, float):
            return Facts((), "float32", 4, value=value)
        return Facts((2,), "float32", 8, problem="NaN") if value else None

    (found,) = find_states({"model": {}, "states": [STATE_DICT]})
    where, state_dict = found
    summary = summarize(state_dict, facts_of)
    assert where == "states.0"
    assert summary["kind"] == "Adam"
    assert summary["bytes"] == 16
    assert summary["steps"] == [3.0, 4.0]
    assert summary["problems"] == ["layer/w: exp_avg holds NaN"]
    assert [each["name"] for each in summary["parameters"]] == ["layer/w", "b"]
    assert summary["groups"][1]["lr"] == 0.2
