"""The compiled core behind the backend interface.

`CompiledBackend` keeps one native table for its optimizer. A step is one native call: it checks
every parameter, state array and gradient against the table, takes the gradients' addresses, and
runs all rows in one parallel region. Where anything moved it answers "stale", nothing is written,
and the face plans anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ebbtide.plan import Bucket, Outcome, Plan
from ebbtide.rules import Scalars

try:
    from ebbtide import _core
except ImportError:  # installed where no compiler was found
    _core = None  # type: ignore[assignment]

__all__ = ["CompiledBackend", "available", "describe", "memory_stream", "one_thread", "table_of"]

_RULES = {"adam": 0, "sgd": 1}

if _core is not None:
    assert len(Scalars._fields) == _core.SCALAR_COUNT, "rules.py and csrc/step.h disagree"
    if os.environ.get("EBBTIDE_ISA"):
        _core.set_instruction_set(os.environ["EBBTIDE_ISA"])


def available() -> bool:
    """Tell whether the compiled core is there and wanted (`EBBTIDE_BACKEND` is not "pure")."""
    return _core is not None and os.environ.get("EBBTIDE_BACKEND", "cpu") != "pure"


def describe() -> dict[str, str]:
    """Return what the core runs on this machine, for `ebbtide doctor`."""
    if _core is None:
        return {"core": "not compiled: no C++ compiler was found at install; steps are slow"}
    if not available():
        return {"core": "compiled, but EBBTIDE_BACKEND=pure asks for the reference"}
    forced = " (EBBTIDE_ISA)" if os.environ.get("EBBTIDE_ISA") else " (widest this machine has)"
    runtime = _core.thread_runtime()
    whose = "torch's" if "/torch/" in runtime else "the system's"
    return {
        "core": "compiled",
        "instruction set": _core.instruction_set() + forced,
        "instruction sets here": ", ".join(_core.instruction_sets()),
        "threads": str(_core.threads()),
        "thread runtime": f"{whose}, {runtime}",
        "processor quota": "none" if _core.cpu_quota() >= 1 << 16 else str(_core.cpu_quota()),
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Step on the caller's thread alone, for callers who run several optimizers side by side."""
    if _core is None:
        yield
        return
    _core.set_threads(1)
    try:
        yield
    finally:
        _core.set_threads(0)  # as many as the runtime gives again


def memory_stream(elements: int, repeats: int) -> float:
    """Return the seconds that the memory traffic of a float32 AdamW step takes at least.

    Args:
        elements: Of each of the four arrays.
        repeats: Passes, of which the fastest counts.
    """
    if _core is None:
        return 0.0
    return float(_core.memory_stream(elements, repeats))


def table_of(plan: Plan, exchange_api: object | None) -> Any:
    """Make the core's table of a plan, which tells whether the plan still holds.

    Args:
        plan: Its rows may lie on a GPU, where another backend steps them.
        exchange_api: As in `CompiledBackend`.
    """
    table = _core.Table(_RULES[plan.rule.name], exchange_api)
    for entry, (param, group, row, state) in enumerate(plan.entries):
        # NumPy arrays cannot be hashed: their state is kept under their names.
        by_name = exchange_api is None and row is not None
        name = row.name if by_name and row else param
        table.add(param, group, row, state, name, entry in plan.elsewhere)
    return table


class CompiledBackend:
    """Runs plans in the compiled core and remembers the last one.

    Args:
        exchange_api: torch's DLPack exchange table (a capsule), or `None` for NumPy arrays.
    """

    name = "cpu"

    def __init__(self, exchange_api: object | None = None) -> None:
        self._exchange_api = exchange_api
        self._table: Any = None
        self._buckets: list[tuple[int, int]] = []
        self._others = False
        self._counts = "all"  # which rows have a step count of their own

    def forget(self) -> None:
        """Drop the table: the next step plans anew."""
        self._table = None

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """(group, step) of the next step of the remembered table; empty without one."""
        return self._buckets if self._table is not None else []

    def load(self, plan: Plan) -> list[tuple[int, int]]:
        """Take the rows of a plan; returns the (group, step) pairs it needs scalars for."""
        plan.check_formats()
        self._table = table = table_of(plan, self._exchange_api)
        counted = {row.step_address != 0 for _, _, row in plan.rows()}
        self._counts = "some" if len(counted) == 2 else "all" if True in counted else "none"
        self._buckets = table.needed()
        return self._buckets

    def run(self, plan: Plan, buckets: list[Bucket], *, grad_scale: float, guard: bool) -> Outcome:
        """Take one step of the plan last given to `load`."""
        self._table.run(buckets, grad_scale, guard)
        outcome = Outcome(self._table.untouched())
        if plan.cacheable:
            self._buckets = self._table.needed()
        else:
            self.forget()
        return outcome

    def sum_squares(self, plan: Plan) -> float:
        """Return the sum of squares of the gradients of the plan last given to `load`."""
        del plan
        return float(self._table.sum_squares(None, None, None))

    def look(
        self, params: list[list[Any]], grads: list[Any] | None, states: dict[Any, Any]
    ) -> float | None:
        """Return the sum of squares of the gradients; `None` if anything moved.

        The arguments are those of `rerun`, which then takes `None` for `params`.
        """
        total = self._table.sum_squares(params, grads, states)
        return None if total is None else float(total)

    def stepped(self) -> list[Any] | None:
        """Return the parameters that `rerun` stepped, if they are others than the time before.

        Parameters rest while they have no gradient.
        """
        return self._table.stepped() if self._others else None

    def rerun(
        self,
        params: list[list[Any]] | None,
        grads: list[Any] | None,
        states: dict[Any, Any],
        buckets: list[Bucket],
        grad_scale: float,
        guard: bool,
    ) -> Outcome | None:
        """Step with the remembered table; `None` if anything moved (nothing is written then).

        Args:
            params: The list of parameters of each group; `None` right after `look`.
            grads: Gradients in the same order; `None` reads `.grad`.
            states: All state of the optimizer.
            buckets: Scalars for `self.buckets`.
            grad_scale: Multiplies every gradient.
            guard: Leave elements untouched whose new state would not be finite.
        """
        untouched = self._table.step(params, grads, states, buckets, grad_scale, guard)
        if untouched < 0:
            return None
        self._others = untouched >= _core.OTHERS_STEPPED
        if self._others:
            untouched -= _core.OTHERS_STEPPED
        if self._counts == "all":
            self._buckets = [(group, step + 1) for group, step in self._buckets]
        elif self._counts == "none":  # all later steps are alike
            self._buckets = list(dict.fromkeys((group, 2) for group, _ in self._buckets))
        else:
            self._buckets = self._table.needed()
        return Outcome(self._table.untouched() if untouched else [])
