"""Two models of half-sets: what they share is found, what they do not share is told, and a half never sees the other's images."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import mrcfile
import numpy as np
import pytest
import torch

from cryospire.config import Analyse, Config, Discover, Parts, Train, section
from cryospire.conventions import InputError
from cryospire.io import stores
from cryospire.maths.poses import random_rotations
from cryospire.stages import analyse, discover, parts, train, validate
from cryospire.training import model as mixtures

PLACES = np.array([[-1.5, 0.5], [0.4, 1.2], [1.3, -0.8]])  # latents of three states


def write_half(path: Path, synthetic: SimpleNamespace, half: int, latents: np.ndarray, mixture: mixtures.Mixture, part: np.ndarray) -> Path:
    """A model.zarr of the half-set whose particles are those rows of ``latents`` that belong to it."""
    mine = np.arange(len(latents)) % 2 + 1 == half
    grid = {"pixel_size": synthetic.pixel, "box": synthetic.box}
    group = stores.create(path, "model", config=section(mixture.config), seed=half, inputs={}, **grid)
    stores.put(group, "id", synthetic.ids(len(latents))[mine], ("particle",), "permanent particle id")
    stores.put(group, "half_set", np.full(mine.sum(), half), ("particle",), "half-set")
    stores.put(group, "latents", latents[mine].astype(np.float32), ("particle", "latent"), "latent", "latent unit")
    stores.put(group, "anchors/part", part, ("anchor",), "part of the anchor")
    mixtures.save(group, mixture)
    stores.finish(group)
    return path


@pytest.fixture
def compare(tmp_path: Path, synthetic: SimpleNamespace) -> Callable[..., dict]:
    """Run the stage on a whole model of three states in 900 particles, and halves that see state k of half h at ``seen[h][k]``."""
    label = np.arange(900) // 2 % 3
    whole = synthetic.write_model(tmp_path / "model.zarr", PLACES[label])
    config = Config(output=tmp_path, analyse=Analyse(states=3, trajectories=0, umap=False))

    def run(first: np.ndarray, second: np.ndarray, change: Callable = lambda half: None, part=(0, 1), held: int | None = None) -> dict:
        stores.writable(whole).attrs["held_part"] = held
        analyse.run(config, model=whole, output=tmp_path / "analysis.zarr")
        other = synthetic.two_part_mixture()
        change(other)
        paths = {
            "half1": write_half(tmp_path / "half1/model.zarr", synthetic, 1, first[label], synthetic.two_part_mixture(), np.arange(2)),
            "half2": write_half(tmp_path / "half2/model.zarr", synthetic, 2, second[label], other, np.array(part)),
        }
        validate.run(config, model=whole, analysis=tmp_path / "analysis.zarr", **paths, output=tmp_path / "validation.json")
        return json.loads((tmp_path / "validation.json").read_text())

    return run


def test_a_rare_state_is_shown_by_its_own_particles(tmp_path: Path, synthetic: SimpleNamespace) -> None:
    label = np.minimum(np.arange(900) // 2 % 150, 2)  # of each half, 3 particles in states 0 and 1
    whole = synthetic.write_model(tmp_path / "model.zarr", PLACES[label])
    half = write_half(tmp_path / "half1.zarr", synthetic, 1, PLACES[label], synthetic.two_part_mixture(), np.arange(2))
    weight = torch.bincount(torch.from_numpy(label)) / len(label)
    shown = validate.shown_at(half, whole, torch.from_numpy(PLACES).float(), weight, 1)
    torch.testing.assert_close(shown, torch.from_numpy(PLACES).float())


def test_equal_halves_agree_in_everything(compare: Callable[..., dict], tmp_path: Path) -> None:
    found = compare(PLACES, PLACES)
    for kind in ("volumes", "differences"):
        np.testing.assert_allclose(found[kind]["curves"], 1, atol=1e-4)
    assert found["parts"] == {"found": [2, 2], "adjusted_rand_index": 1.0, "counted": 1.0}
    for m in found["motion"]:
        assert max(m["angle_apart"]) < 0.1 and max(m["way_apart"]) < 1e-2 and m["occupancy_apart"] < 1e-4
    assert max(max(m["angle"][0]) for m in found["motion"]) > 5  # and there is something to agree on
    assert (tmp_path / "validation.png").stat().st_size > 10_000
    assert len(list((tmp_path / "validation").glob("state_*_half?.mrc"))) == 6


@pytest.mark.parametrize("whole_holds", [False, True])
def test_halves_that_hold_other_parts_are_told_in_one_frame(compare: Callable[..., dict], whole_holds: bool) -> None:
    held = 0 if whole_holds else None
    found = compare(PLACES, PLACES, lambda half: half.hold(half.anchor == 1, torch.from_numpy(PLACES).float()), held=held)
    assert np.min(found["volumes"]["curves"]) > 0.99
    still = found["held_part"]
    assert still == 0 or not whole_holds
    assert max(found["motion"][still]["angle"][0]) < 0.1 and max(found["motion"][1 - still]["angle"][0]) > 5


def test_a_part_that_a_half_lacks_gives_no_frame(compare: Callable[..., dict]) -> None:
    def without(half: mixtures.Mixture) -> None:
        half.centre[:, half.anchor == 0] += 100

    assert compare(PLACES / 4, PLACES / 4, without, held=0)["held_part"] == 1


def test_volumes_are_those_at_the_latents_of_the_states(compare: Callable[..., dict], tmp_path: Path, synthetic: SimpleNamespace) -> None:
    compare(PLACES, PLACES)
    states = stores.read(stores.open_store(tmp_path / "analysis.zarr", "analysis"), "states/latent")
    mixture = synthetic.two_part_mixture()
    for k, z in enumerate(states):
        _, amplitude, scale = mixture.forward_gaussians(torch.from_numpy(z)[None])
        mass = float((amplitude[0] * (2 * np.pi) ** 1.5 * scale**3).sum())
        written = mrcfile.read(tmp_path / f"validation/state_{k:03d}_half2.mrc")
        assert written.sum() * synthetic.pixel**3 == pytest.approx(mass, rel=0.02)


def test_two_states_that_one_half_takes_for_each_other(compare: Callable[..., dict]) -> None:
    """With two of three states exchanged, their differences still add up to minus the third's; motion goes backwards."""
    swapped = compare(PLACES, PLACES[[1, 0, 2]])
    assert swapped["parts"]["adjusted_rand_index"] > 0.9  # the same molecule
    area = sorted(swapped["differences"]["area"]["states"])
    assert area[-1] > 0.49 and area[1] < 0.3
    assert max(max(m["angle_apart"]) for m in swapped["motion"]) > 5


def test_a_half_that_sees_no_change(compare: Callable[..., dict]) -> None:
    """One volume for all states: the differences agree in nothing, whatever the volumes do."""
    found = compare(PLACES, np.repeat(PLACES[:1], 3, 0))
    assert found["differences"]["area"]["mean"] < 0.1
    for m in found["motion"]:
        assert max(m["angle"][1], default=0) < 0.1
        np.testing.assert_allclose(m["angle_apart"], m["angle"][0], atol=0.1)


def test_parts_divided_otherwise(compare: Callable[..., dict]) -> None:
    found = compare(PLACES, PLACES, part=(0, 0))
    assert found["parts"]["found"] == [2, 1] and found["parts"]["adjusted_rand_index"] < 0.1


def test_a_part_that_one_half_lacks_is_told(compare: Callable[..., dict]) -> None:
    def lose(mixture: mixtures.Mixture) -> None:
        mixture.centre[:, 60:] += 12  # pixels: its Gaussians lie in the corner of the box

    found = compare(PLACES, PLACES, lose)
    assert [m.get("missing") for m in found["motion"]] == [None, [2]]
    assert "part 2 is not found where it is in the whole model in half-set 2" in validate.sentences(found)[-1]


def test_ways_are_those_of_one_point_whatever_of_a_part_a_half_has(compare: Callable[..., dict]) -> None:
    def lose_a_side(mixture: mixtures.Mixture) -> None:
        turning = torch.nonzero(mixture.anchor == 0)[:, 0]
        side = turning[mixture.centre[0, turning] > mixture.centre[0, turning].median()]
        mixture.centre[:, side] += 100  # pixels: out of the box

    found = compare(PLACES, PLACES, lose_a_side, held=1)["motion"][0]
    assert max(found["way"][0]) > 5 and max(found["way_apart"]) < 0.1  # Å


def test_halves_that_share_no_place_say_so(compare: Callable[..., dict]) -> None:
    """No Gaussian can be compared: the index over none would be 1."""

    def move(mixture: mixtures.Mixture) -> None:
        mixture.centre += 10  # pixels

    found = compare(PLACES, PLACES, move)
    assert found["parts"]["counted"] == 0 and found["parts"]["adjusted_rand_index"] == 0


def test_a_model_of_all_particles_is_no_half(compare: Callable[..., dict], tmp_path: Path) -> None:
    compare(PLACES, PLACES)
    paths = {name: tmp_path / name for name in ("model", "analysis")}
    given = {name: path.with_suffix(".zarr") for name, path in paths.items()}
    with pytest.raises(InputError, match="half-set 1 alone"):
        validate.run(
            Config(), **given, half1=tmp_path / "model.zarr", half2=tmp_path / "half2/model.zarr", output=tmp_path / "validation.json"
        )


def half_trained(folder: Path, images: torch.Tensor, half_maps: np.ndarray, rotation: torch.Tensor) -> Path:
    """Stage 1, parts and stage 2 of half-set 1; returns the folder."""
    n, box = images.shape[:2]
    group = stores.create(folder / "particles.zarr", "particles", config={}, seed=0, inputs={}, pixel_size=4.0, box=box)
    group.create_array("images", data=images.numpy(), chunks=(16, box, box))
    columns = {
        "id": np.arange(n), "half_set": np.arange(n) % 3 % 2 + 1, "pose/rotation": rotation.numpy(), "pose/shift": np.zeros((n, 2)),
        "noise/whitening": np.ones((1, box // 2 + 1)), "ctf/group": np.zeros(n, int), "optics/voltage": np.array([300.0]),
        "optics/cs": np.zeros(1), "optics/amplitude_contrast": np.zeros(1), "ctf/phase_shift": np.full(n, 90.0), "ctf/scale": np.ones(n),
    }  # fmt: skip
    for name, data in (columns | {f"ctf/{k}": np.zeros(n) for k in ("defocus_u", "defocus_v", "defocus_angle")}).items():
        stores.put(group, name, data, tuple(f"d{k}" for k in range(data.ndim)), name)
    stores.finish(group)
    group = stores.create(folder / "consensus.zarr", "consensus", config={}, seed=0, inputs={}, pixel_size=4.0, box=box)
    values = {"map": half_maps.mean(0), "half_maps": half_maps, "mask": np.ones((box,) * 3, np.float32), "fsc": np.ones(box // 2 + 1)}
    for name, data in values.items():
        stores.put(group, name, data.astype(np.float32), tuple(f"d{k}" for k in range(data.ndim)), name)
    stores.finish(group)
    config = Config(
        seed=3, threads=1, discover=Discover(gaussians=24, epochs=2, features=4, batch=16, lanes=4),
        parts=Parts(parts=2, anchors=2), train=Train(gaussians=32, epochs=1, hidden=8, rank=4, batch=16, lanes=4),
    )  # fmt: skip
    found, division = folder / "half1/discovery.zarr", folder / "half1/parts.zarr"
    discover.run(config, particles=folder / "particles.zarr", consensus=folder / "consensus.zarr", output=found, half=1)
    parts.run(config, particles=folder / "particles.zarr", discovery=found, output=division)
    train.run(config, particles=folder / "particles.zarr", discovery=found, parts=division, output=folder / "half1/model.zarr", half=1)
    return folder


def test_no_image_of_the_other_half_is_seen(tmp_path: Path) -> None:
    """Everything of half-set 2 is replaced by noise: the model of half-set 1 stays the same, bit for bit."""
    g = torch.Generator().manual_seed(0)
    images, maps = torch.randn(150, 16, 16, generator=g), torch.rand(2, 16, 16, 16, generator=g).numpy()
    rotation = random_rotations(150, g).float()
    other, other_maps = images.clone(), maps.copy()
    of_second = torch.from_numpy(np.arange(150) % 3 % 2 == 1)
    other[of_second] = 5 * torch.randn(int(of_second.sum()), 16, 16, generator=g)
    other_maps[1] = 0
    first, second = half_trained(tmp_path / "a", images, maps, rotation), half_trained(tmp_path / "b", other, other_maps, rotation)
    for name in ("discovery", "model"):
        one, two = (stores.open_store(folder / f"half1/{name}.zarr", name) for folder in (first, second))
        assert set(stores.read(one, "half_set")) == {1} and len(stores.read(one, "id")) == 100
        for array in ("latents", "gaussians/centre", "gaussians/scale", "gaussians/amplitude", "gaussians/feature"):
            assert np.array_equal(stores.read(one, array), stores.read(two, array)), array
        assert np.abs(stores.read(one, "latents")).max() > 0


def test_stage_2_of_a_half_wants_stage_1_of_that_half(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    images, maps = torch.randn(60, 16, 16, generator=g), torch.rand(2, 16, 16, 16, generator=g).numpy()
    folder = half_trained(tmp_path, images, maps, random_rotations(60, g).float())
    given = {"particles": folder / "particles.zarr", "discovery": folder / "half1/discovery.zarr", "parts": folder / "half1/parts.zarr"}
    with pytest.raises(InputError, match="no partner"):
        train.run(Config(), **given, output=folder / "half2/model.zarr", half=2)
