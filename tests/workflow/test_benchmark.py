"""The benchmark's own Snakefile and its small commands, on planted numbers."""

import csv
import json
import pickle
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import ndimage

from cryospire.conventions import InputError
from cryospire.io import metadata, mrc
from cryospire.maths.poses import angle_between, random_rotations

sys.path.append(str(Path(__file__).parents[1] / "stages"))
from planted import plant

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "workflow/benchmark/benchmark.py"


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PROGRAM), *map(str, arguments)], capture_output=True, text=True, check=False)


def plan(*arguments: str) -> str:
    """What a dry run of the benchmark prints."""
    command = [sys.executable, "-m", "snakemake", "-s", "workflow/benchmark/Snakefile", "--cores", "1", "--dry-run", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def counts(printed: str) -> dict[str, str]:
    return dict(line.split() for line in printed.splitlines() if len(line.split()) == 2 and line.split()[1].isdigit())


def test_whole_benchmark_plans_a_run_of_everything() -> None:
    variants = "variants=[base,no-anchor-motion,random-parts]"
    jobs = counts(plan("--config", "sizes=[small,medium,full]", "peers=[cryodrgn,cryodrgn-dec,recovar]", variants))
    # 6 data sets, 3 sizes, 2 levels, 3 seeds.
    assert jobs["simulate"] == jobs["recovar"] == jobs["ceiling"] == "108" and jobs["cryodrgn"] == "216" and jobs["run"] == "324"
    assert jobs["environment"] == "2"


def test_peers_need_only_the_images_and_use_the_environments_they_are_given(tmp_path: Path) -> None:
    run = tmp_path / "phantom-small-hard-seed0"
    printed = plan("--printshellcmds", "--config", f"output={tmp_path}", "environments={cryodrgn: /opt/one, recovar: /opt/two}",
                   "cryodrgn={epochs: 3, width: 128, flags: --no-amp}", "--",
                   *(str(run / peer / "evaluation.json") for peer in ("cryodrgn", "cryodrgn-dec", "recovar")))  # fmt: skip
    jobs = counts(printed)
    assert "run" not in jobs and "environment" not in jobs and jobs["simulate"] == jobs["recovar"] == "1" and jobs["cryodrgn"] == "2"
    assert "/opt/one/bin/cryodrgn train_vae --enc-dim 128 --dec-dim 128" in printed and "/opt/two/bin/python" in printed
    assert "train_dec --dim 128 --z-lr 1e-2" in printed and "-n 3 --no-analysis --no-amp" in printed
    assert "cryoDRGN 4.3.1 train_vae, 3 epochs, networks of 128" in printed  # the table says with which settings


def test_a_variant_begins_with_what_it_shares_with_the_base(tmp_path: Path) -> None:
    """Of the stages before the first section of the config that it changes; alone it makes everything itself."""
    run = f"{tmp_path}/mixed-small-hard-seed0"
    common = ("--printshellcmds", "--config", f"output={tmp_path}", "datasets=[mixed]", "levels=[hard]", "seeds=[0]", "ceiling=0")

    def linked(variants: str) -> list[str]:
        printed = plan(*common, f"variants={variants}")
        loops = [line.partition("for made in ")[2].partition(";")[0] for line in printed.splitlines() if "for made in" in line]
        return [loop.replace(f"{run}/base/", "").strip() for loop in loops]

    first = "preflight.* particles.zarr consensus.zarr consensus_*.mrc"
    assert linked("[base,latent-2]") == ["", first]
    assert linked("[base,random-parts]") == ["", f"{first} discovery.zarr"]
    assert linked("[base,no-anchor-motion]") == ["", f"{first} discovery.zarr parts.zarr parts_masks"]
    assert linked("[no-anchor-motion]") == [""]


@pytest.mark.parametrize("dataset", ["igg-1d", "igg-rl", "assembly", "mixed", "phantom"])
def test_configs_keep_the_energy_and_the_change(tmp_path: Path, dataset: str) -> None:
    own = ROOT / f"workflow/benchmark/{dataset}.yaml"
    base = own if own.exists() else ROOT / f"workflow/config/{dataset}.yaml"
    size, changes = {"box": 128, "pixel_size": 3.0, "particles": 5000, "states": 25}, {"train": {"anchor_motion": False}}
    done = call("config", base, "--size", json.dumps(size), "--energy", 655.36, "--seed", 4,
                "--particles", tmp_path / "data/particles.star", "--run", tmp_path, "--variant", "other",
                "--changes", json.dumps(changes))  # fmt: skip
    assert done.returncode == 0, done.stderr
    simulate, other = (yaml.safe_load((tmp_path / f"{name}.yaml").read_text()) for name in ("simulate", "other"))
    assert simulate["simulate"]["snr"] == pytest.approx(0.04) and simulate["simulate"]["particles"] == 5000
    assert simulate["simulate"]["states"] == (16 if dataset == "assembly" else 25)
    assert "simulate" not in other and other["train"]["anchor_motion"] is False and simulate["seed"] == other["seed"] == 4


def test_wrong_poses_are_those_of_the_antibody(tmp_path: Path) -> None:
    printed = plan("--printshellcmds", "--config", f"output={tmp_path}", "datasets=[wrong-poses]", "seeds=[0]", "ceiling=0")
    command = next(line for line in printed.splitlines() if "benchmark.py config" in line)
    assert "workflow/config/igg-1d.yaml" in command and '"turn_error": 2.0, "shift_error": 3.0' in command and "1IGY" in command


def test_poses_of_relion_are_given_to_every_method(tmp_path: Path) -> None:
    printed = plan("--printshellcmds", "--config", f"output={tmp_path}", "datasets=[relion-poses]", "levels=[hard]", "seeds=[0]",
                   "ceiling=0", "peers=[recovar]", "environments={recovar: /opt/two}")  # fmt: skip
    star = f"{tmp_path}/relion-poses-small-hard-seed0/data/refined.star"
    assert counts(printed)["refine"] == "1" and f"--particles {star} " in printed and f"pipeline {star} " in printed


@pytest.mark.skipif(not shutil.which("relion_refine"), reason="relion_refine is not installed (Debian package relion)")
def test_relion_refines_poses_that_are_put_off(tmp_path: Path) -> None:
    """In the frame of the truth its shifts are nearer to the true ones; from 40 Å on it hardly mends the turns of a smooth phantom."""
    tiny = {
        "output": str(tmp_path), "datasets": ["tiny"], "energy": {"hard": 2000.0},
        "size": {"small": {"box": 32, "pixel_size": 10.0, "particles": 300}},
        "derived": {"tiny": {"of": "phantom", "simulate": {"states": 1, "turn_error": 5.0, "shift_error": 6.0}, "refine": True}},
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    star = tmp_path / "tiny-small-hard-seed0/data/refined.star"
    command = [sys.executable, "-m", "snakemake", "-s", "workflow/benchmark/Snakefile", "--cores", "1",
               "--configfile", str(tmp_path / "tiny.yaml"), "--", str(star)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    given, refined = (metadata.read(star.with_name(name)) for name in ("particles.star", "refined.star"))
    truth = np.load(star.parent / "truth/poses.npz")
    errors = []
    for table in (given, refined):
        assert np.array_equal(table.index, np.arange(300))
        turn = angle_between(torch.from_numpy(table.rotation), torch.from_numpy(truth["rotation"]).double())
        errors.append((float(turn.median()), float(np.abs(table.shift - truth["shift"]).mean())))
    assert errors[1][0] < 2 * errors[0][0] and errors[1][1] < 0.6 * errors[0][1]


def test_a_frame_is_taken_out_of_poses(tmp_path: Path) -> None:
    table = plant(tmp_path, n=50).table
    turn, way = random_rotations(1, torch.Generator().manual_seed(0))[0].numpy(), np.array([5.0, -3.0, 8.0])
    (tmp_path / "truth").mkdir()
    np.savez(tmp_path / "truth/poses.npz", rotation=table.rotation, shift=table.shift)
    moved = replace(table, rotation=table.rotation @ turn, shift=table.shift + (table.rotation @ way)[:, :2])
    metadata.write_star(tmp_path / "moved.star", moved)
    assert call("frame", tmp_path / "moved.star", tmp_path / "truth", tmp_path / "out.star").returncode == 0
    found = metadata.read(tmp_path / "out.star")
    np.testing.assert_allclose(found.rotation, table.rotation, atol=1e-5)
    np.testing.assert_allclose(found.shift, table.shift, atol=1e-3)


def test_latents_nearest_to_their_state_mean(tmp_path: Path) -> None:
    label = np.array([0, 0, 0, 1, 1, 1], np.int32)
    z = np.array([[0, 0], [1, 0.1], [2, 0], [5, 5], [5, 6], [5, 9]], np.float32)
    np.save(tmp_path / "labels.npy", label)
    (tmp_path / "z.pkl").write_bytes(pickle.dumps(z))
    assert call("zfile", tmp_path / "z.pkl", tmp_path / "labels.npy", tmp_path / "z.txt").returncode == 0
    assert np.allclose(np.loadtxt(tmp_path / "z.txt"), [[1, 0.1], [5, 6]])
    np.save(tmp_path / "labels.npy", label[:5])
    done = call("zfile", tmp_path / "z.pkl", tmp_path / "labels.npy", tmp_path / "z.txt")
    assert done.returncode == 2 and "5 labels" in done.stderr


def test_truth_as_cryobench_distributes_it(tmp_path: Path) -> None:
    truth = runpy.run_path(str(PROGRAM))["cryobench_truth"]
    (tmp_path / "vols/128_org").mkdir(parents=True)
    for k in range(3):
        (tmp_path / f"vols/128_org/{k:03d}.mrc").write_bytes(bytes([k]))
    (tmp_path / "gt_latents.pkl").write_bytes(pickle.dumps(np.array([2, 0, 1, 1])))
    truth(tmp_path, tmp_path / "truth")
    assert np.load(tmp_path / "truth/labels.npy").tolist() == [2, 0, 1, 1] and (tmp_path / "truth/vol_002.mrc").read_bytes() == b"\x02"
    (tmp_path / "gt_latents.pkl").write_bytes(pickle.dumps(np.array([2, 0, 3, 1])))
    with pytest.raises(InputError, match="below the number of volumes, 3"):
        truth(tmp_path, tmp_path / "truth")


def test_table_has_means_and_spreads_over_seeds(tmp_path: Path) -> None:
    files = []
    for seed, area in enumerate((0.40, 0.42, 0.44)):
        file = tmp_path / f"mixed-small-hard-seed{seed}/base/evaluation.json"
        file.parent.mkdir(parents=True)
        entry = {"auc": {"mean": area, "sd": 0.01}, "unmasked": {"mean": 0.3}, "difference": {"mean": area - 0.1}}
        own = entry | {"per_image": {"auc": {"mean": area - 0.02}, "difference": {"mean": area - 0.12}}}
        near = {"neighbours": {"similarity": [0.8, 0.6]}, "imbalance": {"latent_to_truth": 0.1, "truth_to_latent": 0.2}}
        found = {"motion": [{"error": 1.0, "centre_error": 2.0}, {"error": 3.0, "centre_error": 6.0}], "occupancy": [{"auc": 0.9}]}
        found |= {"poses": {"turn": 1.25, "shift": 0.5, "frames_turn": 0.75, "auc": 0.48, "difference": 0.47}}
        model = found | {"latents": near | {"main_lump": {"mean": 1.0}, "leakage": {"pose": 0.02, "defocus": 0.03}}}
        file.write_text(json.dumps({"methods": {"consensus": entry, "stage 2": own}, "models": {"stage 2": model}}))
        files.append(file)
    variant = tmp_path / "mixed-small-hard-seed0/rank-8/evaluation.json"  # the consensus needs no model: it is not one more seed
    variant.parent.mkdir()
    files.append(Path(shutil.copy(files[0], variant)))
    done = call("table", tmp_path / "table.csv", *files)
    assert done.returncode == 0, done.stderr
    rows = {r["method"]: r for r in csv.DictReader((tmp_path / "table.csv").open())}
    assert {method: row["seeds"] for method, row in rows.items()} == {"consensus": "3", "stage 2, base": "3", "stage 2, rank-8": "1"}
    assert rows["stage 2, base"]["dataset"] == "mixed-small-hard"
    assert float(rows["consensus"]["auc"]) == pytest.approx(0.42) and float(rows["consensus"]["auc_spread"]) == pytest.approx(0.02)
    got = {name: rows["stage 2, base"][name] for name in ("per_image", "per_image_difference", "neighbours", "imbalance", "imbalance_back")}
    assert list(got.values()) == ["0.4000", "0.3000", "0.8000", "0.1000", "0.2000"] and rows["consensus"]["per_image"] == ""
    own = rows["stage 2, base"]
    assert [own[name] for name in ("turn_error", "centre_error", "occupancy_auc", "leakage")] == ["2.0000", "4.0000", "0.9000", "0.0300"]
    names = ("pose_turn", "pose_shift", "frames_turn", "auc_in_frames", "difference_in_frames")
    assert [own[name] for name in names] == ["1.2500", "0.5000", "0.7500", "0.4800", "0.4700"]
    assert "0.3200 (0.0200)" in (tmp_path / "table.md").read_text() and (tmp_path / "table.png").exists()


def test_volumes_and_latents_of_another_program_are_scored_by_the_truth_alone(tmp_path: Path) -> None:
    """The truth itself has a perfect curve; with its states exchanged it no longer follows the differences."""
    random = np.random.default_rng(0)
    truth, good, bad = (tmp_path / name for name in ("truth", "good", "bad"))
    for folder in (truth, good, bad):
        folder.mkdir()
    blob = ndimage.gaussian_filter(random.normal(size=(4, 24, 24, 24)), (0, 1, 1, 1))
    for k, volume in enumerate(blob.astype(np.float32)):
        mrc.write_volume(truth / f"vol_{k:03d}.mrc", volume, 6.0)
        mrc.write_volume(good / f"state{k:03d}.mrc", 3 * volume, 6.0)
        mrc.write_volume(bad / f"state{(k + 1) % 4:03d}.mrc", volume, 6.0)
    label = random.integers(0, 4, 400).astype(np.int32)
    np.save(truth / "labels.npy", label)
    np.save(tmp_path / "z.npy", np.stack([np.cos(label), np.sin(label)], 1) + 0.01 * random.normal(size=(400, 2)))
    score = runpy.run_path(str(PROGRAM))["score"]
    output = tmp_path / "evaluation.json"
    method = {}
    for folder in (good, bad):
        score(folder, truth, "peer", output, tmp_path / "z.npy")
        found = json.loads(output.read_text())
        assert found["models"]["peer"]["latents"]["neighbours"]["similarity"][0] > 0.95
        method[folder] = found["methods"]["peer"]
    assert method[good]["auc"]["mean"] == pytest.approx(0.5, abs=0.02)
    assert method[good]["difference"]["mean"] == pytest.approx(0.5, abs=0.02) and method[bad]["difference"]["mean"] < 0
    (good / "state003.mrc").unlink()
    with pytest.raises(InputError, match="3 volumes for 4 states"):
        score(good, truth, "peer", output, None)
