"""What an optimizer holds beyond a step: checked against its model, saved, loaded, pickled."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from ebbtide.hyperparameters import OURS, Options
from ebbtide.rules import Rule
from ebbtide.torch.checkpoint import load_state_dict
from ebbtide.torch.storage import plain
from ebbtide.torch.validation import check_model

__all__ = ["Persistent"]


class Persistent(Options, torch.optim.Optimizer):
    """State dicts and pickles of an optimizer."""

    _rule: Rule
    _default_policy: str
    _step_supports_amp_scaling: bool
    # What survives pickling and copying beside torch's defaults, state and param_groups.
    _options = ("nonfinite", "clip_grad_norm", "skipped_steps")

    @property
    def skipped_steps(self) -> int | torch.Tensor:
        """How many steps left everything as it was."""
        raise NotImplementedError

    def _reset(self) -> None:
        """Forget what belongs to a run: the remembered plan, what the last step said."""
        raise NotImplementedError

    def check(
        self,
        model: torch.nn.Module | Iterable[tuple[str, torch.Tensor]],
        *,
        partial: bool = False,
    ) -> None:
        """Compare the parameters of this optimizer with those of a model.

        Args:
            model: The model, or its named parameters.
            partial: Whether other optimizers step the rest of the model.

        Raises:
            ValueError: The optimizer holds parameters that the model no longer has, such as those
                replaced by `load_state_dict(assign=True)`, or lacks trainable ones that the model
                has; they are named.

        Example:
            >>> import torch
            >>> from ebbtide.torch import SGD
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = SGD([("weight", model.weight)])
            >>> try:
            ...     optimizer.check(model)
            ... except ValueError as error:
            ...     print(error)
            in the model but not in the optimizer: bias
        """
        check_model(self.param_groups, model, partial=partial)

    def state_dict(self, *, portable: bool = False) -> dict[str, Any]:
        """Return state and hyperparameters, as `torch.optim.Optimizer.state_dict` does.

        Args:
            portable: Give 8-bit moments as float32 `exp_avg` and `exp_avg_sq`, which `torch.optim`
                loads, and leave out the residuals of 16-bit parameters, for which it has no place.
                Without, the state resumes here bit for bit; float32 and bfloat16 state is the same
                either way.
        """
        packed: dict[str, Any] = super().state_dict()
        if portable:
            packed["state"] = {
                index: {key: value for key, value in plain(state).items() if key != "residual"}
                for index, state in packed["state"].items()
            }
        return packed

    def load_state_dict(
        self,
        state_dict: Mapping[str, Any],
        *,
        strict: bool = True,
        keep: Collection[str] = (),
    ) -> None:
        """Load state and hyperparameters, from ours or from torch's class of the same name.

        Parameters are matched by name where both sides have names, whatever their order and
        grouping; else by position. State keeps the dtype it was saved in, unless the group asks for
        another format; 8-bit state is decoded where the group does not ask for it. How a step is
        computed (`foreach`, `fused`, `capturable`, `differentiable`) and kept (`state_format`,
        `master_format`) is not taken from the file. All or nothing: where this raises, nothing has
        changed.

        Args:
            state_dict: From `state_dict` here or of `torch.optim`; it is copied.
            strict: Refuse a state that lacks parameters, has others, other shapes or unusable
                values. With `False` what fits is loaded, the rest starts anew, and a warning lists
                it.
            keep: Group keys whose values here are kept, such as `("lr", "weight_decay")`. Keeping
                `lr` keeps `initial_lr` and `base_lr` with it.

        Raises:
            CheckpointError: A `ValueError`; it lists what is missing, unexpected, of another shape,
                moved between groups or unusable.
        """
        load_state_dict(self, state_dict, strict=strict, keep=keep)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickling keeps: torch's three entries and our options."""
        return {**super().__getstate__(), **{key: getattr(self, key) for key in self._options}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a checkpoint; keys that older files lack get their defaults."""
        super().__setstate__(state)
        for key, value in (("nonfinite", "raise"), ("clip_grad_norm", None)):
            own = self.__dict__.get(f"_{key}", value)
            setattr(self, key, self.__dict__.pop(key, own))
        # A copy brings the number along; what is loaded into an optimizer leaves its own.
        own = self.skipped_steps if "_devices" in self.__dict__ else 0
        self._skipped_steps = self.__dict__.pop("skipped_steps", own)
        if self.defaults.get("fused"):
            self._step_supports_amp_scaling = True
        self._reset()
        for group in self.param_groups:
            policy = group.get("decay_policy")
            for key, value in {**self.defaults, **OURS}.items():
                group.setdefault(key, value)
            if policy is None:
                group["decay_policy"] = self._default_policy
            if group["base_lr"] is None:
                group["base_lr"] = float(group.get("initial_lr", group["lr"]))
            self._restore_steps(group)

    def _restore_steps(self, group: dict[str, Any]) -> None:
        """Turn step counts that very old checkpoints hold as numbers into tensors."""
        for param in group["params"]:
            state = self.state.get(param)
            if state and "step" in state and not torch.is_tensor(state["step"]):
                state["step"] = torch.tensor(float(state["step"]))
