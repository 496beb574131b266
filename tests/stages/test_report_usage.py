"""GPU-hours, energy and memory, from lines as sacct writes them and from metrics."""

import json
from pathlib import Path

import pytest

from cryospire.stages import report, report_usage
from cryospire.stages.report_results import Results

# A job of two nodes put back once after half an hour, then an hour; its steps measured the energy; and a job without GPUs.
ACCOUNTING = """\
71|1800|billing=16,cpu=16,gres/gpu=4,gres/gpu:a100=4,mem=64G,node=2|0
71.batch|1800|cpu=8,gres/gpu=2,mem=32G,node=1|18446744073709551614
71.0|1790|cpu=16,gres/gpu=4,mem=64G,node=2|1200000
71|3600|billing=16,cpu=16,gres/gpu=4,gres/gpu:a100=4,mem=64G,node=2|0
71.0|3590|cpu=16,gres/gpu=4,mem=64G,node=2|2400000
72|7200|billing=8,cpu=8,mem=16G,node=1|
"""


def test_every_start_of_a_job_counts_and_steps_do_not_count_twice() -> None:
    used = report_usage.from_accounting(ACCOUNTING)
    assert used is not None
    assert used.gpu_hours == pytest.approx(4 * 0.5 + 4 * 1.0)
    assert used.joule == pytest.approx(3.6e6)


def test_accounting_that_knows_of_no_gpus_leaves_them_to_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AccountingStorageTRES need not have gres/gpu."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/train.metrics.jsonl").write_text(json.dumps({"gpus": 4, "job": "71"}) + "\n")
    monkeypatch.setattr(report_usage, "sacct", lambda jobs: "71|1800|billing=16,cpu=16,mem=64G,node=2|5000\n")
    used = report_usage.of_run(tmp_path, {"train": 900.0})
    assert used is not None and used.gpu_hours == pytest.approx(1.0) and used.joule == 5000 and "GPUs times" in used.source
    (tmp_path / "logs/train.metrics.jsonl").write_text(json.dumps({"gpus": 0, "job": "71"}) + "\n")
    used = report_usage.of_run(tmp_path, {"train": 900.0})
    assert used is not None and used.gpu_hours == 0 and "accounting" in used.source


@pytest.mark.parametrize("text", ["", "Slurm accounting storage is disabled\n", "71|Unknown||\n"])
def test_no_accounting(text: str) -> None:
    assert report_usage.from_accounting(text) is None


def test_without_accounting_metrics_tell(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "benchmarks").mkdir()
    record = {"time": 1.0, "memory_gb": 3.25, "gpus": 4, "host": "gpu07", "job": ""}
    (tmp_path / "logs/train.metrics.jsonl").write_text(json.dumps(record) + "\n")
    # Snakemake sees the shell that called srun, not the ranks: 17 MB.
    (tmp_path / "benchmarks/train.tsv").write_text("s\th:m:s\tmax_rss\n1800.0\t0:30:00\t17.2\n")
    text = report.costs(Results(tmp_path))
    assert "2.00 GPU-hours" in text and "kWh" not in text
    assert "3.25 GB" in text and "gpu07" in text
