"""The GPUs of one optimizer: the plan they remember, what they decide, what they report late."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ebbtide.backends.cpu import available
from ebbtide.plan import Outcome, Plan, nonfinite_message
from ebbtide.torch.agreement import Agreement, Ranks
from ebbtide.torch.ranks import Way, way_of
from ebbtide.torch.rows import Planner
from ebbtide.torch.watch import Watch

if TYPE_CHECKING:
    from ebbtide.backends.triton.backend import TritonBackend
    from ebbtide.backends.triton.question import Question
    from ebbtide.torch.base import Optimizer

__all__ = ["ELSEWHERE", "Devices", "captures", "decides"]

ELSEWHERE = "non-finite gradient on another rank, which names it"


def decides(optimizer: Optimizer) -> bool:
    """Tell whether a GPU may drop a step, so that it must count the steps as well."""
    return optimizer.nonfinite == "skip" or hasattr(optimizer, "found_inf")


class Devices:
    """Steps the rows that Triton launches; their plan is remembered while nothing moves.

    Attributes:
        backend: `None` until there is such a row.
        question: What the GPUs decide of the step that is being taken, `None` if nothing.
        active: Whether they take part in the plan that was made last.
        alone: Whether they take all of it.
    """

    def __init__(self) -> None:
        self.backend: TritonBackend | None = None
        self.question: Question | None = None
        self.active = self.alone = False
        self._alarmed = False  # when the last step began
        self._watch: Watch | None = None
        self._ranks: Ranks | None = None
        self._agreement: Agreement | None = None  # of ranks, on the last step
        self._due: Agreement | None = None  # on the step before

    def forget(self) -> None:
        """Let the next step plan anew."""
        self._watch = None

    def ask(self, optimizer: Optimizer, planner: Planner) -> bool:
        """Tell whether the GPUs decide of a step without the host: where nothing else is stepped.

        Sums over a GPU and the CPU wait for the device.
        """
        on_host = planner.tensors or any(planner.plan.rows())
        self.active = any(planner.launched.rows())
        self.alone = self.active and not on_host
        self.question = None
        if self.alone:
            ways: dict[Way | None, int] = {}
            normed = _wants_norm(_question_of(optimizer, None))
            for param, _, row, _ in planner.launched.entries:
                way = ways.setdefault(way_of(param), len(ways))
                if row is not None and normed:  # else rows of all ways share their launches
                    row.way = way
            self._ranks = Ranks(list(ways), optimizer._meshes) if optimizer._meshes else None
            self.question = _question_of(optimizer, self._ranks)
        return self.question is not None

    def run(self, optimizer: Optimizer, planner: Planner, scale: float) -> None:
        """Take the step of a new plan.

        Args:
            optimizer: Whose parameters are stepped.
            planner: Holds the plan; it has been committed.
            scale: Multiplies every gradient.
        """
        plan = planner.launched
        if self.backend is None:
            from ebbtide.backends.triton.backend import TritonBackend

            self.backend = TritonBackend()
        self.backend.load(plan)
        self._step(optimizer, plan, scale)
        asks_host = self.question is None and _question_of(optimizer, None) is not None
        if available() and not asks_host and self._lasts(optimizer, planner):
            self._watch = Watch(plan, self.backend.order, counts=decides(optimizer))
            self.backend.leave_counts()

    def _lasts(self, optimizer: Optimizer, planner: Planner) -> bool:
        """Tell whether a plan, and that of the CPU beside it, hold while nothing moves."""
        beside = planner.plan.cacheable and not planner.tensors and not optimizer._meshes
        return planner.launched.cacheable and (self.alone or beside)

    def rerun(self, optimizer: Optimizer) -> Outcome | None:
        """Step with the remembered plan; `None` if anything moved (nothing is written then)."""
        watch, backend = self._watch, self.backend
        if watch is None or backend is None or watch.counts != decides(optimizer):
            return None
        asked, self.question = self.question, _question_of(optimizer, self._ranks)
        if (asked is None) != (self.question is None) or _wants_norm(asked) != self.normed:
            return None
        optimizer._check_capture()
        for index, group in enumerate(optimizer.param_groups):
            optimizer._reader(index).check(group)
        if self._watch is not watch:  # a group has changed so much that the plan was forgotten
            return None
        params = [group["params"] for group in optimizer.param_groups]
        moved = watch.look(params, optimizer.state)
        if moved is None:
            return None
        outcome = Outcome([]) if self.alone else _rerun_beside(optimizer, params, watch)
        if outcome is None:
            return None
        if moved:
            backend.send_gradients(watch.addresses)
        self._step(optimizer, watch.plan, 1.0)
        watch.advance()
        return outcome

    def _step(self, optimizer: Optimizer, plan: Plan, scale: float) -> None:
        backend = self.backend
        assert backend is not None
        # A step never raises what it finds itself, however fast the GPU is.
        self._alarmed = backend.alarmed
        self._due, self._agreement = self._agreement, None
        backend.run(
            plan,
            optimizer._buckets(backend.buckets),
            grad_scale=scale,
            guard=optimizer._guards,
            groups=optimizer.param_groups,
            question=self.question,
        )
        raises = optimizer.nonfinite == "raise" and optimizer._guards
        if optimizer._meshes and self.alone and raises and not backend.captures:
            self._agreement = Agreement(backend.flag, optimizer._meshes)

    def agreed(self, optimizer: Optimizer) -> list[tuple[int, int]]:
        """Return (entry, elements left untouched) where ranks must raise at once; waits there."""
        late = self.alone or not optimizer._meshes
        if late or optimizer.nonfinite != "raise" or self.backend is None:
            return []
        return [(entry, count) for entry, count, _ in self.backend.spoilt()]

    def report(self, optimizer: Optimizer, *, wait: bool) -> None:
        """Raise what is known of earlier steps; all ranks do so in the same step.

        Args:
            optimizer: Which is named in the error.
            wait: Find out what is not known yet. A capture is not interrupted for that.

        Raises:
            FloatingPointError: Elements were left untouched.
        """
        if self.backend is None or optimizer.nonfinite != "raise":
            return
        may_wait = wait and not self.backend.captures
        if optimizer._meshes:
            asked = (self._due, self._agreement if may_wait else None)
            if not any(each is not None and each.reached() for each in asked):
                return
        elif not (self._alarmed or may_wait):
            return
        self._alarmed = False
        self._due = self._agreement = None
        found = self.backend.spoilt()
        if found:
            named = optimizer._named()
            rows = [(named[entry][0], count, named[entry][1].numel()) for entry, count, _ in found]
            raise FloatingPointError(nonfinite_message(rows, found[0][2]))
        if optimizer._meshes:
            raise FloatingPointError(ELSEWHERE)

    @property
    def normed(self) -> bool:
        """Whether the GPUs took the last norm."""
        return _wants_norm(self.question)

    @property
    def norm(self) -> torch.Tensor:
        """The norm of the last gradients, on a GPU until the next step."""
        return self._decided("norm")

    @property
    def skipped(self) -> torch.Tensor:
        """Whether the GPUs dropped the last step, on a GPU."""
        return self._decided("apply") == 0

    def skipped_steps(self, optimizer: Optimizer) -> int | torch.Tensor:
        """Return how many steps the GPUs have dropped."""
        if self.backend is None or not self.backend.has_decided:
            return 0
        steps = self._decided("skipped")
        return steps if captures(optimizer) else int(steps)

    def _decided(self, name: str) -> torch.Tensor:
        assert self.backend is not None
        return self.backend.decided(name)


def _rerun_beside(
    optimizer: Optimizer, params: list[list[torch.Tensor]], watch: Watch
) -> Outcome | None:
    """Take the CPU's part of a step; `None` if anything moved."""
    backend, groups, state = optimizer._backend, optimizer.param_groups, optimizer.state
    guard = optimizer._guards
    outcome = backend.rerun(groups, params, None, state, optimizer._read, 1.0, guard)
    if backend.others and outcome is not None:
        optimizer._stepped = backend.stepped() + watch.stepped
    return outcome


def captures(optimizer: Optimizer) -> bool:
    """Whether what a step decides must not be read: it may be part of a graph."""
    return any(group.get("capturable") for group in optimizer.param_groups)


def _wants_norm(question: Question | None) -> bool:
    return question is not None and question.wants_norm


def _question_of(optimizer: Optimizer, ranks: Ranks | None) -> Question | None:
    scaled = hasattr(optimizer, "found_inf")
    skip, clip = optimizer.nonfinite == "skip", optimizer.clip_grad_norm
    if not (scaled or skip or clip is not None):
        return None
    from ebbtide.backends.triton.question import Question

    values: dict[str, Any] = {
        "found_inf": getattr(optimizer, "found_inf", None),
        "loss_scale": getattr(optimizer, "grad_scale", None),
    }
    finite_only = optimizer.nonfinite == "raise"
    return Question(**values, max_norm=clip, skip=skip, finite_only=finite_only, ranks=ranks)
