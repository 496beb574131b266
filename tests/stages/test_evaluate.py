"""Scores of planted answers: the truth, its mean, its negative; a model that knows everything; labels shuffled."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cryospire.config import Config, Preprocess, Simulate
from cryospire.conventions import InputError
from cryospire.io import mrc
from cryospire.maths import poses
from cryospire.stages import consensus, evaluate, evaluate_model, preprocess, simulate
from cryospire.training.data import Particles

BOX, PIXEL, STATES = 32, 9.0, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulated, preprocessed and reconstructed: everything that needs no training."""
    out = tmp_path_factory.mktemp("run")
    what = Simulate(kind="mixed", states=STATES, particles=800, box=BOX, pixel_size=PIXEL, snr=1.0, shift=5.0)
    config = Config(simulate=what, particles=out / "sim/particles.star", preprocess=Preprocess(workers=1), output=out, threads=1)
    simulate.run(config, output=out / "sim")
    preprocess.run(config, output=out / "particles.zarr")
    consensus.run(config, particles=out / "particles.zarr", output=out / "consensus.zarr")
    return out


@pytest.fixture(scope="module")
def data(folder: Path) -> Particles:
    return Particles(evaluate.stores.open_store(folder / "particles.zarr", "particles"))


@pytest.fixture(scope="module")
def known(folder: Path, data: Particles) -> evaluate.Truth:
    return evaluate.load_truth(folder / "sim/truth", data, np.arange(800))


class Oracle:
    """A mixture that knows the truth: one Gaussian for every fifth atom; the latent (2,) is the angle of the state on a circle."""

    def __init__(self, truth: evaluate_model.Segmentation, turned: float = 0.0) -> None:
        self.truth, self.turned, self.pixel_size, self.box = truth, turned, PIXEL, BOX
        self.part = torch.from_numpy(truth.part[::5])
        self.scale = torch.full((len(self.part),), 6.0)
        self.features = torch.zeros(len(self.part), 1)

    def state(self, z: torch.Tensor) -> torch.Tensor:
        return (torch.atan2(z[:, 1], z[:, 0]) / (2 * np.pi) * STATES).round().long() % STATES

    def forward_gaussians(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        s, t = int(self.state(z)[0]), self.truth
        p, x = t.part[::5], t.position[::5]
        moved = torch.from_numpy(np.einsum("aij,aj->ai", t.rotation[s][p], x) + t.translation[s][p])
        arm = self.part == 1
        if s and self.turned:  # wrong by this angle in every state but the first
            a = np.radians(self.turned)
            wrong = torch.tensor([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
            middle = moved[arm].mean(0)
            moved[arm] = (moved[arm] - middle) @ wrong.T + middle
        return moved[None].float(), self.occupancies(z, self.features), self.scale

    def occupancies(self, z: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.truth.present[self.state(z).numpy()][:, self.truth.part[::5]]).float()


def latents(label: torch.Tensor) -> torch.Tensor:
    angle = 2 * np.pi / STATES * label
    noise = 0.02 * torch.randn(len(label), 2, generator=torch.Generator().manual_seed(0))
    return (torch.stack([angle.cos(), angle.sin()], 1) + noise).float()


def test_the_truth_scores_half_and_its_mean_scores_no_difference(known: evaluate.Truth) -> None:
    perfect = evaluate.score(known.volumes, known, PIXEL)
    assert perfect["auc"]["mean"] == pytest.approx(0.5, abs=1e-4) and perfect["difference"]["mean"] == pytest.approx(0.5, abs=1e-4)
    rigid = evaluate.score(known.volumes.mean(0).expand_as(known.volumes), known, PIXEL)
    assert rigid["difference"]["mean"] == 0 and 0.2 < rigid["auc"]["mean"] < 0.49
    # Differences of the wrong sign count against a method: the score is signed.
    mirrored = evaluate.score(2 * known.volumes.mean(0) - known.volumes, known, PIXEL)
    assert mirrored["difference"]["mean"] == pytest.approx(-0.5, abs=1e-4)
    assert evaluate.score(known.volumes.roll(1, 0), known, PIXEL)["difference"]["mean"] < 0.1


def test_known_labels_find_the_states_and_shuffled_labels_do_not(known: evaluate.Truth, data: Particles) -> None:
    found = evaluate.score(evaluate.back_project_states(data, known.label, STATES), known, PIXEL)
    shuffled = known.label[torch.randperm(len(known.label), generator=torch.Generator().manual_seed(0))]
    lost = evaluate.score(evaluate.back_project_states(data, shuffled, STATES), known, PIXEL)
    assert found["auc"]["mean"] > 0.3 and found["difference"]["mean"] > 0.2
    assert found["difference"]["mean"] > lost["difference"]["mean"] + 0.15


def test_states_in_several_passes_are_the_same(known: evaluate.Truth, data: Particles, monkeypatch: pytest.MonkeyPatch) -> None:
    together = evaluate.back_project_states(data, known.label, STATES)
    monkeypatch.setattr(evaluate, "MEMORY", 1)
    one_by_one = evaluate.back_project_states(data, known.label, STATES)
    assert torch.allclose(together, one_by_one, atol=1e-4 * float(together.abs().max()))


def test_a_model_that_knows_everything(known: evaluate.Truth, data: Particles) -> None:
    z = latents(known.label)
    oracle = Oracle(known.segmentation)
    result = evaluate_model.judge(oracle, z, known.label, known.segmentation, data)
    assert result["latents"]["between_over_within"]["mean"] > 100 and result["latents"]["main_lump"]["mean"] == 1
    assert result["latents"]["leakage"]["pose"] < 0.05 and result["latents"]["leakage"]["defocus"] < 0.05
    (motion,) = result["motion"]
    assert motion["error"] < 0.1 and motion["angle"] == pytest.approx((90 + 180 + 90) / 3, abs=0.1)
    (occupancy,) = result["occupancy"]
    assert occupancy["auc"] == 1 and occupancy["present"] == 1 and occupancy["absent"] == 0
    parts = evaluate_model.judge_parts(oracle, z, known.label, known.segmentation, oracle.part)
    assert parts["adjusted_rand_index"] == 1 and parts["true"] == 3 and parts["gaussians"] == parts["of"]
    shuffled = oracle.part[torch.randperm(len(oracle.part), generator=torch.Generator().manual_seed(1))]
    assert abs(evaluate_model.judge_parts(oracle, z, known.label, known.segmentation, shuffled)["adjusted_rand_index"]) < 0.1


def test_neighbours_of_latents_that_know_the_state_and_of_shuffled_ones(known: evaluate.Truth) -> None:
    apart, z = evaluate.state_distances(known), latents(known.label)
    volumes = known.volumes * known.mask
    assert apart[0, 1] == pytest.approx(float((volumes[0] - volumes[1]).norm()), rel=1e-4) and apart.diagonal().tolist() == [0] * STATES
    found = evaluate_model.judge_neighbours(z, known.label, apart)
    assert found["neighbours"]["k"] == [8, 40, 160] and found["neighbours"]["similarity"][:2] == [1, 1]
    assert found["imbalance"]["floor"] == pytest.approx(1 / STATES, abs=0.01)
    assert found["imbalance"]["latent_to_truth"] == pytest.approx(found["imbalance"]["floor"])
    assert found["imbalance"]["truth_to_latent"] == pytest.approx(found["imbalance"]["floor"], abs=0.02)
    lost = evaluate_model.judge_neighbours(z[torch.randperm(800, generator=torch.Generator().manual_seed(0))], known.label, apart)
    assert lost["neighbours"]["similarity"] == pytest.approx(lost["neighbours"]["chance"], abs=0.03)
    assert lost["imbalance"]["latent_to_truth"] == pytest.approx(1, abs=0.06)
    assert "100 % of the 8 nearest" in evaluate_model.sentence("planted", {"latents": found | GOOD})


GOOD = {"between_over_within": {"mean": 9.0}, "main_lump": {"mean": 1.0}}


def test_per_image_areas_follow_the_latents_of_the_images(known: evaluate.Truth) -> None:
    """Latents of the true states score as the states do; latents of a fixed state score as a map of that state: no differences."""
    oracle, z = Oracle(known.segmentation), latents(known.label)
    states = evaluate.score(evaluate.render_states(oracle, latents(torch.arange(STATES))), known, PIXEL)
    own = evaluate.per_image(oracle, z, known)
    assert own["images"] == 100
    assert own["auc"]["mean"] == pytest.approx(states["auc"]["mean"], abs=0.01)
    assert own["difference"]["mean"] == pytest.approx(states["difference"]["mean"], abs=0.02)
    one = evaluate.per_image(oracle, latents(torch.zeros(800)), known)
    assert one["auc"]["mean"] < own["auc"]["mean"] and abs(one["difference"]["mean"]) < 0.02
    lost = evaluate.per_image(oracle, z[torch.randperm(800, generator=torch.Generator().manual_seed(0))], known)
    assert lost["difference"]["mean"] < own["difference"]["mean"] / 2


def test_a_motion_that_is_wrong_by_25_degrees_is_found_so(known: evaluate.Truth) -> None:
    means = evaluate.recovery.group_means(latents(known.label), known.label, STATES)
    assigned = evaluate_model.assign(Oracle(known.segmentation, turned=25.0), means, known.segmentation)
    (motion,) = evaluate_model.judge_motion(assigned, known.segmentation)
    assert motion["error"] == pytest.approx(25, abs=0.5)
    assert motion["centre_error"] < 2 and motion["centre_moved"] > 30, "turned about its own middle, the centre goes where it should"


def test_states_that_poses_turn_as_a_whole_are_turned_back(known: evaluate.Truth) -> None:
    """Every state has a frame of its own, as where a consensus follows what moves; the volumes seen in these frames are the true ones."""
    mixture, z = Oracle(known.segmentation), evaluate.recovery.group_means(latents(known.label), known.label, STATES)
    g = torch.Generator().manual_seed(0)
    turn = poses.exp_so3(0.2 * torch.randn(STATES, 3, generator=g, dtype=torch.float64))
    move = 6 * torch.randn(STATES, 3, generator=g, dtype=torch.float64)
    # What is at x in a state's frame is at turn x + move in truth.
    rotation = known.poses.rotation.double() @ turn[known.label]
    shift = known.poses.shift.double() + torch.einsum("nij,nj->ni", known.poses.rotation.double()[:, :2], move[known.label])
    noise = poses.exp_so3(0.05 * torch.randn(len(known.label), 3, generator=g, dtype=torch.float64))
    found = evaluate_model.frames(evaluate_model.Poses(noise @ rotation, shift), known.poses, known.label)
    assert float(poses.angle_between(found[0], turn).max()) < 1.0 and float((found[1] - move).norm(dim=1).max()) < 0.01
    straight = evaluate.render_states(mixture, z)

    class Turned(Oracle):
        def forward_gaussians(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            centre, amplitude, scale = super().forward_gaussians(latent)
            k = int(self.state(latent)[0])
            return ((centre.double() - move[k]) @ turn[k]).float(), amplitude, scale

    crooked = Turned(known.segmentation)
    back = evaluate.render_states(crooked, z, (turn, move))
    assert torch.allclose(back, straight, atol=1e-3 * float(straight.max()))
    assert not torch.allclose(evaluate.render_states(crooked, z), straight, atol=0.1 * float(straight.max()))


def test_states_split_in_two_lumps_are_seen(known: evaluate.Truth, data: Particles) -> None:
    z = latents(known.label)
    z[::3] *= -1
    found = evaluate_model.judge_latents(z.double(), known.label, STATES, data)
    assert found["main_lump"]["mean"] == pytest.approx(2 / 3, abs=0.08) and found["between_over_within"]["mean"] < 1


def test_run_from_stores(folder: Path, synthetic: SimpleNamespace) -> None:
    """The whole stage on a model that was never trained: its volumes are worth nothing, the others' rows are what they are."""
    stores, group = evaluate.stores, evaluate.stores.open_store(folder / "particles.zarr", "particles")
    particle_ids = stores.read(group, "id")
    mixture = synthetic.two_part_mixture()
    mixture.box, mixture.pixel_size = BOX, PIXEL
    path = folder / "model.zarr"
    out = stores.create(path, "model", config=simulate.configuration.section(mixture.config), seed=0, inputs={}, pixel_size=PIXEL, box=BOX)
    order = np.random.default_rng(0).permutation(800)
    stores.put(out, "id", particle_ids[order], ("particle",), "permanent particle id")
    stores.put(out, "latents", latents(torch.arange(800) % 2).numpy(), ("particle", "latent"), "latent")
    stores.put(out, "anchors/part", np.arange(2), ("anchor",), "part of the anchor")
    turn = poses.exp_so3(torch.tensor([0.0, np.deg2rad(3.0), 0.0])).float().numpy()
    stores.put(out, "pose/rotation", turn @ stores.read(group, "pose/rotation")[order], ("particle", "row", "column"), "pose")
    shift = stores.read(group, "pose/shift")[order] + np.float32([4.0, 0.0])
    stores.put(out, "pose/shift", shift, ("particle", "xy"), "shift", "Å")
    for name in ("turn_sd", "shift_sd"):
        stores.put(out, f"history/{name}", np.ones(1), ("epoch",), "spread of poses")
    synthetic_save(out, mixture)
    stores.finish(out)
    arguments = {name: folder / f"{name}.zarr" for name in ("model", "consensus", "particles")}
    evaluate.run(Config(threads=1), **arguments, truth=folder / "sim/truth", output=folder / "evaluation.json")
    result = json.loads((folder / "evaluation.json").read_text())
    assert list(result["methods"]) == ["consensus", "known labels", "stage 2"]
    assert result["methods"]["consensus"]["difference"]["mean"] == 0
    assert result["methods"]["known labels"]["difference"]["mean"] > 0.2
    assert len(result["methods"]["stage 2"]["auc"]["states"]) == STATES
    assert abs(result["methods"]["stage 2"]["difference"]["mean"]) < 0.1
    assert result["models"]["stage 2"]["parts"]["found"] == 2
    assert abs(result["methods"]["stage 2"]["per_image"]["difference"]["mean"]) < 0.1
    wrong = {"turn": 3 / 3**0.5, "shift": 4 / 2**0.5, "given_turn": 0, "given_shift": 0}
    judged = result["models"]["stage 2"]["poses"]
    assert {k: judged[k] for k in wrong} == pytest.approx(wrong, abs=0.03)
    assert judged["frames_turn"] < 0.5, "turned in the view, states stay where they are"
    assert 0.2 < result["models"]["stage 2"]["latents"]["imbalance"]["latent_to_truth"] < 1.2
    assert (folder / "evaluation.png").stat().st_size > 10_000


def synthetic_save(group: object, mixture: object) -> None:
    from cryospire.training import model as mixtures

    mixtures.save(group, mixture)


def test_truth_that_does_not_fit_is_refused(folder: Path, data: Particles, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vol_000\.mrc"):
        evaluate.load_truth(tmp_path, data, np.arange(800))
    mrc.write_volume(tmp_path / "vol_000.mrc", np.ones((BOX, BOX, BOX), np.float32), 5.0)
    np.save(tmp_path / "labels.npy", np.zeros(800, np.int32))
    with pytest.raises(InputError, match="voxels of 5 Å"):
        evaluate.load_truth(tmp_path, data, np.arange(800))
    np.save(tmp_path / "labels.npy", np.zeros(700, np.int32))
    with pytest.raises(InputError, match="700 labels"):
        evaluate.load_truth(tmp_path, data, np.arange(800))
    np.save(tmp_path / "labels.npy", np.full(800, 3, np.int32))
    with pytest.raises(InputError, match="from 3 to 3"):
        evaluate.load_truth(tmp_path, data, np.arange(800))


def test_truth_in_a_larger_box_is_cropped_to_the_particles(known: evaluate.Truth, data: Particles, tmp_path: Path) -> None:
    larger = evaluate.fourier.crop(known.volumes[0], 2 * BOX, 3)
    mrc.write_volume(tmp_path / "vol.mrc", larger.numpy(), PIXEL / 2)
    assert torch.allclose(evaluate.on_grid(tmp_path / "vol.mrc", data), known.volumes[0], atol=1e-4 * float(known.volumes[0].max()))


def test_parts_that_only_move_are_not_judged_by_rounding() -> None:
    """Their difference has no mass: shell 0 holds the sign of what rounding left."""
    volume = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(0))
    change = volume - volume.roll(1, 0)
    curve = evaluate.fsc_of_differences(change + 1e-7, change - 1e-7, torch.ones_like(change))
    assert torch.allclose(curve, torch.ones_like(curve), atol=1e-4)
