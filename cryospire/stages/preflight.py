"""Conventions decided from the data, before anything is computed from them: a verdict in words, with its evidence.

Reads a sample, back-projects it under the competing conventions (see ``hypotheses``), and compares what they explain.
Writes preflight.json and preflight.png; a contradiction between table, settings and data stops the run unless accepted, and is written
as preflight.stopped.json and .png.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryospire import log
from cryospire.config import Config
from cryospire.conventions import InputError
from cryospire.io import metadata, mrc
from cryospire.io.table import ParticleTable
from cryospire.maths import fourier, metrics
from cryospire.site import estimate as site
from cryospire.stages import hypotheses
from cryospire.stages.hypotheses import GIVEN, SHUFFLED, Convention, Evidence, Sample, Survey
from cryospire.stages.preprocess import common_grid

TITLES = {"rotation": "rotations", "shift": "shifts", "ctf": "CTF", "pixel": "pixel size of the CTF"}
CHANCE = 20.0  # noise variances: a difference this small can be chance
BETTER = 1.02  # another reading must explain so many times as much; less may be heterogeneity or a poor fit
NEARLY = 0.95  # overfocus and inverted contrast differ by the amplitude contrast alone
ALIKE = 1.0005  # below this the data do not distinguish


@dataclass(frozen=True)
class Verdict:
    """One check: what was found, on what evidence, and whether it agrees with table and settings."""

    check: str
    found: str
    evidence: str
    ok: bool


@dataclass
class Findings:
    """Everything the preflight knows."""

    verdicts: list[Verdict] = field(default_factory=list)
    evidence: dict[str, dict[str, Evidence]] = field(default_factory=dict)
    proposal: dict[str, str] = field(default_factory=dict)
    curves: dict[str, Tensor] = field(default_factory=dict)


def run(config: Config, output: Path, *, particles: Path | None = None, sample: int | None = None, accept: bool = False) -> None:
    """Write the verdict to ``output`` (.json), and a figure beside it.  At a contradiction, unless accepted, raises InputError and writes
    both as ``<name>.stopped``: under the name of the output the next stage would take it for leave to go on.

    ``sample`` and ``accept`` come before the config's section ``preflight``.
    """
    source = particles or config.particles
    table = metadata.read(source, **config.reading())
    metadata.check_stacks(table)
    grid = common_grid(table, config.preprocess.box)
    taken, survey = hypotheses.read_sample(table, sample or config.preflight.sample, config.seed)
    found = Findings()
    best = compete(found, taken, output.parent / "logs" / "preflight.metrics.jsonl")
    found.verdicts.append(contrast(found, config, table, best))
    if config.map is not None:
        found.verdicts.append(hand(found, config.map, best, taken.pixel_size))
    found.verdicts += images(survey, table)
    wrong = [f"{v.check}: {v.found} ({v.evidence})" for v in found.verdicts if not v.ok]
    stops = bool(wrong) and not (accept or config.preflight.accept)
    stopped = output.with_name(f"{output.stem}.stopped{output.suffix}")
    for old in (output, stopped):
        old.unlink(missing_ok=True)
        old.with_suffix(".png").unlink(missing_ok=True)
    write(found, stopped if stops else output, config, table, taken, (grid.box, grid.pixel_size))
    for v in found.verdicts:
        log.say(f"preflight  {'ok  ' if v.ok else 'STOP'} {v.check}: {v.found} ({v.evidence})")
    if stops:
        advice = "".join(f"; set {k}: {v}" for k, v in found.proposal.items())
        raise InputError(f"{source}: preflight: {'; '.join(wrong)}{advice}; or set preflight.accept (--accept) to go on")


def compete(found: Findings, sample: Sample, metrics: Path | None = None) -> Evidence:
    """Decide rotations and shifts together, then the CTF and its pixel size together: one that is wrong spoils the other.

    Returns the evidence of the reading that won.
    """
    with log.Progress("preflight", 25, "readings", metrics) as progress:

        def test(convention: Convention) -> Evidence:
            progress.advance(1)
            return hypotheses.evaluate(sample, convention)

        rotations = hypotheses.variants(Convention(), "rotation", sample.pixel_size)
        shuffled = test(rotations.pop(SHUFFLED))
        geometry = {
            (words, more): (convention, test(convention))
            for words, turned in rotations.items()
            for more, convention in hypotheses.variants(turned, "shift", sample.pixel_size).items()
        }
        found.verdicts.append(signal(_best([e for _, e in geometry.values()]), shuffled))
        now, present = geometry[settle(found, ("rotation", "shift"), geometry)]
        found.evidence["rotation"][SHUFFLED] = shuffled
        optics = {(GIVEN, GIVEN): (now, present)}
        for i, axis in enumerate(("ctf", "pixel")):
            for words, convention in hypotheses.variants(now, axis, sample.pixel_size).items():
                if words != GIVEN:
                    optics[(words, GIVEN) if i == 0 else (GIVEN, words)] = convention, test(convention)
        return optics[settle(found, ("ctf", "pixel"), optics)][1]


def settle(found: Findings, axes: tuple[str, str], tried: dict[tuple[str, str], tuple[Convention, Evidence]]) -> tuple[str, str]:
    """Verdicts on two axes, each reading at its best over the other axis; returns the pair of readings that won."""
    winners = []
    for i, axis in enumerate(axes):
        words = dict.fromkeys(pair[i] for pair in tried)
        results = {w: _best([e for pair, (_, e) in tried.items() if pair[i] == w]) for w in words}
        verdict, winner = decide(axis, results)
        found.evidence[axis] = results
        found.verdicts.append(verdict)
        winners.append(winner)
    return winners[0], winners[1]


def _best(several: list[Evidence]) -> Evidence:
    return max(several, key=lambda e: e.explained)


def decide(axis: str, results: dict[str, Evidence]) -> tuple[Verdict, str]:
    """The reading that explains most; another than the given one only where it does so clearly."""
    order = sorted(results, key=lambda words: results[words].explained, reverse=True)
    given, first = results[GIVEN].explained, results[order[0]].explained
    rival = next(words for words in order if words != GIVEN)
    wins = first > BETTER * given and first - given > CHANCE
    other = results[rival]
    evidence = (
        f"explains {given:,.0f} noise variances, {results[GIVEN].resolution:.1f} Å; "
        f"{rival}: {other.explained:,.0f}, {other.resolution:.1f} Å"
    )  # fmt: skip
    if wins:
        if axis == "shift":
            evidence += "; a wrong pixel size shows itself here too"
        return Verdict(TITLES[axis], rival, f"as given {evidence}", False), rival
    alike = abs(given - other.explained) < max(CHANCE, (ALIKE - 1) * given)
    return Verdict(TITLES[axis], f"{GIVEN}{f', not to be told from: {rival}' if alike else ''}", evidence, True), GIVEN


def signal(best: Evidence, shuffled: Evidence) -> Verdict:
    """Whether poses say more than shuffled ones."""
    ok = best.explained > BETTER * shuffled.explained and best.explained - shuffled.explained > CHANCE
    words = "carry signal" if ok else "carry no signal: no better than shuffled"
    return Verdict("poses", words, f"explain {best.explained:,.0f} noise variances, shuffled {shuffled.explained:,.0f}", ok)


def contrast(found: Findings, config: Config, table: ParticleTable, best: Evidence) -> Verdict:
    """Protein white or black under RELION's CTF sign, from the skewness of the map's density."""
    box = best.maps.shape[-1]
    first_bad = next((k for k in range(1, box // 2) if best.fsc[k] < 0.3), box // 2)
    mean = _skew(best.maps.mean(0), first_bad)
    halves = [_skew(m, first_bad) for m in best.maps]
    colour = "white" if mean > 0 else "black"
    evidence = f"skewness of the map {mean:+.2f}, half-maps {halves[0]:+.2f} and {halves[1]:+.2f}"
    if table.sign:
        evidence += f"; the table's blob/sign says {'white' if table.sign > 0 else 'black'}"
    if min(abs(h) for h in halves) < 0.2 or halves[0] * halves[1] < 0:
        return Verdict("contrast", f"not decided; taken as {config.preprocess.contrast}", evidence, True)
    ok = colour == config.preprocess.contrast
    if not ok:
        found.proposal["preprocess.contrast"] = colour
        evidence += f"; the config says {config.preprocess.contrast}"
    words = f"protein is {colour} where the CTF starts at +amplitude contrast (RELION)"
    if colour == "black":
        words += ", or white under cryoDRGN's CTF, which starts at minus it"
        given, negated = (found.evidence["ctf"][w].explained for w in (GIVEN, hypotheses.OVERFOCUS))
        if negated > NEARLY * given:
            words += ", or white where defocus counts overfocus as positive"
            evidence += f"; overfocus positive explains {negated:,.0f} noise variances, as given {given:,.0f}"
    return Verdict("contrast", words, evidence, ok)


def _skew(volume: Tensor, shells: int) -> float:
    box = volume.shape[-1]
    smooth = fourier.apply_radial(volume, fourier.soft_step(max(shells, 3) - torch.arange(box // 2 + 1.0), 1.0), 3)
    values = smooth[fourier.radius(box, 3) < 0.4 * box].double()
    values = values - values.mean()
    return float((values**3).mean() / (values**2).mean().clamp(min=1e-30) ** 1.5)


def hand(found: Findings, path: Path, best: Evidence, pixel_size: float) -> Verdict:
    """Whether the map that was given shows the same particle, in the same hand and contrast."""
    given, pixel = mrc.read_volume(path)
    box = best.maps.shape[-1]
    size = given.shape[-1] * pixel / pixel_size
    crop = 2 * round(size / 2)
    if abs(crop - size) > 0.01 * size:
        raise InputError(f"{path}: {given.shape[-1]} voxels of {pixel:g} Å cannot be resampled to {pixel_size:.4g} Å ({size:.2f} voxels)")
    small = fourier.crop(torch.from_numpy(given), crop, 3)
    edge = (box - crop) // 2
    volume = torch.nn.functional.pad(small, [edge] * 6)[:box, :box, :box] * hypotheses.sphere(box)
    mirrored = torch.roll(volume.flip(0), 1, 0)  # z -> -z about voxel n // 2
    shells = max(4, int(box * pixel_size / best.resolution))
    ours = best.maps.mean(0)
    found.curves = {"the given map": metrics.fsc(ours, volume), "its mirror image": metrics.fsc(ours, mirrored)}
    same, other = (float(c[1 : shells + 1].mean()) for c in found.curves.values())
    evidence = f"FSC to {best.resolution:.1f} Å: {same:.2f}, mirrored {other:.2f}"
    name = "given map"
    if max(abs(same), abs(other)) < 0.2:
        return Verdict(name, "does not match the particles", evidence, False)
    if abs(other) > abs(same) + 0.02:
        return Verdict(name, "has the opposite hand", evidence, False)
    if same < 0:
        return Verdict(name, "has the opposite contrast (negate the map, or the images' contrast)", evidence, False)
    undecided = abs(same - other) <= 0.02
    return Verdict(name, "matches; hand not decided at this resolution" if undecided else "matches, same hand", evidence, True)


def images(survey: Survey, table: ParticleTable) -> list[Verdict]:
    """Dead and repeated images of the sample."""
    n = len(survey.rows)
    deviation = np.array(survey.deviation)
    middle = float(np.median(deviation))
    odd = int(((deviation > 5 * middle) | (deviation < middle / 5)).sum())
    dead, twins = survey.dead, survey.twins
    first = f", first: row {table.row[dead[0]] + 1} ({table.image_names[dead[0]]})" if dead else ""
    pair = f", first: rows {table.row[twins[0][0]] + 1} and {table.row[twins[0][1]] + 1}" if twins else ""
    return [
        Verdict("dead images", f"{len(dead)} of {n}{first}", "constant or not finite", not dead),
        Verdict("repeated images", f"{len(twins)} of {n}{pair}", "equal bytes under different names", not twins),
        Verdict(
            "intensity",
            f"{odd} of {n} images far from the rest",
            f"standard deviation beyond 5 times of the median {middle:.3g}",
            odd <= 0.02 * n,
        ),
    ]


def costs(config: Config, table: ParticleTable, box: int) -> dict[str, Any]:
    """Memory (MB), time (minutes) and disk (MB) of every stage on this machine."""
    data = site.Data(len(table), int(table.optics.box.max()), box)
    threads = config.threads or torch.get_num_threads()
    return {stage: asdict(n) for stage, n in site.needs(config, {"simulate", "preflight"}, data, None, threads).items()}


def write(found: Findings, output: Path, config: Config, table: ParticleTable, sample: Sample, grid: tuple[int, float]) -> None:
    """preflight.json and the figure."""
    from cryospire.stages import preflight_figure

    box, pixel_size = grid
    evidence = {
        axis: {w: {"explained": e.explained, "resolution": e.resolution, "fsc": e.fsc.tolist()} for w, e in results.items()}
        for axis, results in found.evidence.items()
    }
    page = {
        "verdict": [asdict(v) for v in found.verdicts],
        "proposal": found.proposal,
        "particles": len(table),
        "sample": len(sample.half),
        "box": box,
        "pixel_size": pixel_size,
        "evidence_box": sample.box,
        "evidence_pixel_size": sample.pixel_size,
        "notes": list(table.notes),
        "estimate": costs(config, table, box),
        "evidence": evidence,
        "map": {name: curve.tolist() for name, curve in found.curves.items()},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    preflight_figure.draw(output.with_suffix(".png"), found.evidence, found.curves, sample)
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_text(json.dumps(page, indent=1))
    temporary.replace(output)
