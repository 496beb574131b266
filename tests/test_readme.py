"""Every command in the README exists, with the options that it is given; every Python line in it runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cryospire.io import stores

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


def call(*command: object, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=120, env=os.environ | {"COLUMNS": "200"}
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def test_there_are_commands() -> None:
    assert {"make demo", "make test"} <= set(COMMANDS)


@pytest.mark.parametrize("line", sorted({c for c in COMMANDS if c.startswith("cryospire")}))
def test_cryospire_commands_have_these_options(line: str) -> None:
    words = shlex.split(line)
    names = [w for w in words[1:3] if re.fullmatch("[a-z]+", w)]
    shown = call(BIN / "cryospire", *names, "--help")
    for option in (w for w in words if w.startswith("--")):
        assert option in shown, f"{line}: no option {option}"


@pytest.mark.parametrize("line", sorted({c for c in COMMANDS if c.startswith("snakemake")}))
def test_snakemake_commands_plan_a_run(line: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("particles: results/simulate/particles.star\nsimulate: {particles: 100, box: 32, states: 2}\n")
    for name in ("Snakefile", "workflow", "cluster", "envs"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert "report" in call(BIN / "snakemake", *shlex.split(line)[1:], "--dry-run", cwd=tmp_path)


@pytest.mark.parametrize("line", sorted({c for c in COMMANDS if c.startswith("make")}))
def test_make_targets_exist(line: str) -> None:
    assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", re.findall(r"^snakemake .*$", (ROOT / "workflow/benchmark/README.md").read_text(), re.MULTILINE))
def test_the_benchmark_s_commands_plan_a_run(line: str) -> None:
    assert "simulate" in call(BIN / "snakemake", *shlex.split(line)[1:], "--dry-run")


def test_no_other_commands() -> None:
    assert {c.split()[0] for c in COMMANDS} == {"make", "source", "cryospire", "snakemake"}


def test_python_lines_run(tmp_path: Path) -> None:
    common = {"config": {}, "seed": 0, "inputs": {}, "pixel_size": 2.0, "box": 8}
    model = stores.create(tmp_path / "results/model.zarr", "model", **common)  # type: ignore[arg-type]
    stores.put(model, "latents", np.zeros((5, 4), np.float32), ("particle", "latent"), "latent of the particle")
    particles = stores.create(tmp_path / "results/particles.zarr", "particles", **common)  # type: ignore[arg-type]
    stores.put(particles, "images", np.ones((5, 8, 8), np.float32), ("particle", "y", "x"), "whitened image")
    for block in blocks("python"):
        out = call(sys.executable, "-c", block, cwd=tmp_path)
        assert "latent of the particle" in out or "(8, 8)" in out


def test_files_that_it_names_are_there() -> None:
    for name in re.findall(r"\]\(([^)]+)\)|`((?:cluster|envs|workflow)/[\w./-]+)`", TEXT):
        assert (ROOT / (name[0] or name[1])).exists(), name


def test_every_stage_is_in_the_table() -> None:
    for rule in (ROOT / "workflow/rules").glob("*.smk"):
        assert rule.stem == "common" or f"`cryospire {rule.stem}`" in TEXT


def test_every_package_is_explained() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    why = TEXT.split("## Why each package is there")[1]
    for requirement in project["dependencies"]:
        name = re.match(r"[\w-]+", requirement)
        assert name is not None
        assert name[0] in why or name[0].startswith(("numpy", "snakemake-executor")), name[0]
