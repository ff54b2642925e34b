"""Settings of the whole suite."""

from __future__ import annotations

import os
import signal
from itertools import pairwise

import pytest
from hypothesis import settings

# No deadline, since no test may depend on the machine's speed; the same examples on every run.
settings.register_profile("ebbtide", deadline=None, derandomize=True)
settings.load_profile("ebbtide")


# A shell starts background jobs with Ctrl-C ignored; the commands under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Have Triton's kernels interpreted, but for `-m gpu`; it decides when it is imported."""
    if not _wants_gpu(config):
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse a run on a GPU without a GPU. Without tests pytest itself ends with 5, not 0."""
    if not _wants_gpu(session.config) or session.config.option.collectonly:
        return
    import torch

    if not torch.cuda.is_available():
        raise pytest.UsageError("-m gpu needs a GPU that torch can use: there is none")


def _wants_gpu(config: pytest.Config) -> bool:
    words = config.option.markexpr.replace("(", " ").split()
    return "gpu" in words and not any(pair == ("not", "gpu") for pair in pairwise(words))
