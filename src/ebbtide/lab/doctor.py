"""What this machine runs, for `ebbtide doctor`: the core, threads, torch, the GPU."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

from ebbtide.backends.cpu import describe

__all__ = ["facts"]


def facts() -> dict[str, str]:
    """Return what was chosen on this machine, and why.

    torch is imported first where it is installed, since the core shares its thread runtime.
    """
    torch_facts = _torch()
    return {
        "ebbtide": _version("ebbtide"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        **describe(),
        "numpy": _version("numpy"),
        **torch_facts,
        "triton": _version("triton"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _torch() -> dict[str, str]:
    if importlib.util.find_spec("torch") is None:
        return {"torch": "not installed: pip install 'ebbtide[torch]'", "GPU": "none without torch"}
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        gpu = ", ".join(names)
    elif torch.backends.mps.is_available():
        gpu = "Apple MPS: steps go through torch operations"
    else:
        gpu = "none that torch can use; steps run on the processor"
    return {"torch": torch.__version__, "GPU": gpu}
