"""How the cost of a step grows with elements and with tensors, as a picture."""

from __future__ import annotations

from pathlib import Path

from ebbtide.lab.bench.run import Row

__all__ = ["draw_growth"]

_COLOURS = {"fused": "#d55e00", "default": "#999999", "foreach": "#cc79a7", "ebbtide": "#0072b2"}


def draw_growth(rows: list[Row], path: Path) -> None:
    """Draw two panels: time by number of elements, and by number of tensors at 10 M elements."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    single = [row for row in rows if row.tensors == 1]
    split = [row for row in rows if row.numel == 10**7]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, colour in _COLOURS.items():
        for axes, chosen, key in ((left, single, "numel"), (right, split, "tensors")):
            points = [(getattr(r, key), r.timings[name].step_us / 1e3) for r in chosen]
            points.sort()
            label = "ebbtide" if name == "ebbtide" else f"torch, {name}"
            axes.loglog(*zip(*points, strict=True), marker="o", color=colour, label=label)
    left.set(title="One tensor", xlabel="elements", ylabel="time of a step (ms)")
    right.set(title="10 million elements in all", xlabel="tensors", ylabel="time of a step (ms)")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    left.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
