"""Planted mistakes of convention are found and named; what is right is left alone.

Particles are an asymmetric arrangement of Gaussian balls, projected analytically; the CTF is the published formula, written
here once more; noise is white.
"""

import json
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryospire.config import Config
from cryospire.conventions import InputError
from cryospire.io import mrc
from cryospire.stages import preflight

BOX, PIXEL, N = 32, 4.0, 250
BALLS = np.array([[0, 0, 0], [40, 5, -10], [-30, 25, 8], [10, -45, 20], [15, 20, 40], [-25, -15, -35], [45, -20, 15]], float)
HEIGHT = np.array([1.0, 1.5, 0.8, 1.2, 1.0, 1.4, 0.7])
RADIUS = 5.0  # Å, standard deviation


def wave_aberration(s2: np.ndarray, df: np.ndarray) -> np.ndarray:
    length = 12.2643 / np.sqrt(3e5 + 0.978466e-6 * 3e5**2)
    return np.pi * length * df * s2 - np.pi / 2 * 2.7e7 * length**3 * s2**2


def data(folder: Path, pixel_of_ctf: float = PIXEL, sign: float = 1.0, noise: float = 1.0, ctf: str = "as told") -> builders.Planted:
    """Particles and their stack; ``ctf``: as told, overfocus, flipped (phases) or none."""
    rng = np.random.default_rng(0)
    names = [f"{i + 1:06d}@p.mrcs" for i in range(N)]
    euler = Rotation.random(N, random_state=1).as_euler("ZYZ", degrees=True)
    origin = rng.normal(0, 6, (N, 2))
    df = rng.uniform(1e4, 2.5e4, N)
    p = builders.Planted(names, euler, origin, df, df, np.zeros(N), np.arange(N) % 2 + 1)
    views = np.einsum("nij,bj->nbi", p.matrices, BALLS)
    grid = (np.arange(BOX) - BOX // 2) * PIXEL
    x = np.exp(-((grid - (views[:, :, :1] - origin[:, None, :1])) ** 2) / (2 * RADIUS**2))
    y = np.exp(-((grid - (views[:, :, 1:2] - origin[:, None, 1:2])) ** 2) / (2 * RADIUS**2))
    clean = np.einsum("b,nby,nbx->nyx", HEIGHT, y, x)
    f = np.fft.fftfreq(BOX, pixel_of_ctf)
    s2 = f[:, None] ** 2 + f[None] ** 2
    values = np.sin(wave_aberration(s2[None], (-df if ctf == "overfocus" else df)[:, None, None]) + np.arcsin(0.1))
    values = np.abs(values) if ctf == "flipped" else np.ones_like(values) if ctf == "none" else values
    images = sign * np.fft.ifft2(np.fft.fft2(clean) * values).real
    images = images / images.std() + noise * rng.normal(0, 2, images.shape)
    builders.stack(folder / "p.mrcs", N, BOX, PIXEL, data=images)
    return p


def star(folder: Path, p: builders.Planted, pixel: float = PIXEL, **columns: Any) -> Path:
    return builders.star31(folder / "p.star", p, builders.optics_columns(BOX, pixel), builders.particle_columns(p) | columns)


def decide(folder: Path, source: Path, accept: bool = True, **extra: Any) -> dict[str, Any]:
    config = Config.model_validate({"particles": source} | extra)
    preflight.run(config, folder / "preflight.json", accept=accept)
    return written(folder)


def written(folder: Path) -> dict[str, Any]:
    """Either the verdict that lets the run go on or the one that stops it, which is not there under the name that the run waits for."""
    (file,) = folder.glob("preflight*.json")
    (figure,) = folder.glob("preflight*.png")
    assert file.stem == figure.stem and figure.stat().st_size > 10_000
    page = json.loads(file.read_text())
    assert (file.name == "preflight.stopped.json") <= (not all(v["ok"] for v in page["verdict"]))
    return page | {v["check"]: v for v in page["verdict"]}


def density(folder: Path, box: int = 48, pixel: float = 8 / 3, mirror: float = 1.0, sign: float = 1.0) -> Path:
    grid = (np.arange(box) - box // 2) * pixel
    z, y, x = np.meshgrid(grid, grid, grid, indexing="ij")
    volume = sum(
        h * np.exp(-((x - b[0]) ** 2 + (y - b[1]) ** 2 + (z - mirror * b[2]) ** 2) / (2 * RADIUS**2))
        for b, h in zip(BALLS, HEIGHT, strict=True)
    )
    mrc.write_volume(folder / "map.mrc", sign * volume, pixel)
    return folder / "map.mrc"


def test_right_conventions_pass_with_a_map_of_another_box_and_pixel_size(tmp_path: Path) -> None:
    page = decide(tmp_path, star(tmp_path, data(tmp_path)), accept=False, map=density(tmp_path))
    assert all(v["ok"] for v in page["verdict"])
    assert page["contrast"]["found"].startswith("protein is white") and page["given map"]["found"] == "matches, same hand"
    assert all(page[c]["found"] == "as given" for c in ("rotations", "shifts", "CTF", "pixel size of the CTF"))
    assert page["particles"] == page["sample"] == N and page["estimate"]["train"]["mem_mb"] > 0


def swap(p: builders.Planted) -> dict[str, Any]:
    """Angles of the inverse rotation."""
    e = Rotation.from_matrix(p.matrices).as_euler("ZYZ", degrees=True)
    return dict(zip(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), e.T.tolist(), strict=True))


def upside_down(p: builders.Planted) -> dict[str, Any]:
    mirror = np.diag([1.0, -1.0, 1.0])
    e = Rotation.from_matrix((mirror @ p.matrices @ mirror).transpose(0, 2, 1)).as_euler("ZYZ", degrees=True)
    return dict(zip(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), e.T.tolist(), strict=True)) | {"rlnOriginYAngst": list(-p.origin[:, 1])}


MISTAKES = {
    "inverse rotations": ("rotations", "transposed", swap),
    "upside down": ("rotations", "upside down", upside_down),
    "opposite shifts": (
        "shifts",
        "opposite",
        lambda p: {"rlnOriginXAngst": list(-p.origin[:, 0]), "rlnOriginYAngst": list(-p.origin[:, 1])},
    ),
    "shifts in pixels": ("shifts", "in pixels", lambda p: {f"rlnOrigin{a}Angst": list(p.origin[:, i] / PIXEL) for i, a in enumerate("XY")}),
    "shifts in Å": (
        "shifts",
        "Å, read as pixels",
        lambda p: {f"rlnOrigin{a}Angst": list(p.origin[:, i] * PIXEL) for i, a in enumerate("XY")},  # as rlnOriginX with Å in it is read
    ),
    "shuffled poses": ("poses", "no signal", lambda p: {"rlnAngleRot": list(p.euler[::-1, 0]), "rlnAngleTilt": list(p.euler[::-1, 1])}),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistake_is_named_and_stops_the_run(tmp_path: Path, name: str) -> None:
    check, words, columns = MISTAKES[name]
    p = data(tmp_path)
    source = star(tmp_path, p, **columns(p))
    with pytest.raises(InputError, match=f"p.star: preflight: .*{words}"):
        decide(tmp_path, source, accept=False)
    page = written(tmp_path)
    assert words in page[check]["found"] and not page[check]["ok"] and not (tmp_path / "preflight.json").exists()


@pytest.mark.parametrize("ctf,words", [("flipped", "already phase-flipped"), ("none", "no CTF in the images")])
def test_images_with_another_ctf_than_told(tmp_path: Path, ctf: str, words: str) -> None:
    source = star(tmp_path, data(tmp_path, noise=0.5, ctf=ctf))
    with pytest.raises(InputError, match=f"preflight: .*CTF: .*{words}"):
        decide(tmp_path, source, accept=False)
    assert words in written(tmp_path)["CTF"]["found"] and not written(tmp_path)["CTF"]["ok"]


def test_overfocus_counted_as_positive_looks_like_black_protein_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="overfocus as positive"):
        decide(tmp_path, star(tmp_path, data(tmp_path, ctf="overfocus")), accept=False)
    black = decide(tmp_path, star(tmp_path, data(tmp_path, sign=-1.0)))["contrast"]
    assert "black" in black["found"] and "overfocus" not in black["found"]


@pytest.mark.parametrize("factor,words", [(2.0, "0.5 times"), (0.5, "2 times")])
def test_pixel_size_wrong_by_two_disagrees_with_the_thon_rings(tmp_path: Path, factor: float, words: str) -> None:
    p = data(tmp_path, noise=0.5)
    shifts = {f"rlnOrigin{a}Angst": list(p.origin[:, i] * factor) for i, a in enumerate("XY")}  # the refinement used the same pixel
    page = decide(tmp_path, star(tmp_path, p, PIXEL * factor, **shifts))
    assert words in page["pixel size of the CTF"]["found"] and not page["pixel size of the CTF"]["ok"]


def test_black_protein_is_found_and_the_setting_proposed(tmp_path: Path) -> None:
    source = star(tmp_path, data(tmp_path, sign=-1.0))
    with pytest.raises(InputError, match=r"set preprocess\.contrast: black"):
        decide(tmp_path, source, accept=False)
    page = written(tmp_path)
    assert "black" in page["contrast"]["found"] and page["proposal"] == {"preprocess.contrast": "black"}
    assert decide(tmp_path, source, accept=False, preprocess={"contrast": "black"})["contrast"]["ok"]
    small = decide(tmp_path, source, accept=False, preflight={"accept": True, "sample": 100})
    assert small["sample"] == 100 and not small["contrast"]["ok"]


@pytest.mark.parametrize("mirror,sign,words", [(-1.0, 1.0, "opposite hand"), (1.0, -1.0, "opposite contrast")])
def test_hand_and_contrast_of_a_given_map(tmp_path: Path, mirror: float, sign: float, words: str) -> None:
    page = decide(tmp_path, star(tmp_path, data(tmp_path)), map=density(tmp_path, 32, PIXEL, mirror, sign))
    assert words in page["given map"]["found"] and not page["given map"]["ok"]


def test_a_strange_map_does_not_match(tmp_path: Path) -> None:
    mrc.write_volume(tmp_path / "map.mrc", np.random.default_rng(0).normal(0, 1, (32, 32, 32)), PIXEL)
    page = decide(tmp_path, star(tmp_path, data(tmp_path)), map=tmp_path / "map.mrc")
    assert "does not match" in page["given map"]["found"]


def test_dead_and_repeated_images_are_counted_and_named(tmp_path: Path) -> None:
    p = data(tmp_path)
    stack = np.memmap(tmp_path / "p.mrcs", "<f4", "r+", 1024, (N, BOX, BOX))
    stack[9], stack[20], stack[31] = 3.0, np.nan, stack[30]
    stack.flush()
    page = decide(tmp_path, star(tmp_path, p))
    assert page["dead images"]["found"] == "2 of 250, first: row 10 (000010@p.mrcs)" and not page["dead images"]["ok"]
    assert page["repeated images"]["found"] == "1 of 250, first: rows 31 and 32"
    assert page["sample"] == N - 2


def test_distortions_are_undone_before_judging(tmp_path: Path) -> None:
    """A table that tells of an even aberration the images do not have explains less."""
    p = data(tmp_path)
    explained = []
    for piston in (0.0, 1.2):
        optics = builders.optics_columns(BOX, PIXEL) | {"rlnEvenZernike": [f"[{piston}]"]}
        page = decide(tmp_path, builders.star31(tmp_path / "p.star", p, optics, builders.particle_columns(p)))
        explained.append(page["evidence"]["ctf"]["as given"]["explained"])
    assert explained[1] < 0.97 * explained[0]
