"""Settings of the whole suite."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

# No deadline, since no test may depend on the machine's speed; the same examples on every run.
settings.register_profile("ebbtide", deadline=None, derandomize=True)
settings.load_profile("ebbtide")


# A shell starts background jobs with Ctrl-C ignored, and the commands under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Have Triton's kernels interpreted, but for `-m gpu`; it decides when it is imported."""
    if config.option.markexpr != "gpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
