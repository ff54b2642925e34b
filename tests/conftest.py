"""Settings of the whole suite."""

from __future__ import annotations

from hypothesis import settings

# No deadline, since no test may depend on the machine's speed; the same examples on every run.
settings.register_profile("ebbtide", deadline=None, derandomize=True)
settings.load_profile("ebbtide")
