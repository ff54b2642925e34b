"""What a checkpoint file holds, read from the file alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ebbtide.checkpoint import CheckpointError, Facts, find_states, is_sealed, problem_of, summarize
from ebbtide.torch import checkpoint

__all__ = ["contents", "facts_of"]


def contents(path: str | os.PathLike[str], *, trust: bool = False) -> dict[str, Any]:
    """Describe a checkpoint, from us or from torch: `ebbtide inspect` prints it.

    Args:
        path: File of `torch.save`. Tensors are read from the disk where they lie.
        trust: Unpickle any object in it, which can run code; else tensors and plain values only.

    Returns:
        `file`, `bytes`, `checksum` ("right" or "none"), `optimizers` (each as
        `ebbtide.checkpoint.summarize` describes it, and `where` in the file it is) and `other`
        (what else there is, by its path in the file).

    Raises:
        CheckpointError: The file is broken, or torch cannot read it.
    """
    problem = problem_of(path)
    if problem is not None:
        raise CheckpointError(f"{path} is broken: {problem}")
    content = _loaded(path, trust)
    optimizers = [
        {"where": where, **summarize(state_dict, facts_of)}
        for where, state_dict in find_states(content)
    ]
    return {
        "file": str(path),
        "bytes": Path(path).stat().st_size,
        "checksum": "right" if is_sealed(path) else "none",
        "optimizers": optimizers,
        "other": _others(content),
    }


def facts_of(key: str, value: Any) -> Facts | None:
    """Tell what `summarize` asks of a state value; `None` for what is neither tensor nor number."""
    if isinstance(value, bool) or not isinstance(value, torch.Tensor | int | float):
        return None
    if not isinstance(value, torch.Tensor):
        return Facts((), type(value).__name__, 0, value=float(value))
    single = value.numel() == 1 and not value.is_complex() and not value.is_meta
    return Facts(
        tuple(value.shape),
        str(value.dtype).removeprefix("torch."),
        value.numel() * value.element_size(),
        checkpoint.problem_of(key, value),
        float(value) if single else None,
    )


def _loaded(path: str | os.PathLike[str], trust: bool) -> Any:
    with open(path, "rb") as file:
        mmap = file.read(2) == b"PK"
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust, mmap=mmap)
    except Exception as error:
        if trust:
            raise CheckpointError(f"{path} is no file of torch.save ({error})") from error
        raise CheckpointError(
            f"{path} cannot be read as plain tensors and values; if it is a checkpoint with other "
            "objects, and you trust it to run its code, unpickle them: --trust"
        ) from error


def _others(content: Any) -> list[dict[str, Any]]:
    """List what lies beside the optimizers at the top: tensors by sum, numbers by value."""
    if not isinstance(content, Mapping) or any(where == "" for where, _ in find_states(content)):
        return []
    found = []
    for key, value in content.items():
        if any(True for _ in find_states(value)):
            continue
        tensors = list(_tensors(value))
        entry: dict[str, Any] = {"where": str(key), "type": type(value).__name__}
        if tensors:
            entry["tensors"] = len(tensors)
            entry["bytes"] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        elif isinstance(value, str | int | float | bool):
            entry["value"] = value
        found.append(entry)
    return found


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for each in value for tensor in _tensors(each)]
    return []
