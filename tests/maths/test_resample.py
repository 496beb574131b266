"""Resampling by a matrix against a function whose values are known everywhere."""

import numpy as np
import pytest
import torch

from cryospire.maths import fourier


@pytest.mark.parametrize("matrix", [[[1.03, 0.02], [-0.01, 0.97]], [[1, 0], [0, 1]], [[0.98, -0.05], [0.04, 1.05]]])
def test_a_blob_is_read_where_the_matrix_says(matrix):
    x = torch.arange(48, dtype=torch.float64) - 24

    def blob(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return torch.exp(-((p - 5) ** 2 / 18 + (q + 4) ** 2 / 8 + (p - 5) * (q + 4) / 30))

    m = torch.tensor(matrix, dtype=torch.float64)
    here = torch.stack([blob(x[None], x[:, None]), blob(-x[None], x[:, None])])
    p, q = m[0, 0] * x[None] + m[0, 1] * x[:, None], m[1, 0] * x[None] + m[1, 1] * x[:, None]
    expected = torch.stack([blob(p, q), blob(-p, q)])
    np.testing.assert_allclose(fourier.resample(here, m), expected, atol=1e-6)
    assert (fourier.resample(here.float(), m) - expected).abs().max() < 1e-5
