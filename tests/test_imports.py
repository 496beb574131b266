"""The arrows of the house: who may import whom, and which package lives in which room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cryospire"

# Room -> rooms it may import.
ARROWS = {
    "conventions": set(),
    "config": {"conventions"},
    "log": {"conventions"},
    "maths": {"conventions"},
    "kernels": {"conventions", "maths"},
    "io": {"conventions", "log", "config"},
    "training": {"conventions", "config", "log", "maths", "kernels", "io"},
    "site": {"conventions", "config", "log"},
    "stages": {"conventions", "config", "log", "maths", "kernels", "io", "training", "site"},
    "cli": {"conventions", "config", "log", "stages", "site"},
}
# Package -> files that may import it.
HOMES = {
    "dask": ("cryospire/stages/preprocess.py",),
    "distributed": ("cryospire/stages/preprocess.py",),
    "torch.distributed": ("cryospire/training/distributed.py",),
    "mpi4py": ("cryospire/stages/ranks.py",),
    "zarr": ("cryospire/io/stores.py",),
    "starfile": ("cryospire/io/metadata",),
    "mrcfile": ("cryospire/io/mrc.py",),
    "snakemake": (),
    "typer": ("cryospire/cli.py",),
    "triton": ("cryospire/kernels/",),
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(file: Path) -> Iterator[str]:
    """Full names of everything that a module imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_run_one_way(file: Path) -> None:
    here = room(file)
    if here in ("__init__", "__main__"):
        return
    for name in imports(file):
        words = name.split(".")
        if words[0] == "cryospire" and words[1] not in ("__version__", here):
            assert words[1] in ARROWS[here], f"{file.relative_to(ROOT)} ({here}) may not import {name}"


@pytest.mark.parametrize("file", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_packages_stay_in_their_rooms(file: Path) -> None:
    path = str(file.relative_to(ROOT))
    for name in imports(file):
        for package, homes in HOMES.items():
            if name == package or name.startswith(f"{package}."):
                assert path.startswith(homes or "nowhere"), f"{path} may not import {package}"


def test_the_table_names_every_room() -> None:
    assert {room(f) for f in modules()} - {"__init__", "__main__"} == set(ARROWS)
