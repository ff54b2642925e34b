"""What torch wraps around every optimizer's `step`, done only where somebody listens."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import torch
from torch.optim import optimizer as torch_optimizer

__all__ = ["call_with_hooks", "keep_out_of_graphs", "nobody_listens"]

_pre_hooks = torch_optimizer._global_optimizer_pre_hooks
_post_hooks = torch_optimizer._global_optimizer_post_hooks
_profiler_enabled = torch._C._autograd._profiler_enabled

F = TypeVar("F", bound=Callable[..., Any])


def nobody_listens(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether torch's wrapper around `step` (hooks, profiler range) would do nothing."""
    return not (
        _pre_hooks
        or _post_hooks
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _profiler_enabled()
    )


def call_with_hooks(optimizer: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `step` between the hooks, in the profiler's range; what torch's own wrapper does."""
    arguments: tuple[Any, ...] = (optimizer, *args)
    name = f"Optimizer.step#{type(optimizer).__name__}.step"
    with torch.autograd.profiler.record_function(name):
        for pre_hook in chain(_pre_hooks.values(), optimizer._optimizer_step_pre_hooks.values()):
            result = pre_hook(optimizer, arguments, kwargs)
            if result is not None:
                if not isinstance(result, tuple) or len(result) != 2:
                    raise RuntimeError(
                        f"{pre_hook} must return None or a tuple of (new_args, new_kwargs), "
                        f"but got {result}."
                    )
                arguments, kwargs = result
        loss = step(*arguments[1:], **kwargs)
        optimizer._optimizer_step_code()
        for post_hook in chain(optimizer._optimizer_step_post_hooks.values(), _post_hooks.values()):
            post_hook(optimizer, arguments, kwargs)
    return loss


def keep_out_of_graphs(function: F) -> F:
    """Have `torch.compile` break its graph at a function and run it, and what it calls, as it is.

    `torch.compiler.disable` does the same through a wrapper that costs a microsecond a call and
    imports the compiler at the first one.
    """
    try:
        from torch._C._dynamo import eval_frame

        skip = eval_frame._FrameExecStrategy(
            eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP
        )
        eval_frame.set_code_exec_strategy(function.__code__, skip)
    except (AttributeError, ImportError):  # torch keeps these to itself
        disabled: F = torch.compiler.disable(function)
        return disabled
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function
