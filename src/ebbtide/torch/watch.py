"""Whether anything has moved since a plan for a GPU was made, without planning again."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch

from ebbtide.plan import Plan
from ebbtide.torch.ranks import local_of

if TYPE_CHECKING:
    from ebbtide.torch.base import Optimizer

__all__ = ["Watch"]

# State arrays are looked at in turns of so many at least, which costs some microseconds.
_AT_ONCE = 64
_TURNS = 16  # at most
_address = torch.Tensor.data_ptr
_strides = torch.Tensor.stride
_dtype = attrgetter("dtype")
_grad = attrgetter("grad")


class Watch:
    """What must still be true of an optimizer for its plan to hold.

    State that is given other memory (`tensor.data = ...`) is noticed at once where it is all of it,
    or of an optimizer with 64 arrays at most; a single array of a larger one within 16 steps, and
    until then its old memory is stepped, which is held here. Parameters and gradients are looked
    at in every step.

    Args:
        optimizer: Whose plan has just been taken.
        plan: Of its parameters on GPUs; it has no others.
        order: Entries of the plan in the order in which gradients are returned.
        counts: Whether the GPUs count the steps.
    """

    def __init__(self, optimizer: Optimizer, plan: Plan, order: list[int], *, counts: bool) -> None:
        self.plan = plan
        self.counts = counts
        self._order = order
        self._params = [entry[0] for entry in plan.entries]
        self._present = [entry[2] is not None for entry in plan.entries]
        self._stepped = [self._params[entry] for entry in order]
        self._locals = list(map(local_of, self._stepped))
        rows = {entry: row for entry, (_, _, row, _) in enumerate(plan.entries) if row is not None}
        self._lazy = [at for at, entry in enumerate(order) if rows[entry].lazy_grad]
        self._sharded = not _same(self._locals, self._stepped)
        self._addresses = list(map(_address, self._locals))
        self._layout = self._layout_of(list(map(_grad, self._params)))
        self._keys, self._states = list(optimizer.state), list(optimizer.state.values())
        self._values = list(_values_of(self._states))
        self._tensors = [local_of(each) for each in self._values if torch.is_tensor(each)]
        self._held = [tensor.detach() for tensor in self._tensors]
        self._turns = min(_TURNS, max(1, len(self._tensors) // _AT_ONCE))
        self._looks = 0

    def gradients(self, optimizer: Optimizer) -> list[int] | None:
        """Return the address of each gradient; `None` if anything has moved.

        Args:
            optimizer: The same as at the construction.
        """
        params = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
        if not _same(params, self._params) or not self._state_holds(optimizer):
            return None
        if self._sharded and not _same(map(local_of, self._stepped), self._locals):
            return None
        if list(map(_address, self._locals)) != self._addresses:
            return None
        given = list(map(_grad, params))
        if [grad is not None for grad in given] != self._present:
            return None
        if self._layout_of(given) != self._layout:
            return None
        grads = self._grads(given)
        if any(grads[at].is_conj() or grads[at].is_neg() for at in self._lazy):
            return None
        return list(map(_address, grads))

    def _state_holds(self, optimizer: Optimizer) -> bool:
        # Looking a parameter up costs more than all of this: its hash is computed in Python.
        holds = (
            _same(optimizer.state, self._keys)
            and _same(optimizer.state.values(), self._states)
            and _same(_values_of(self._states), self._values)
        )
        self._looks += 1
        part = slice(self._looks % self._turns, None, self._turns)
        looked_at, held = self._tensors[part], self._held[part]
        return holds and list(map(_address, looked_at)) == list(map(_address, held))

    def _grads(self, given: list[Any]) -> list[torch.Tensor]:
        grads = [given[entry] for entry in self._order]
        return list(map(local_of, grads)) if self._sharded else grads

    def _layout_of(self, given: list[Any]) -> tuple[list[Any], list[Any]]:
        grads = self._grads(given)
        return list(map(_dtype, grads)), list(map(_strides, grads))


def _values_of(states: Iterable[dict[str, Any]]) -> Iterable[Any]:
    """Return all values of all states; another order of keys is another order of them."""
    return chain.from_iterable(map(dict.values, states))


def _same(these: Iterable[Any], those: list[Any]) -> bool:
    """Whether two lists hold the same objects."""
    listed = list(these)
    return len(listed) == len(those) and all(map(is_, listed, those))
