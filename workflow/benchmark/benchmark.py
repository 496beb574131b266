"""Small commands of the benchmark: configs of its runs, latents and volumes of other programs, the table.

    python benchmark.py config DATASET.yaml --size '{"box": 64, ...}' --energy 655.36 --seed 0 --model M --particles STAR --run DIR
    python benchmark.py frame REFINED.star TRUTH OUTPUT.star
    python benchmark.py zfile EMBEDDING LABELS OUTPUT
    python benchmark.py score VOLUMES TRUTH NAME OUTPUT.json --latents EMBEDDING
    python benchmark.py truth IgG-1D IgG-1D/truth
    python benchmark.py ceiling RUN/base.yaml PARTICLES.zarr TRUTH OUTPUT.json --states 5
    python benchmark.py table OUTPUT.csv RUN/VARIANT/evaluation.json ...
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from cryospire import config as configuration
from cryospire.conventions import InputError
from cryospire.io import metadata, metadata_pkl, mrc, stores

COLUMNS = ("auc", "unmasked", "difference")
NAMES = [
    *COLUMNS, "states_sd", "per_image", "per_image_difference", "between_over_within", "main_lump", "neighbours", "imbalance",
    "imbalance_back", "parts_ari", "turn_error", "centre_error", "occupancy_auc", "leakage",
    "pose_turn", "pose_shift", "frames_turn", "auc_in_frames", "difference_in_frames",
]  # fmt: skip


def make_config(
    base: Path,
    size: dict[str, Any],
    energy: float,
    seed: int,
    model: str,
    particles: Path,
    run: Path,
    variant: str,
    changes: dict[str, Any],
) -> None:
    """``simulate.yaml`` of a data set and ``<variant>.yaml`` of a run on it; both checked."""
    values = yaml.safe_load(base.read_text())
    simulate = values.pop("simulate") | size | {"snr": energy / size["box"] ** 2}
    if simulate["kind"] == "compositional":
        simulate["states"] = yaml.safe_load(base.read_text())["simulate"]["states"]  # as many as there are compositions
    if model:
        simulate["model"] = str(Path(model).resolve())
    for section, keys in changes.items():
        values[section] = values.get(section, {}) | keys
    values |= {"seed": seed, "particles": str(particles.resolve()), "truth": str(particles.resolve().parent / "truth")}
    values["output"] = str(run.resolve() / variant)
    run.mkdir(parents=True, exist_ok=True)
    for name, content in (("simulate", {"seed": seed, "simulate": simulate}), (variant, values)):
        configuration.Config.model_validate(content)
        (run / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def frame(refined: Path, truth: Path, output: Path) -> None:
    """Poses of a refinement of the simulated stack, told in the frame of the truth: theirs is another, which no image tells of."""
    import torch

    from cryospire.stages.evaluate_model import Poses, frames

    table = metadata.read(refined, datadir=output.parent)
    found = Poses(torch.from_numpy(table.rotation), torch.from_numpy(table.shift))
    turn, way = frames(found, Poses.load(truth / "poses.npz", table.index), torch.zeros(len(table), dtype=torch.long))
    rotation = found.rotation @ turn[0].T
    shift = found.shift - rotation[:, :2] @ way[0]
    metadata.write_star(output, replace(table, rotation=rotation.numpy(), shift=shift.numpy()))


def read_latents(embedding: Path, label: NDArray[np.int32]) -> NDArray[np.floating]:
    """Latents (N, D) of another program, .pkl or .npy, in the order of the labels (N,)."""
    z = np.load(embedding, allow_pickle=False) if embedding.suffix == ".npy" else np.asarray(metadata_pkl.load(embedding))
    if z.ndim != 2 or len(z) != len(label):
        raise InputError(f"{embedding}: latents of shape {z.shape} for {len(label)} labels")
    if not np.isfinite(z).all():
        raise InputError(f"{embedding}: {np.isnan(z).any(1).sum()} images have no latent")
    return z


def zfile(embedding: Path, labels: Path, output: Path) -> None:
    """Text file (states, D): of each state the latent nearest to its mean, as CryoBench takes it; ``embedding`` is .pkl or .npy (N, D)."""
    label = np.load(labels, allow_pickle=False)
    z = read_latents(embedding, label)
    rows = []
    for k in np.unique(label):
        mine = z[label == k]
        rows.append(mine[((mine - mine.mean(0)) ** 2).sum(1).argmin()])
    np.savetxt(output, np.array(rows))


@dataclass(frozen=True)
class Grid:
    """Box and pixel size (Å) of volumes and images."""

    box: int
    pixel_size: float


def score(folder: Path, truth: Path, name: str, output: Path, embedding: Path | None) -> None:
    """The rows of evaluation.json for volumes of another program, one for each state in the order of their names, on the truth's grid."""
    import torch

    from cryospire.stages import evaluate, evaluate_model

    volume, pixel_size = mrc.read_volume(truth / "vol_000.mrc")
    grid = Grid(len(volume), pixel_size)
    label = np.load(truth / "labels.npy", allow_pickle=False)
    known = evaluate.load_truth(truth, grid, np.arange(len(label)))
    files = sorted(folder.rglob("*.mrc"))
    if len(files) != len(known.volumes):
        raise InputError(f"{folder}: {len(files)} volumes for {len(known.volumes)} states")
    volumes = torch.stack([evaluate.on_grid(f, grid) for f in files])
    result: dict[str, Any] = {"methods": {name: evaluate.score(volumes, known, pixel_size)}}
    if embedding:
        z = torch.tensor(read_latents(embedding, label))
        result["models"] = {name: {"latents": evaluate_model.judge_neighbours(z, known.label, evaluate.state_distances(known))}}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")


def cryobench_truth(folder: Path, output: Path) -> None:
    """The truth of a data set as CryoBench distributes it (gt_latents.pkl, vols/128_org, init_mask) as a folder that `evaluate` reads."""
    label = np.asarray(metadata_pkl.load(folder / "gt_latents.pkl"))
    files = sorted((folder / "vols/128_org").glob("*.mrc"))
    if label.ndim != 1 or label.dtype.kind not in "iu" or not len(label) or label.min() < 0 or int(label.max()) >= len(files):
        raise InputError(f"{folder / 'gt_latents.pkl'}: expected one label for each image, below the number of volumes, {len(files)}")
    output.mkdir(parents=True, exist_ok=True)
    for k, file in enumerate(files):
        shutil.copyfile(file, output / f"vol_{k:03d}.mrc")
    mask = folder / "init_mask/mask.mrc"
    if mask.exists():
        shutil.copyfile(mask, output / "mask.mrc")
    np.save(output / "labels.npy", label.astype(np.int32))


def ceiling(config: Path, particles: Path, truth: Path, output: Path, states: int) -> None:
    """The row of the mixture fitted to the noise-free truth, with as many Gaussians as stage 2 has, for some states evenly apart."""
    import torch

    from cryospire.stages import evaluate, evaluate_ceiling
    from cryospire.training.data import Particles

    settings = configuration.load(config)
    group = stores.open_store(particles, "particles")
    data = Particles(group)
    known = evaluate.load_truth(truth, data, stores.read(group, "source/row"))
    chosen = np.unique(np.linspace(0, len(known.volumes), min(states, len(known.volumes)), endpoint=False).astype(int))
    some = replace(known, volumes=known.volumes[chosen])
    fits = [evaluate_ceiling.fit(v, known.mask, settings.train.gaussians, data.pixel_size, settings.seed) for v in some.volumes]
    row = evaluate.score(torch.stack(fits), some, data.pixel_size) | {"gaussians": settings.train.gaussians, "of_states": chosen.tolist()}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"methods": {f"ceiling of {settings.train.gaussians:,} Gaussians": row}}, indent=1) + "\n")


def numbers(method: dict[str, Any], model: dict[str, Any]) -> dict[str, float]:
    """One row of the table from a method's entry of evaluation.json and, where it has latents, its model's."""
    row = {c: method[c]["mean"] for c in COLUMNS} | {"states_sd": method["auc"]["sd"]}
    if "per_image" in method:
        row |= {"per_image": method["per_image"]["auc"]["mean"], "per_image_difference": method["per_image"]["difference"]["mean"]}
    latents = model.get("latents", {})
    row |= {name: latents[name]["mean"] for name in ("between_over_within", "main_lump") if name in latents}
    if "neighbours" in latents:
        row |= {"neighbours": latents["neighbours"]["similarity"][0], "imbalance": latents["imbalance"]["latent_to_truth"]}
        row["imbalance_back"] = latents["imbalance"]["truth_to_latent"]
    if "parts" in model:
        row["parts_ari"] = model["parts"]["adjusted_rand_index"]
    if moving := model.get("motion"):  # degrees and Å, of all parts that move
        row |= {"turn_error": np.mean([p["error"] for p in moving]), "centre_error": np.mean([p["centre_error"] for p in moving])}
    if changing := model.get("occupancy"):
        row["occupancy_auc"] = np.mean([p["auc"] for p in changing])
    if "leakage" in latents:
        row["leakage"] = max(latents["leakage"].values())
    if "poses" in model:  # degrees about an axis and Å along one
        p = model["poses"]
        row |= {"pose_turn": p["turn"], "pose_shift": p["shift"], "frames_turn": p["frames_turn"]}
        row |= {"auc_in_frames": p["auc"], "difference_in_frames": p["difference"]}
    return row


def table(output: Path, files: list[Path]) -> None:
    """Mean of every method over seeds, with the spread of seeds; a .csv and the same as Markdown beside it, and a figure."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for file in files:
        dataset, _, seed = file.parent.parent.name.rpartition("-seed")
        result = json.loads(file.read_text())
        for method, values in result["methods"].items():
            row = numbers(values, result.get("models", {}).get(method, {}))
            shown = method if not method.startswith("stage") else f"{method}, {file.parent.name}"
            found[dataset, shown][seed] = row  # what needs no model comes again with every variant
    rows = []
    for (dataset, method), of_seed in sorted(found.items()):
        seeds = list(of_seed.values())
        row: dict[str, Any] = {"dataset": dataset, "method": method, "seeds": len(seeds)}
        for name in NAMES:
            values = np.array([s.get(name, np.nan) for s in seeds])
            row[name] = f"{values.mean():.4f}" if np.isfinite(values).all() else ""
            row[f"{name}_spread"] = f"{values.std(ddof=1):.4f}" if len(values) > 1 and np.isfinite(values).all() else ""
        rows.append(row)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    head = ["dataset", "method", "seeds", *NAMES]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(r[h]) + (f" ({s})" if (s := r.get(f"{h}_spread")) else "") for h in head) + " |" for r in rows]
    output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    draw(rows, output.with_suffix(".png"))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    datasets = sorted({r["dataset"] for r in rows})
    height = 0.6 + 0.35 * len(rows) + 0.6 * len(datasets)
    figure, grid = plt.subplots(len(datasets), 2, figsize=(10, height), layout="constrained", squeeze=False)
    for line, dataset in zip(grid, datasets, strict=True):
        mine = [r for r in rows if r["dataset"] == dataset][::-1]
        for axis, column in zip(line, ("auc", "difference"), strict=True):
            spread = [float(r[f"{column}_spread"] or 0) for r in mine]
            axis.barh([r["method"] for r in mine], [float(r[column]) for r in mine], xerr=spread, color="tab:blue", alpha=0.7)
            axis.set(title=f"{dataset}: {column}", xlim=(0, 0.5))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    c = commands.add_parser("config")
    c.add_argument("base", type=Path)
    c.add_argument("--size", type=json.loads, required=True)
    c.add_argument("--energy", type=float, required=True)
    c.add_argument("--seed", type=int, required=True)
    c.add_argument("--model", default="")
    c.add_argument("--particles", type=Path, required=True)
    c.add_argument("--run", type=Path, required=True)
    c.add_argument("--variant", default="base")
    c.add_argument("--changes", type=json.loads, default={})
    r = commands.add_parser("frame")
    z = commands.add_parser("zfile")
    s = commands.add_parser("score")
    s.add_argument("--latents", type=Path)
    g = commands.add_parser("truth")
    f = commands.add_parser("ceiling")
    f.add_argument("--states", type=int, default=5)
    t = commands.add_parser("table")
    for command, names in (
        (r, ("refined", "truth", "output")),
        (z, ("embedding", "labels", "output")),
        (s, ("volumes", "truth", "name", "output")),
        (g, ("folder", "output")),
        (f, ("config", "particles", "truth", "output")),
    ):
        for name in names:
            command.add_argument(name, type=str if name == "name" else Path)
    t.add_argument("output", type=Path)
    t.add_argument("files", type=Path, nargs="+")
    a = parser.parse_args()
    try:
        if a.command == "config":
            make_config(a.base, a.size, a.energy, a.seed, a.model, a.particles, a.run, a.variant, a.changes)
        elif a.command == "frame":
            frame(a.refined, a.truth, a.output)
        elif a.command == "zfile":
            zfile(a.embedding, a.labels, a.output)
        elif a.command == "score":
            score(a.volumes, a.truth, a.name, a.output, a.latents)
        elif a.command == "truth":
            cryobench_truth(a.folder, a.output)
        elif a.command == "ceiling":
            ceiling(a.config, a.particles, a.truth, a.output, a.states)
        else:
            table(a.output, a.files)
    except InputError as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
