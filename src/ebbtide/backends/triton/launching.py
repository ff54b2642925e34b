"""Launches, past what Triton asks about the arguments of each."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

__all__ = ["Launcher"]


class Launcher:
    """Launches kernels on one device.

    Triton looks at every argument of every launch to find the binary that was compiled for such,
    which takes longer than to launch it. Here the caller's key says it.

    Attributes:
        launches: Kernels launched so far.
    """

    def __init__(self) -> None:
        self.launches = 0
        self._binaries: dict[Hashable, Any] = {}

    def launch(
        self,
        kernel: Any,
        programs: int,
        arguments: tuple[Any, ...],
        constants: Mapping[str, Any],
        *,
        warps: int,
        key: Hashable = None,
    ) -> None:
        """Launch a kernel; its device must be selected.

        Args:
            kernel: With the constants as its last parameters.
            programs: Number of them.
            arguments: Tensors and integers.
            constants: By name, in the kernel's order.
            warps: Of a program.
            key: Stands, with the kernel and its constants, for the types of the arguments and for
                what Triton may assume of their values.
        """
        which = (kernel, key, warps, *constants.values())
        binary = self._binaries.get(which)
        if binary is None:  # always in the interpreter
            self._binaries[which] = kernel[(programs,)](
                *arguments, **constants, num_warps=warps, enable_fp_fusion=False
            )
        else:
            binary[(programs, 1, 1)](*arguments, *constants.values())
        self.launches += 1
