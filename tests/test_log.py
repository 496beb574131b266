"""Which rank speaks."""

import pytest

from cryospire import log


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"SLURM_PROCID": "3"}, 3),
        ({"SLURM_PROCID": "0", "PMI_RANK": "1"}, 1),  # mpiexec inside a job of SLURM: all inherit the batch script's SLURM_PROCID
        ({"SLURM_PROCID": "0", "OMPI_COMM_WORLD_RANK": "2"}, 2),
        ({"SLURM_PROCID": "0", "RANK": "5"}, 5),
    ],
)
def test_rank_is_that_of_the_innermost_launcher(environment: dict[str, str], rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_PROCID", "PMI_RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert log.rank() == rank
