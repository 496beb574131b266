"""The Snakefile itself: lint, graph, what reruns when, and what a wrong config is told.

Stages are not run here: outputs stand as empty files whose records Snakemake has made with ``--touch``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cryospire import config as configuration
from cryospire.site import estimate, lock

ROOT = Path(__file__).parents[2]
STORES = ("particles", "consensus", "discovery", "parts", "model", "reconstruction", "analysis", "volumes")
AFTER_TRAIN = {"reconstruct", "analyse", "assemble", "evaluate", "report"}
AFTER_PARTS = {"train"} | AFTER_TRAIN
AFTER_DISCOVER = {"parts"} | AFTER_PARTS
HALVES = {"discover_half", "parts_half", "train_half"}
AFTER_PREPROCESS = {"consensus", "discover"} | AFTER_DISCOVER

CONFIG: dict[str, Any] = {
    "particles": "data/particles.star",
    "output": "results",
    "simulate": {"particles": 400, "box": 32},
    "discover": {"epochs": 2},
}


def snakemake(folder: Path, *options: str) -> tuple[int, str]:
    """Exit code and everything printed by Snakemake in this folder, with its config.yaml."""
    config = [] if "--configfile" in options else ["--configfile", "config.yaml"]
    command = [
        Path(sys.executable).parent / "snakemake",
        "--snakefile",
        ROOT / "Snakefile",
        "--profile",
        ROOT / "cluster/local",
        *config,
        *options,
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=os.environ | {"COLUMNS": "200"})
    return done.returncode, done.stdout + done.stderr


def write_config(folder: Path, changes: dict[str, Any]) -> None:
    merged = {k: dict(v) if isinstance(v, dict) else v for k, v in CONFIG.items()}
    for key, value in changes.items():
        if isinstance(value, dict):
            merged.setdefault(key, {}).update(value)
        else:
            merged[key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(merged))


def planned(folder: Path, *options: str) -> set[str]:
    """Rules that a dry run would execute."""
    code, out = snakemake(folder, "--dry-run", *options)
    assert code == 0, out
    table = out.split("Job stats:")[1].split("total")[0] if "Job stats:" in out else ""
    return set(re.findall(r"^(\w+) +\d+$", table, re.MULTILINE)) - {"all"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every output stands and is up to date."""
    folder = tmp_path_factory.mktemp("finished")
    files = [f"results/{name}.zarr/zarr.json" for name in STORES]
    files += [
        "results/preflight.json",
        "results/evaluation.json",
        "results/report.html",
        "data/particles.star",
        "data/particles.mrcs",
        "data/truth/labels.npy",
    ]
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    write_config(folder, {})
    code, out = snakemake(folder, "--touch", "--forceall")
    assert code == 0, out
    assert planned(folder) == set()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"simulate": {"snr": 0.5}}, {"simulate", "preprocess"} | AFTER_PREPROCESS),
        ({"preprocess": {"dtype": "float32"}}, {"preprocess"} | AFTER_PREPROCESS),
        ({"consensus": {"mask_soft": 5.0}}, AFTER_PREPROCESS),
        ({"discover": {"epochs": 3}}, {"discover"} | AFTER_DISCOVER),
        ({"parts": {"parts": 3}}, AFTER_DISCOVER),
        ({"train": {"epochs": 7}}, AFTER_PARTS),
        ({"analyse": {"states": 4}}, {"analyse", "assemble", "report"}),
        ({"assemble": {"box": 48}}, {"assemble", "report"}),
        ({"preflight": {"sample": 2000, "accept": True}}, set()),
        ({"train": {"checkpoint_minutes": 1.0}, "preprocess": {"workers": 1}, "threads": 1}, set()),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_parameter_reruns_exactly_what_depends_on_it(run: Path, change: dict[str, Any], expected: set[str]) -> None:
    write_config(run, change)
    assert planned(run) - {"preflight"} == expected


def test_touching_an_input_reruns_what_reads_it(run: Path) -> None:
    os.utime(run / "results/parts.zarr/zarr.json")
    assert planned(run) == AFTER_PARTS


FOLLOWS = {
    "simulate": {"simulate", "preflight", "preprocess"} | AFTER_PREPROCESS,
    "preflight": {"preflight", "preprocess"} | AFTER_PREPROCESS,
    "preprocess": {"preprocess"} | AFTER_PREPROCESS,
    "consensus": AFTER_PREPROCESS,
    "discover": {"discover"} | AFTER_DISCOVER,
    "parts": AFTER_DISCOVER,
    "train": AFTER_PARTS,
    "reconstruct": {"reconstruct", "assemble", "evaluate", "report"},
    "analyse": {"analyse", "assemble", "report"},
    "assemble": {"assemble", "report"},
    "evaluate": {"evaluate", "report"},
    "report": {"report"},
}


@pytest.mark.parametrize("stage", FOLLOWS)
def test_forcerun(finished: Path, stage: str) -> None:
    """The stage, what follows from it, and nothing else."""
    assert planned(finished, "--forcerun", stage) == FOLLOWS[stage]


def test_forcerun_knows_every_stage() -> None:
    assert set(FOLLOWS) == set(estimate.STAGES) - {"validate"}  # which is there only with ``halves``


@pytest.fixture(scope="module")
def finished_halves(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with trainings on half-sets, and their comparison."""
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("halves") / "run"))
    write_config(folder, {"halves": True})
    assert planned(folder) == HALVES | {"validate", "report"}
    for name in ("half1/{}", "half2/{}"):
        for store in ("discovery", "parts", "model"):
            file = folder / "results" / name.format(f"{store}.zarr/zarr.json")
            file.parent.mkdir(parents=True)
            file.write_text("{}")
    (folder / "results/validation.json").write_text("{}")
    code, out = snakemake(folder, "--touch", "--forceall")
    assert code == 0, out
    assert planned(folder) == set()
    return folder


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("consensus", AFTER_PREPROCESS | HALVES | {"validate"}),
        ("train", AFTER_TRAIN | {"train", "validate"}),
        ("parts_half", {"parts_half", "train_half", "validate", "report"}),
        ("validate", {"validate", "report"}),
    ],
)
def test_forcerun_with_halves(finished_halves: Path, stage: str, expected: set[str]) -> None:
    assert planned(finished_halves, "--forcerun", stage) == expected


def test_a_parameter_reruns_the_halves_too(finished_halves: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_halves, tmp_path / "run"))
    write_config(run, {"halves": True, "train": {"epochs": 7}})
    assert planned(run) == AFTER_PARTS | {"train_half", "validate"}


def test_two_workflows_on_one_output_refuse_each_other(run: Path, tmp_path: Path) -> None:
    """From the same folder or another; looking and planning stay free."""
    (run / "results" / lock.NAME).write_text(json.dumps(lock.whoami()))  # this process lives
    other = tmp_path / "elsewhere"
    other.mkdir()
    write_config(other, {"output": str(run / "results"), "particles": str(run / "data/particles.star")})
    before = (run / "results/report.html").stat().st_mtime_ns
    for folder in (other, run):
        code, out = snakemake(folder, "--touch", "--forceall")
        assert code != 0 and f"another workflow writes to this folder: process {os.getpid()}" in out
    assert (run / "results/report.html").stat().st_mtime_ns == before
    planned(other)
    (run / "results" / lock.NAME).unlink()
    code, out = snakemake(other, "--touch", "--forceall")
    assert code == 0, out
    assert not (run / "results" / lock.NAME).exists()


def test_a_given_map_is_checked_first(run: Path) -> None:
    """Its hand is a matter of the preflight, on which everything depends."""
    (run / "given.mrc").write_text("map")
    write_config(run, {"map": "given.mrc"})
    assert planned(run) == {"preflight", "preprocess"} | AFTER_PREPROCESS


def test_another_name_of_the_config_reruns_nothing(run: Path) -> None:
    other = (run / "config.yaml").rename(run / "other.yaml")
    code, out = snakemake(run, "--dry-run", "--configfile", str(other))
    assert code == 0
    assert "Nothing to be done" in out


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"train": {"epoch": 3}}, "train.epoch: Extra inputs"),
        ({"parts": {"max_parts": 1}}, "parts.max_parts: Input should be greater"),
        ({"preprocess": {"box": 4}}, "preprocess.box: .*even number from 16 on.*value 4"),
        ({"train": {"batch": 20}}, "train.lanes: .*batch, 20, is no multiple of it .value 8"),
    ],
)
def test_what_is_wrong_in_the_config_is_named_in_one_line(tmp_path: Path, wrong: dict[str, Any], words: str) -> None:
    write_config(tmp_path, wrong)
    code, out = snakemake(tmp_path, "--dry-run")
    assert code != 0 and re.search(rf"config.yaml: {words}", out)
    assert len(out.splitlines()) < 8
    assert not (tmp_path / "results").exists()


def test_names_may_hold_spaces(tmp_path: Path) -> None:
    folder = tmp_path / "my data"
    folder.mkdir()
    write_config(folder, {"particles": "raw images/particles.star", "output": "run 1", "simulate": {"pixel_size": 9.0, "snr": 0.5}})
    (folder / "config.yaml").rename(folder / "a config.yaml")
    code, out = snakemake(folder, "--configfile", "a config.yaml", "--until", "preflight")
    assert code == 0, out
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == ["a config.yaml", "logs", "raw images", "run 1"]
    for file in (ROOT / "workflow/rules").glob("*.smk"):
        shells = file.read_text().partition("    shell:")[2]
        assert not re.search(r"\{(input|output|log|params\.config)[^}:]*\}", shells), f"{file.name}: a name that is not quoted"


def test_missing_particles_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("particles: nowhere.star\n")
    code, out = snakemake(tmp_path, "--dry-run")
    assert code != 0
    assert "nowhere.star" in out


def test_parameters_come_from_the_file_only(tmp_path: Path) -> None:
    write_config(tmp_path, {})
    code, out = snakemake(tmp_path, "--dry-run", "--config", "seed=7")
    assert code != 0
    assert "change it there" in out


def test_dry_run_shows_the_estimate(tmp_path: Path) -> None:
    write_config(tmp_path, {})
    code, out = snakemake(tmp_path, "--dry-run")
    assert code == 0
    assert "estimate for 400 particles, box 32" in out
    assert "GPU-hours" in out


def test_lint(tmp_path: Path) -> None:
    write_config(tmp_path, {})
    code, out = snakemake(tmp_path, "--lint")
    assert code == 0, out


def test_every_rule_is_complete() -> None:
    for file in (ROOT / "workflow" / "rules").glob("*.smk"):
        text = file.read_text()
        if file.name != "common.smk":
            for directive in ("output", "log", "benchmark", "threads", "resources", "params", "message", "shell"):
                assert f"\n    {directive}:" in text, f"{file.name} has no {directive}"
            assert f"cryospire {file.stem} --config" in text, f"{file.name} calls another command than its own"
    assert len((ROOT / "Snakefile").read_text().splitlines()) <= 45


def test_schema_is_that_of_the_config() -> None:
    assert json.loads((ROOT / "workflow/schemas/config.schema.json").read_text()) == configuration.schema(), "run `make schema`"


@pytest.mark.parametrize("file", sorted((ROOT / "workflow/config").glob("*.yaml")), ids=lambda p: p.name)
def test_ready_made_configs_are_valid(file: Path) -> None:
    configuration.load(file)
