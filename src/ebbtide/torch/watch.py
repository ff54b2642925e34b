"""Whether anything has moved since a plan for a GPU was made, without planning again."""

from __future__ import annotations

from typing import Any

import torch

from ebbtide.backends.cpu import table_of
from ebbtide.plan import Plan

__all__ = ["Watch"]


class Watch:
    """What must still be true of an optimizer for its plan to hold; the core looks at it.

    Parameters, gradients and the state's dictionaries are looked at in every step. A state array
    that is given other memory (`tensor.data = ...`) is noticed at once where arrays are large, and
    within 16 steps where they are small; until then its old memory is stepped, which is held here.

    Args:
        plan: Of the parameters on GPUs; a step of it has been taken.
        order: Entries of the plan in the order in which gradients' addresses are wanted.
        counts: Whether the GPUs count the steps.

    Attributes:
        stepped: Parameters of the plan.
        addresses: Of their gradients, as they were seen last.
    """

    def __init__(self, plan: Plan, order: list[int], *, counts: bool) -> None:
        self.plan = plan
        self.counts = counts
        self.stepped = [plan.entries[entry][0] for entry in order]
        rows = {entry: row for entry, _, row in plan.rows()}
        self.addresses = torch.tensor([rows[entry].grad.address for entry in order])
        self._to = self.addresses.data_ptr()
        self._table: Any = table_of(plan, getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))
        self._table.place(order)

    def look(self, params: list[list[torch.Tensor]], states: Any) -> bool | None:
        """Look at the gradients; `None` if anything has moved that makes the plan wrong.

        Args:
            params: Of each group.
            states: All state of the optimizer.

        Returns:
            Whether `addresses` are others than before.
        """
        moved: int = self._table.gradients(params, states, self._to)
        return None if moved < 0 else moved > 0

    def advance(self) -> None:
        """Count a step where counts lie in the host's memory."""
        self._table.advance()
