"""validation.png: FSC between the half-sets, and motion and occupancy of parts in one against the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes


def draw(result: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8), layout="constrained")
    curves(axes[0], result, "volumes", "volumes of states")
    curves(axes[1], result, "differences", "differences from the mean volume")
    for m in (m for m in result["motion"] if "missing" not in m):
        colour = f"C{m['part'] - 1}"
        axes[2].scatter(*m["angle"], color=colour, s=14, label=f"part {m['part']}, {np.mean(m['angle_apart'] or [0]):.0f}° apart")
        axes[3].scatter(*m["occupancy"], color=colour, s=14, label=f"part {m['part']}, {m['occupancy_apart']:.2f} apart")
    for axis, what in ((axes[2], "turn of a part in a state, degrees"), (axes[3], "occupancy of a part in a state")):
        most = max(axis.get_xlim()[1], axis.get_ylim()[1])
        axis.plot([0, most], [0, most], color="0.7", lw=0.8, zorder=0)
        axis.set(xlabel="half-set 1", ylabel="half-set 2", title=what)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curves(axis: Axes, result: dict[str, Any], kind: str, title: str) -> None:
    """FSC of every state, thin, and their mean."""
    found = np.array(result[kind]["curves"])
    frequency = np.arange(found.shape[1]) / (result["box"] * result["pixel_size"])
    axis.plot(frequency, found.T, color="tab:blue", lw=0.6, alpha=0.5)
    axis.plot(frequency, found.mean(0), color="k", lw=1.5, label=f"mean of {len(found)} states")
    reached = f"{result['threshold']}: {result[kind]['resolution']['median']:.1f} Å (median)"
    axis.axhline(result["threshold"], color="0.5", lw=0.8, ls=":", label=reached)
    axis.axhline(0, color="k", lw=0.5)
    axis.set(xlabel="spatial frequency (1/Å)", ylabel="FSC between half-sets", title=title, ylim=(-0.15, 1.02))
    axis.legend(frameon=False, fontsize=8)
