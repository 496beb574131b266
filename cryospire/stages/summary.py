"""What a finished run has found and where everything lies: a dozen lines for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cryospire.conventions import InputError
from cryospire.io import stores
from cryospire.stages import status

NAMES = {"model": "poses"}  # where a line is not named after its store


def run(results: Path) -> None:
    """Print the summary of a run's folder."""
    if not results.is_dir():
        raise InputError(f"{results}: no such folder of results")
    print()
    for line in lines(results):
        print(line)


def lines(results: Path) -> Iterator[str]:
    """Findings first, then places; a stage that has not run yet is left out."""
    for name, tell in {"particles": particles, "consensus": consensus, "parts": parts, "model": poses, "analysis": states}.items():
        path = results / f"{name}.zarr"
        if status.finished(path):
            yield f"{NAMES.get(name, name):<12}{tell(stores.open_store(path, name))}"
    if (results / "evaluation.json").exists():
        yield from scores(json.loads((results / "evaluation.json").read_text()))
    if (results / "validation.json").exists():
        from cryospire.stages import validate

        for line in validate.sentences(json.loads((results / "validation.json").read_text())):
            yield f"half-sets   {line}"
    yield ""
    places = {"report": "report.html", "volumes": "volumes", "part masks": "parts_masks", "stores": "*.zarr", "logs": "logs"}
    for what, pattern in places.items():
        found = sorted(results.glob(pattern))
        if found:
            yield f"{what:<12}{' '.join(str(p) for p in found)}"


def particles(group: Any) -> str:
    n, box = group["images"].shape[:2]
    return f"{n:,}, box {box}, {group.attrs['pixel_size']:.3g} Å/pixel"


def consensus(group: Any) -> str:
    return f"{group.attrs['resolution']:.1f} Å (FSC 0.143 of half-maps)"


def parts(group: Any) -> str:
    part = stores.read(group, "part")
    return f"{part.max() + 1} found, {len(stores.read(group, 'anchors/part'))} anchors"


def poses(group: Any) -> str:
    turn, shift = (float(np.asarray(group[f"history/{k}"])[-1]) if f"history/{k}" in group else 0.0 for k in ("turn_sd", "shift_sd"))
    if not turn:
        return "as given"
    return f"corrected; the given ones were wrong by about {turn:.1f}° about an axis and {shift:.1f} Å along one (standard deviations)"


def states(group: Any) -> str:
    weight = stores.read(group, "states/weight")
    shares = ", ".join(f"{w:.0%}" for w in np.sort(weight)[::-1])
    return f"{len(weight)} states ({shares}), {group['trajectories/latent'].shape[0]} trajectories"


def scores(evaluation: dict[str, Any]) -> Iterator[str]:
    """Area under the FSC against the truth, of every method beside the consensus map."""
    yield f"truth       {evaluation['states']} states; area under the FSC (best 0.5), and of differences from the mean (consensus: 0)"
    for name, values in evaluation["methods"].items():
        yield f"  {name:<18}{values['auc']['mean']:.3f}   differences {values['difference']['mean']:.3f}"
