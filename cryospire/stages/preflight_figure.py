"""The evidence of the preflight in one figure: images, map, and the FSC of every reading."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cryospire.maths import fourier
from cryospire.stages.hypotheses import Evidence, Sample


def draw(path: Path, evidence: dict[str, dict[str, Evidence]], curves: dict[str, Tensor], sample: Sample) -> None:
    """Write a PNG: first images (low-passed), central slices of the winning map, FSC curves axis by axis, the given map's FSC."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(15, 7.5), layout="constrained")
    picture = torch.cat([torch.cat(list(_smooth(row)), 1) for row in sample.images[: len(sample.images) // 4 * 4 or 1].split(4)])
    axes[0, 0].imshow(picture.numpy(), cmap="gray")
    axes[0, 0].set_title("images, low-passed, as stored")
    best = max((e for results in evidence.values() for e in results.values()), key=lambda e: e.explained)
    volume, half = best.maps.mean(0), sample.box // 2
    axes[0, 1].imshow(torch.cat([volume[half], volume[:, half], volume[:, :, half]], 1).numpy(), cmap="gray")
    axes[0, 1].set_title(f"map of {len(sample.half):,} particles\ncentral slices, {best.resolution:.1f} Å")
    for a in axes[0, :2]:
        a.set_axis_off()
    frequency = torch.arange(half + 1).numpy() / (sample.box * sample.pixel_size)
    panels = [axes[0, 2], *axes[1, :3]]
    axes[1, 3].set_visible(False)
    for a, (axis, results) in zip(panels, evidence.items(), strict=False):
        a.set_title({"ctf": "CTF", "pixel": "pixel size of the CTF"}.get(axis, f"{axis}s"))
        for words, e in sorted(results.items(), key=lambda item: -item[1].explained):
            a.plot(frequency, e.fsc.numpy(), label=f"{words}: {e.explained:,.0f}", lw=2 if words == "as given" else 1)
    axes[0, 3].set_visible(bool(curves))
    axes[0, 3].set_title("map against the given one")
    for words, curve in curves.items():
        axes[0, 3].plot(frequency, curve.numpy(), label=words)
    for a in [*panels[: len(evidence)], *([axes[0, 3]] if curves else [])]:
        a.axhline(0.143, color="0.7", lw=0.8)
        a.set(xlabel="1/Å", ylim=(-0.4, 1.02))
        a.legend(fontsize=7)
    panels[0].set_ylabel("FSC of half-maps")
    axes[1, 0].set_ylabel("FSC of half-maps")
    figure.suptitle("Preflight: half-map FSC of each reading; numbers are the energy explained across half-sets (noise variances)")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _smooth(images: Tensor) -> Tensor:
    """Images (n, box, box) low-passed to a quarter of Nyquist, each to its own grey range."""
    box = images.shape[-1]
    x = fourier.apply_radial(images, fourier.soft_step(box / 8 - torch.arange(box // 2 + 1.0), 2), 2)
    return (x - x.amin((1, 2), keepdim=True)) / (x.amax((1, 2), keepdim=True) - x.amin((1, 2), keepdim=True)).clamp(min=1e-9)
