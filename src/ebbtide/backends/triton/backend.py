"""Triton's kernels behind the backend interface.

The host never waits for a device here, except where a caller asks for a number.
"""

from __future__ import annotations

import torch

from ebbtide.backends.triton.device import Device, Groups
from ebbtide.backends.triton.prologue import VERDICT
from ebbtide.backends.triton.question import Question
from ebbtide.plan import Bucket, Outcome, Plan

__all__ = ["TritonBackend"]


class TritonBackend:
    """Runs plans of rows on one GPU or several, and remembers the last one."""

    name = "triton"

    def __init__(self) -> None:
        self._devices: dict[str, Device] = {}
        self._active: list[Device] = []
        self._lead: Device | None = None  # decided last

    @property
    def launches(self) -> int:
        """Number of kernels launched so far."""
        return sum(device.launcher.launches for device in self._devices.values())

    @property
    def has_decided(self) -> bool:
        """Whether a question was ever asked."""
        return self._lead is not None

    def decided(self, name: str) -> torch.Tensor:
        """Return a number of the last verdict, by its name in `prologue.VERDICT`, on the device."""
        assert self._lead is not None
        return self._lead.verdict[VERDICT.index(name)]

    def forget(self) -> None:
        """Drop the tables: the next step needs a plan."""
        for device in self._active:
            device.forget()
        self._active = []

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """(group, step) of the next step of the remembered rows that count on the host."""
        keys = [key for device in self._active for key in device.buckets]
        return list(dict.fromkeys(keys))

    @property
    def order(self) -> list[int]:
        """Entries of the plan in the order in which `send_gradients` takes addresses."""
        return [entry for device in self._active for entry, _ in device.rows]

    def load(self, plan: Plan) -> list[tuple[int, int]]:
        """Take the rows of a plan; returns the (group, step) pairs it needs scalars for."""
        self.forget()
        rows = list(plan.rows())
        for name in dict.fromkeys(row.device for *_, row in rows):
            device = self._devices.get(name)
            if device is None:
                device = self._devices[name] = Device(torch.device(name))
            device.load([each for each in rows if each[2].device == name], len(plan.entries))
            self._active.append(device)
        return self.buckets

    def leave_counts(self) -> None:
        """Let the caller advance the rows' step counts from now on."""
        for device in self._active:
            device.leave_counts()

    def send_gradients(self, addresses: torch.Tensor) -> None:
        """Let the rows have their gradients elsewhere, in `order`; int64, on the host."""
        at = 0
        for device in self._active:
            count = len(device.rows)
            device.send_gradients(addresses[at : at + count])
            at += count

    def run(
        self,
        plan: Plan,
        buckets: list[Bucket],
        *,
        grad_scale: float,
        guard: bool,
        groups: Groups = (),
        question: Question | None = None,
    ) -> Outcome:
        """Take one step of the plan last given to `load`.

        Args:
            plan: As in `ebbtide.plan.Backend`.
            buckets: As there.
            grad_scale: As there.
            guard: As there.
            groups: Hyperparameters of every group, for rows that count on the device.
            question: What has to be decided of the step, on the device.

        Returns:
            Nothing of what was left untouched, which is not known yet: see `spoilt`.
        """
        judged = question is not None
        if question is not None:
            self._decide(plan, question, groups)
        for device in self._active[1:] if judged else self._active:
            device.count(plan.rule, groups, judged=judged)
        for device in self._active:
            device.step(plan.rule, buckets, grad_scale=grad_scale, guard=guard, judged=judged)
        return Outcome([])

    def _decide(self, plan: Plan, question: Question, groups: Groups) -> None:
        """Let the first device answer, and tell the others."""
        lead, *others = self._active
        self._lead = lead
        if question.ranks is None or not question.wants_norm:
            partial = self._partial_sums(question, 0)
        else:
            ways = range(question.ranks.ways)
            partial = question.ranks.total([self._partial_sums(question, way) for way in ways])
        lead.decide(plan.rule, question.on(lead.device), partial, groups)
        for device in others:
            device.verdict.copy_(lead.verdict, non_blocking=True)

    def _partial_sums(self, question: Question, way: int) -> torch.Tensor:
        """Return sums of squares of all devices, on the first one."""
        lead, *others = self._active
        sums = [device.partial_sums(question, way) for device in self._active]
        if not others:
            return sums[0]
        return torch.cat([each.to(lead.device, non_blocking=True) for each in sums])

    @property
    def captures(self) -> bool:
        """Whether steps are being recorded in a graph, which must not be waited for."""
        return any(device.captures for device in self._active)

    @property
    def alarmed(self) -> bool:
        """Whether elements are known to have been left untouched; does not wait."""
        return any(device.alarmed for device in self._active)

    @property
    def flag(self) -> torch.Tensor:
        """Not 0 where elements were left untouched; on the first device."""
        lead, *others = [device.flag for device in self._active]
        for each in others:
            lead = lead + each.to(lead.device, non_blocking=True)
        return lead

    def spoilt(self) -> list[tuple[int, int, int]]:
        """Return (entry, elements left untouched, step) of rows that have any; then forget them.

        Waits for the devices.
        """
        return [each for device in self._active for each in device.spoilt()]
