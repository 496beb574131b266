import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryospire.maths.poses import (
    angle_between,
    corrected,
    correction,
    euler_to_matrix,
    even_rotations,
    exp_so3,
    frames,
    matrix_to_euler,
    nearest_rotation,
    random_rotations,
    rotvec_to_matrix,
)


def angles(n: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return (torch.rand(n, 3, generator=g, dtype=torch.float64) * 2 - 1) * torch.tensor([180.0, 180.0, 180.0], dtype=torch.float64)


def test_euler_is_scipys_zyz_transposed():
    a = angles(50)
    expected = Rotation.from_euler("ZYZ", a.numpy(), degrees=True).as_matrix().transpose(0, 2, 1)
    assert np.allclose(euler_to_matrix(*a.T), expected, atol=1e-12)


def test_tilt_turns_the_views_axis_as_relion_says():
    # RELION: the view's z axis in the model is (sin tilt cos rot, sin tilt sin rot, cos tilt), the last row of A.
    row = euler_to_matrix(*(torch.tensor([x], dtype=torch.float64) for x in (30.0, 40.0, 75.0)))[0, 2]
    t, r = np.deg2rad(40), np.deg2rad(30)
    assert np.allclose(row, [np.sin(t) * np.cos(r), np.sin(t) * np.sin(r), np.cos(t)])


def test_euler_round_trip_through_the_matrix_also_at_the_poles():
    a = torch.cat([angles(50), torch.tensor([[20.0, 0.0, 30.0], [20.0, 180.0, 30.0], [0.0, 0.0, 0.0]], dtype=torch.float64)])
    m = euler_to_matrix(*a.T)
    assert torch.allclose(euler_to_matrix(*matrix_to_euler(m).T), m, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [[3.0, 2.0, 1.0], [1, 1, 1], [3, 2, 0], [1, 0, 0], [3, 2, -1], [1, 1e-3, 1e-3], [0, 0, 0]])
def test_the_nearest_rotation_is_that_of_the_svd(spread: list[float], dtype: torch.dtype) -> None:
    """Of bodies with axes alike, flat, thin, mirrored: as near as by Kabsch's SVD, whatever is undetermined."""
    turns = random_rotations(400, torch.Generator().manual_seed(0))
    moment = 7e3 * (turns[:200] @ torch.diag(torch.tensor(spread, dtype=torch.float64)) @ turns[200:])
    found = nearest_rotation(moment.to(dtype)).double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found @ found.mT, torch.eye(3).expand_as(found).double(), atol=20 * eps, rtol=0)
    u, values, vt = torch.linalg.svd(moment)
    best = values[:, 0] + values[:, 1] + values[:, 2] * torch.det(u @ vt).sign()
    assert float((best - (found * moment).sum((1, 2))).max()) <= 100 * eps * float(best.max())


def test_rotation_vectors_match_scipy_from_zero_to_beyond_pi():
    g = torch.Generator().manual_seed(2)
    axis = torch.randn(40, 3, generator=g, dtype=torch.float64)
    angle = torch.cat([torch.zeros(2), torch.logspace(-8, np.log10(6), 38)]).double()
    v = axis / axis.norm(dim=1, keepdim=True) * angle[:, None]
    assert np.allclose(rotvec_to_matrix(v), Rotation.from_rotvec(v.numpy()).as_matrix(), atol=1e-12)
    assert np.allclose(exp_so3(v.float()), Rotation.from_rotvec(v.numpy()).as_matrix(), atol=1e-6)


def test_exp_so3_has_the_right_gradient_at_zero_and_elsewhere():
    v = torch.tensor([[0.0, 0.0, 0.0], [1e-5, 0.0, 2e-5], [0.009, 0.003, 0.0], [1.0, -2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(exp_so3, v)


def test_random_rotations_are_rotations_spread_evenly():
    r = random_rotations(4000, torch.Generator().manual_seed(3))
    assert torch.allclose(r @ r.transpose(1, 2), torch.eye(3, dtype=torch.float64).expand_as(r), atol=1e-12)
    assert torch.allclose(torch.linalg.det(r), torch.ones(4000, dtype=torch.float64))
    # Under the uniform measure E[R] = 0 and the angle's density is (1 - cos w) / pi: E[trace] = 0, E[w] = pi / 2 + 2 / pi.
    assert r.mean(0).abs().max() < 4 / np.sqrt(3 * 4000)
    w = torch.arccos(((r.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1))
    assert abs(w.mean() - (np.pi / 2 + 2 / np.pi)) < 0.04


def test_frames_are_rotations_reach_every_one_and_start_at_the_identity():
    v = torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    r = frames(v)
    assert torch.allclose(r @ r.transpose(1, 2), torch.eye(3, dtype=r.dtype).expand(200, 3, 3), atol=1e-9)
    assert torch.allclose(torch.det(r), torch.ones(200, dtype=r.dtype)) and torch.equal(frames(torch.zeros(6)), torch.eye(3))
    wanted = random_rotations(50, torch.Generator().manual_seed(1))
    columns = wanted[:, :, :2].transpose(1, 2).flatten(1) - torch.tensor([1.0, 0, 0, 0, 1, 0], dtype=wanted.dtype)
    assert torch.allclose(frames(columns), wanted, atol=1e-9)
    assert torch.autograd.gradcheck(frames, v[:3].requires_grad_())


def test_even_rotations_leave_no_gap_and_no_crowd() -> None:
    """Of 576, one is near any rotation, and none is closer to another than a third of the mean distance of neighbours."""
    grid = even_rotations(576).double()
    asked = random_rotations(2000, torch.Generator().manual_seed(0))

    def angle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.rad2deg(((torch.einsum("aij,bij->ab", a, b) - 1) / 2).clamp(-1, 1).arccos())

    assert float(angle(asked, grid).min(1).values.max()) < 32
    between = angle(grid, grid).fill_diagonal_(180).min(1).values
    assert float(between.min()) > float(between.mean()) / 3
    assert float(grid.mean(0).abs().max()) < 0.01
    torch.testing.assert_close(grid @ grid.mT, torch.eye(3, dtype=torch.float64).expand(576, 3, 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("degrees", [0.0, 1e-3, 30.0, 179.0, 180.0])
def test_angle_between(degrees: float) -> None:
    a = Rotation.random(rng=1)
    b = Rotation.from_rotvec(np.radians(degrees) * np.array([0.6, 0, 0.8])) * a
    angle = angle_between(torch.from_numpy(a.as_matrix()), torch.from_numpy(b.as_matrix()))
    assert float(angle) == pytest.approx(degrees, abs=1e-4)


def test_corrections_turn_and_shift_by_pixels_and_can_be_read_off():
    """Gibbs vectors: scipy's rotation by twice the arc tangent of their length, about the axes of the view."""
    g = torch.Generator().manual_seed(4)
    rotation, shift = random_rotations(40, g), torch.randn(40, 2, generator=g, dtype=torch.float64)
    change = torch.randn(40, 5, generator=g, dtype=torch.float64) * torch.logspace(-6, 1, 40, dtype=torch.float64)[:, None]
    turned, moved = corrected(rotation, shift, change, 64, 1.5)
    length = change[:, :3].norm(dim=1, keepdim=True)
    vector = change[:, :3] / length * 2 * torch.atan(length / 32)
    expected = Rotation.from_rotvec(vector.numpy()).as_matrix() @ rotation.numpy()
    assert np.allclose(turned, expected, atol=1e-12) and torch.allclose(moved - shift, 1.5 * change[:, 3:])
    small = corrected(torch.eye(3)[None], torch.zeros(1, 2), torch.tensor([[1.0, 0, 0, 0, 0]]), 64, 1.5)[0]
    assert float(torch.deg2rad(angle_between(torch.eye(3), small))) * 16 == pytest.approx(1, rel=1e-3)
    torch.testing.assert_close(correction(rotation, shift, turned, moved, 64, 1.5), change, rtol=1e-7, atol=1e-9)


def test_corrections_are_differentiable_from_the_given_pose_on():
    rotation, shift = random_rotations(3, torch.Generator().manual_seed(5)), torch.zeros(3, 2, dtype=torch.float64)
    for scale in (0.0, 3.0):
        start = scale * torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
        assert torch.autograd.gradcheck(lambda c: corrected(rotation, shift, c, 32, 2.0), start.requires_grad_())
