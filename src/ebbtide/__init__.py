"""Ebbtide: the AdamW family for PyTorch and NumPy.

`ebbtide.torch` and `ebbtide.numpy` hold the optimizers; each is imported by name, so that
neither framework is loaded for the sake of the other. Importing `ebbtide` loads neither.
"""

from typing import TYPE_CHECKING

__all__ = ["__version__"]

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        # Reading the installed metadata takes 30 ms: only for those who ask.
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import version

        return version("ebbtide")
