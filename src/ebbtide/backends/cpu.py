"""The compiled core behind the backend interface.

`CompiledBackend` keeps one native table for its optimizer. A step is one native call: it checks
every group, parameter, state array and gradient against the table, has the face read those groups
that have changed, takes the gradients' addresses, and runs all rows in one parallel region. Where
anything else moved it answers "stale", nothing is written, and the face plans anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ebbtide.plan import Bucket, Outcome, Plan
from ebbtide.reading import Lasting
from ebbtide.rules import Scalars

try:
    from ebbtide import _core
except ImportError:  # installed where no compiler was found
    _core = None  # type: ignore[assignment]

__all__ = [
    "CompiledBackend",
    "Reader",
    "available",
    "describe",
    "memory_stream",
    "one_thread",
    "table_of",
]

_RULES = {"adam": 0, "sgd": 1}
_COMPLETE = Outcome(())  # every element was stepped

# Reads the group of an index. `None` where the plan no longer fits it.
Reader = Callable[[int], Lasting | None]

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

    Attributes:
        others: Whether `rerun` stepped other parameters than when `stepped` was last asked, which
            rest while they have no gradient.
    """

    name = "cpu"

    def __init__(self, exchange_api: object | None = None) -> None:
        self._exchange_api = exchange_api
        self._table: Any = None
        self.others = False

    def forget(self) -> None:
        """Drop the table: the next step plans anew."""
        self._table = None

    @property
    def loaded(self) -> bool:
        """Whether there is a table to step with."""
        return self._table is not None

    def load(self, plan: Plan) -> list[tuple[int, int]]:
        """Take the rows of a plan; returns the (group, step) pairs it needs scalars for."""
        plan.check_formats()
        self._table = table_of(plan, self._exchange_api)
        keys: list[tuple[int, int]] = self._table.needed()
        return keys

    def run(self, plan: Plan, buckets: list[Bucket], *, grad_scale: float, guard: bool) -> Outcome:
        """Take one step of the plan last given to `load`."""
        self._table.run(buckets, grad_scale, guard)
        outcome = Outcome(self._table.untouched())
        if not plan.cacheable:
            self.forget()
        return outcome

    def sum_squares(self, plan: Plan) -> float:
        """Return the sum of squares of the gradients of the plan last given to `load`."""
        del plan
        return float(self._table.sum_squares())

    @property
    def norm(self) -> float:
        """Global norm of the gradients that `rerun` has looked at, before clipping."""
        return float(self._table.norm)

    def rerun(
        self,
        groups: list[dict[str, Any]],
        params: list[list[Any]] | None,
        grads: list[Any] | None,
        states: dict[Any, Any],
        read: Reader,
        grad_scale: float,
        guard: bool,
        max_norm: float = 0.0,
    ) -> Outcome | None:
        """Step with the remembered table; `None` if that cannot be (nothing is written then).

        That is where anything moved, and where the norm to be looked at is not finite.

        Args:
            groups: The param groups.
            params: The list of parameters of each group; `None` takes `group["params"]`.
            grads: Gradients in the same order; `None` reads `.grad`.
            states: All state of the optimizer.
            read: Reads a group that has changed.
            grad_scale: Multiplies every gradient.
            guard: Leave elements untouched whose new state would not be finite.
            max_norm: Clip the global norm; 0 does not look at it, infinity does and clips nothing.
        """
        table = self._table
        if table is None:
            return None
        untouched = table.step(groups, params, grads, states, read, grad_scale, guard, max_norm)
        if untouched == 0:
            return _COMPLETE
        if untouched < 0:
            return None
        self.others |= untouched >= _core.OTHERS_STEPPED
        return Outcome(table.untouched())

    def stepped(self) -> list[Any]:
        """Return the parameters that the last step took."""
        self.others = False
        stepped: list[Any] = self._table.stepped()
        return stepped
