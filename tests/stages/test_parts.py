"""Parts from planted features, seeds from a known density, and a fine mixture that keeps what the coarse one holds."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import seen
import torch
from sklearn.metrics import adjusted_rand_score

from cryospire.config import Config, Discover, Parts, Train
from cryospire.conventions import InputError
from cryospire.io import mrc, stores
from cryospire.kernels import render_volume
from cryospire.maths import rigid
from cryospire.maths.metrics import fsc
from cryospire.maths.poses import exp_so3
from cryospire.stages import discover, docking, parts, train
from cryospire.training import model as mixtures
from cryospire.training.data import Particles

BOX, PIXEL, G, IMAGES = 32, 4.0, 240, 800


HOME = torch.tensor([[-22.0, 0, 0], [20, 14, 0], [16, -20, 8]])
SPREAD = np.array([[5.0, 5, 5], [9, 4, 4], [5, 5, 5]])  # what swings is long: of a ball, no image tells the turn


def true_shape(centre: torch.Tensor, truth: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Part 0 rests, part 1 swings about the z axis by 35 degrees a unit of the first latent, part 2 is there if the second is positive."""
    angle = z[:, 0] * (35 * torch.pi / 180)
    turn = exp_so3(torch.stack([0 * angle, 0 * angle, angle], 1))
    moved = torch.where((truth == 1)[:, None], centre @ turn.transpose(1, 2), centre)
    present = torch.where(truth == 2, (z[:, 1:] > 0).float() * 0.9 + 0.05, 0.95 * torch.ones(len(z), 1))
    return moved, present


def planted(seed: int = 0) -> tuple[mixtures.Mixture, np.ndarray]:
    """A coarse mixture of three regions whose features differ, buried in the noise that training leaves; its heads know the motion."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    truth = np.repeat([0, 1, 2], [120, 80, 40])
    model = mixtures.Mixture(Discover(gaussians=G, latent=2, features=6), 2, 6, G, BOX, PIXEL)
    centre = HOME[truth] + torch.from_numpy(rng.normal(0, SPREAD[truth])).float()
    model.place(centre, torch.full((G,), 6.0), torch.full((G,), 0.03))
    with torch.no_grad():
        model.feature.copy_(torch.from_numpy(np.eye(6)[truth] + rng.normal(0, 0.2, (G, 6))))
    model.feature.requires_grad_(False)
    adam = torch.optim.Adam([*model.flex.parameters(), *model.occupancy.parameters()], lr=2e-2)
    for _ in range(400):
        z = torch.randn(32, 2)
        moved, present = true_shape(centre, torch.from_numpy(truth), z)
        error = (model.gaussians(z)[0].transpose(1, 2) - moved / PIXEL).square().mean()
        error = error + 3 * (model.occupancies(z, model.features) - present).square().mean()
        adam.zero_grad()
        error.backward()
        adam.step()
    return model, truth


@pytest.fixture(scope="module")
def discovery(tmp_path_factory):  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("parts") / "discovery.zarr"
    model, truth = planted()
    z = np.random.default_rng(0).normal(size=(IMAGES, 2)).astype(np.float32)
    write_images(path.with_name("particles.zarr"), model, torch.from_numpy(truth), torch.from_numpy(z))
    inputs = {"particles": path.with_name("particles.zarr")}
    config = model.config.model_dump(mode="json")
    group = stores.create(path, "discovery", config=config, seed=0, inputs=inputs, pixel_size=PIXEL, box=BOX)
    mixtures.save(group, model)
    stores.put(group, "latents", z, ("particle", "latent"), "latent")
    stores.put(group, "id", np.arange(IMAGES), ("particle",), "permanent particle id")
    for name in ("pose/rotation", "pose/shift"):  # as they are in the images
        of_images = stores.read(stores.open_store(path.with_name("particles.zarr"), "particles"), name)
        stores.put(group, name, of_images, tuple(f"d{k}" for k in range(of_images.ndim)), name)
    for name in ("history/turn_sd", "history/shift_sd"):
        stores.put(group, name, np.zeros(1), ("epoch",), name)
    stores.finish(group)
    return path, truth


def write_images(path: Path, model: mixtures.Mixture, truth: torch.Tensor, z: torch.Tensor) -> None:
    """What the planted molecule shows at the latents z (N, 2), of its own motion, not of what the heads learned of it."""
    data = seen.empty(path, len(z), BOX, PIXEL)
    with torch.no_grad():
        moved, present = true_shape(model.centre.T * PIXEL, truth, z)
        seen.fill(path, data, seen.images(data, moved, present * model.relative_amplitude * model.amplitude_unit, model.scale))


def division(discovery, tmp_path, threads=1, **changes):  # type: ignore[no-untyped-def]
    config = Config(parts=Parts(**changes), threads=threads)
    given = {"particles": discovery[0].with_name("particles.zarr"), "discovery": discovery[0]}
    parts.run(config, **given, output=tmp_path / "parts.zarr", force=True)
    return stores.open_store(tmp_path / "parts.zarr", "parts")


@pytest.fixture(scope="module")
def divided(discovery, tmp_path_factory):  # type: ignore[no-untyped-def]
    """The division into parts, their number not given, and the folder it is in."""
    folder = tmp_path_factory.mktemp("divided")
    return division(discovery, folder, max_parts=6), folder


def test_planted_parts_and_their_number_are_found(discovery, divided) -> None:  # type: ignore[no-untyped-def]
    found, _ = divided
    assert found.attrs["parts"] == 3
    labels, anchor = stores.read(found, "part"), stores.read(found, "anchor")
    assert adjusted_rand_score(discovery[1], labels) > 0.95
    assert np.all(np.diff(np.bincount(labels)) <= 0), "parts come largest first"
    assert np.array_equal(stores.read(found, "anchors/part")[anchor], labels), "an anchor serves one part"
    assert len(np.unique(anchor)) == 5


def test_where_parts_are_is_told(discovery, divided) -> None:  # type: ignore[no-untyped-def]
    """The third comes and goes with the second latent coordinate; the others are always there."""
    found, _ = divided
    present, z = stores.read(found, "motion/present").astype(bool), stores.read(found, "motion/latent")
    order = [int(np.bincount(stores.read(found, "part")[discovery[1] == k]).argmax()) for k in range(3)]
    clear = (np.abs(z[:, 1]) > 0.5) & (stores.read(found, "motion/share") * IMAGES > 15)
    assert clear.sum() > 8
    assert present[order[0]].all() and present[order[1]].all()
    assert np.array_equal(present[order[2]][clear], z[clear, 1] > 0)


def from_the_first(division: parts.Division, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotations (K, 3, 3) and translations (K, 3), Å, of a part from where it is at the first shape."""
    rotation = division.poses[k].rotation @ division.poses[k].rotation[0].T
    return rotation, division.translation(k) - division.translation(k)[0] @ rotation.mT


def test_the_images_put_gaussians_right(discovery) -> None:  # type: ignore[no-untyped-def]
    """A fifth of the Gaussians start in a part drawn by lot; parts are where they are."""
    path, truth = discovery
    data = Particles(stores.open_store(path.with_name("particles.zarr"), "particles"))
    model, z = mixtures.load(path), stores.read(stores.open_store(path, "discovery"), "latents")
    known = parts.shapes(model, z, 25, 0)
    right = parts.Division.of(model, known, truth, [rigid.fit(known, torch.from_numpy(truth == k), thorough=True) for k in range(3)])
    rng = np.random.default_rng(0)
    label = np.where(rng.random(G) < 0.2, rng.integers(3, size=G), truth).astype(np.int32)
    wrong = parts.Division.drawn(model, known, label, right.reference)
    for k, pose in enumerate(right.poses):
        wrong.poses.append(replace(pose, centre=pose.rotation @ (wrong.middle(k) - right.middle(k)) + pose.centre))
    assert adjusted_rand_score(truth, label) < 0.8
    views = docking.Views.of(data, np.arange(IMAGES), torch.from_numpy(z), known.latent)
    settled = wrong.settled(model, views, known)
    assert adjusted_rand_score(truth, settled.label) > 0.95
    for k, pose in enumerate(settled.poses):  # and what carries them from one shape to another is what it was
        torch.testing.assert_close(pose.rotation[settled.reference[k]], torch.eye(3), rtol=0, atol=1e-5)
        for new, old in zip(from_the_first(settled, k), from_the_first(right, k), strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=0.05)


def test_what_is_rarely_there_does_not_rest(discovery, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """The body moves a little everywhere, a light part is there at one shape, where it is drawn: that one is faint, the body rests."""
    path, truth = discovery
    data = Particles(stores.open_store(path.with_name("particles.zarr"), "particles"))
    model, z = mixtures.load(path), stores.read(stores.open_store(path, "discovery"), "latents")
    known = parts.shapes(model, z, 10, 0)
    known.mass[:, torch.from_numpy(truth == 2)] *= 0.1
    division = parts.Division.of(model, known, truth, [rigid.fit(known, torch.from_numpy(truth == k)) for k in range(3)])
    body, arm, rare = division.poses
    there = torch.zeros(10)
    there[division.reference[2]] = 1
    division.poses[:] = [replace(body, centre=body.centre + torch.tensor([1.0, 0, 0])), arm, replace(rare, strength=there)]
    asked = []
    monkeypatch.setattr(docking, "dock", lambda views, drawn, poses, faint, *rest: asked.append((faint, *rest)) or (poses, [True] * 3))
    division.docked(docking.Views.of(data, np.arange(IMAGES), torch.from_numpy(z), known.latent), known, True, lambda: None)
    faint, doubtful, still, *_ = asked[0]
    assert (faint, doubtful, still) == ([False, False, True], True, 0)


def test_the_number_of_threads_changes_nothing(discovery, divided, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    again = division(discovery, tmp_path, threads=2, max_parts=6)
    for name in ("part", "motion/rotation", "motion/translation", "motion/strength", "anchors/position"):
        assert np.array_equal(stores.read(again, name), stores.read(divided[0], name)), name


def test_masks_cover_their_parts_and_lie_between_zero_and_one(divided) -> None:  # type: ignore[no-untyped-def]
    found, folder = divided
    labels, position = stores.read(found, "part"), stores.read(found, "position")
    voxel = np.round(position / PIXEL).astype(int) + BOX // 2
    for k in range(3):
        mask, pixel = mrc.read_volume(folder / "parts_masks" / f"part_{k + 1}.mrc")
        x, y, z = voxel[labels == k].T
        assert pixel == PIXEL and mask.min() >= 0 and mask.max() <= 1
        assert np.mean(mask[z, y, x] > 0.99) > 0.95
        assert mask.mean() < 0.2


def test_random_parts_know_nothing(discovery, tmp_path) -> None:  # type: ignore[no-untyped-def]
    found = division(discovery, tmp_path, parts=3, random=True)
    assert abs(adjusted_rand_score(discovery[1], stores.read(found, "part"))) < 0.1


def test_too_few_anchors_are_refused(discovery, tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=r"parts\.anchors: 2 anchors cannot serve 3 parts"):
        division(discovery, tmp_path, parts=3, anchors=2)


def test_a_store_of_another_version_is_named(discovery, tmp_path) -> None:  # type: ignore[no-untyped-def]
    old = tmp_path / "discovery.zarr"
    shutil.copytree(discovery[0], old)
    shutil.rmtree(old / "networks" / "flex.first.weight")
    with pytest.raises(InputError, match=r"discovery\.zarr: networks/flex\.first\.weight is missing: written by another version"):
        mixtures.load(old)


def test_seeds_follow_the_density_and_hold_its_mass() -> None:
    centre = torch.tensor([[20.0, 0, 0], [-14, 10, 6]])
    truth = render_volume(centre, torch.tensor([1.0, 2.0]), torch.tensor([9.0, 12.0]), BOX, PIXEL)
    c, s, a = discover.seed_density(truth.numpy(), np.ones((BOX,) * 3, np.float32), 1000, PIXEL, 0)
    present = torch.sigmoid(torch.tensor(mixtures.OCCUPANCY_BIAS))
    seeded = render_volume(c, a * present, s, BOX, PIXEL)
    assert float(seeded.sum() / truth.sum()) == pytest.approx(1, abs=0.02)
    assert bool((fsc(seeded, truth)[:5] > 0.97).all())


def test_children_keep_the_density_of_their_parents(discovery, divided) -> None:  # type: ignore[no-untyped-def]
    """On average, so of many: every fifth takes away, and few are noisy."""
    found, _ = divided
    coarse = mixtures.load(discovery[0])
    config = Config(train=Train(gaussians=16 * G, hidden=16, layers=1, rank=4))
    fine, parent = train.inherit(config, coarse, found, BOX, PIXEL)
    anchor = stores.read(found, "anchor")
    assert np.array_equal(fine.anchor.numpy(), anchor[parent.numpy()]), "a child moves with its parent's anchor"
    canonical = [torch.from_numpy(stores.read(found, name)) for name in ("position", "amplitude")]
    amplitude = train.PRESENT * (fine.relative_amplitude * fine.amplitude_unit).detach()
    volumes = [
        render_volume(*canonical, coarse.scale, BOX, PIXEL),
        render_volume(fine.centre.detach().T * PIXEL, amplitude, fine.scale.detach(), BOX, PIXEL),
    ]
    assert float(volumes[1].sum() / volumes[0].sum()) == pytest.approx(1, abs=0.02)
    assert bool((fsc(volumes[1], volumes[0])[:7] > 0.95).all())


def test_anchors_start_from_the_motion_of_their_part(discovery, divided) -> None:  # type: ignore[no-untyped-def]
    """Planted: part 1 swings by 35 degrees a unit of the first latent; its anchors do so before any image is read, the others rest."""
    found, _ = divided
    z = torch.from_numpy(stores.read(stores.open_store(discovery[0], "discovery"), "latents"))
    coarse = mixtures.load(discovery[0])
    fine, parent = train.inherit(Config(train=Train(gaussians=2 * G, hidden=32)), coarse, found, BOX, PIXEL)
    train.warm_start(fine, found, parent, z)
    ends = torch.tensor([[-1.0, 0.8], [1.0, 0.8]])
    true = torch.from_numpy(discovery[1])
    wanted = true_shape(coarse.centre.detach().T[parent] * PIXEL, true[parent], ends)[0]
    with torch.no_grad():
        moved = fine.rigid(ends).transpose(1, 2) * PIXEL
    for k in range(3):
        mine = true[parent] == k
        way, expected = ((c[1, mine] - c[0, mine]).mean(0) for c in (moved, wanted))
        assert float((way - expected).norm()) < 4, "a pixel"
    assert stores.read(found, "motion/offset").max() > 15


def test_anchors_move_rigidly(discovery, divided) -> None:  # type: ignore[no-untyped-def]
    """Without flex, distances inside an anchor's Gaussians do not depend on the latent."""
    found, _ = divided
    config = Config(train=Train(gaussians=G, hidden=16, layers=1))
    fine, _ = train.inherit(config, mixtures.load(discovery[0]), found, BOX, PIXEL)
    with torch.no_grad():
        assert fine.anchor_motion is not None
        fine.anchor_motion[-1].weight.mul_(200)  # type: ignore[index, union-attr, operator]
        moved = fine.rigid(torch.tensor([[1.5, -2.0], [0.3, 0.1]]))
    first = slice(0, fine.anchor_sizes[0])
    distances = [
        torch.cdist(c[:, first].T, c[:, first].T, compute_mode="donot_use_mm_for_euclid_dist") for c in (*moved, fine.centre.detach())
    ]
    assert float((moved[0] - fine.centre.detach()).abs().max()) > 1
    for d in distances[:2]:
        torch.testing.assert_close(d, distances[2], rtol=1e-4, atol=2e-3)


def test_a_lone_shape_does_not_tell_how_far_a_part_moves() -> None:
    values, share = torch.tensor([3.0, 40.0, 170.0, 90.0]), torch.tensor([0.5, 0.49, 0.01, 0.0])
    assert rigid.reach(values, share) == 40.0
    assert rigid.reach(values, share[[2, 1, 0, 3]]) == 170.0
    assert rigid.reach(values, 0 * share) == 0.0
