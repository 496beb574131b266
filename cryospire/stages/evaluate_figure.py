"""evaluation.png: FSC curves, areas of every state, latents by true state, occupancies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLOURS = {"consensus": "0.55", "known labels": "tab:orange", "stage 1": "tab:cyan", "stage 2": "tab:blue", "stage 2 + images": "tab:green"}


def draw(result: dict[str, Any], latents: dict[str, Tensor], label: Tensor, path: Path) -> None:
    occupancy = [(name, o) for name, m in result["models"].items() for o in m.get("occupancy", [])]
    panels = 3 + len(latents) + bool(occupancy)
    rows = -(-panels // 3)
    figure, grid = plt.subplots(rows, 3, figsize=(12, 3.6 * rows), layout="constrained", squeeze=False)
    axes = grid.flatten()
    for axis in axes[panels:]:
        axis.set_axis_off()
    curves(axes[0], result, "auc", "volumes, in the mask")
    curves(axes[1], result, "difference", "differences from the mean volume")
    for name, m in result["methods"].items():
        axes[2].plot(m["auc"]["states"], ".-", color=COLOURS.get(name), label=name)
    axes[2].set(xlabel="true state", ylabel="area under FSC", title="every state")
    for axis, (name, z) in zip(axes[3:], latents.items(), strict=False):
        near = result["models"][name]["latents"]["neighbours"]
        scatter(axis, z, label, name)
        said = f"of the {near['k'][0]} nearest {near['similarity'][0]:.0%} are right (chance {near['chance'][0]:.0%})"
        axis.text(0.02, 0.02, said, transform=axis.transAxes, fontsize=8)
    if occupancy:
        name, shown = occupancy[-1]
        centre = (np.arange(40) + 0.5) / 40
        for k, colour in (("present", "tab:blue"), ("absent", "tab:red")):
            axes[panels - 1].bar(centre, shown["histogram"][k], 1 / 40, alpha=0.6, color=colour, label=f"truly {k}")
        axes[panels - 1].set(xlabel=f"mean occupancy of part {shown['part']} in a particle", ylabel="particles", title=name)
        axes[panels - 1].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curves(axis: Axes, result: dict[str, Any], kind: str, title: str) -> None:
    for name, m in result["methods"].items():
        y = m["curves"][kind]
        axis.plot(np.linspace(0, 0.5, len(y)), y, color=COLOURS.get(name), label=f"{name}: {m[kind]['mean']:.3f}")
    axis.set(xlabel="cycles per pixel", ylabel="FSC with the truth, mean over states", title=title, ylim=(-0.1, 1.02))
    axis.axhline(0, color="k", lw=0.5)
    axis.legend(frameon=False, fontsize=8)


def scatter(axis: Axes, z: Tensor, label: Tensor, title: str) -> None:
    """The two main axes of the latents, coloured by true state."""
    some = torch.linspace(0, len(z) - 1, min(5000, len(z))).round().long()
    centred = z - z.mean(0)
    xy = centred[some] @ torch.linalg.svd(centred, full_matrices=False)[2][:2].T
    if xy.shape[1] == 1:
        xy = torch.cat([xy, torch.zeros_like(xy)], 1)
    axis.scatter(xy[:, 0], xy[:, 1], c=label[some], s=3, cmap="hsv" if int(label.max()) > 9 else "tab10", linewidths=0)
    axis.set(xlabel="PC 1", ylabel="PC 2", title=f"{title}: latents by true state")
