"""The page holds what the run holds, stands alone, and says what is missing."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cryospire.config import Config
from cryospire.conventions import InputError
from cryospire.io import stores
from cryospire.stages import report, report_page, report_sections, summary

VOID = {"meta", "img", "input", "br"}


class Balanced(HTMLParser):
    """Every element that opens closes, in order; nothing is fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.sources += [v or "" for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, synthetic: SimpleNamespace) -> Path:
    return synthetic.write_run(tmp_path_factory.mktemp("run"))


def html(folder: Path) -> str:
    report.run(Config(), results=folder, output=folder / "report.html")
    return (folder / "report.html").read_text()


def section(text: str, title: str) -> str:
    return text.split(f"<h2>{title}</h2>")[1].split("</section>")[0]


def test_whole_page(run_folder: Path) -> None:
    text = html(run_folder)
    assert text == html(run_folder)  # the same results give the same page
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert all(s.startswith(("data:image/", "#")) for s in parser.sources)
    for source in parser.sources:
        if source.startswith("data:"):
            raw = base64.b64decode(source.split(",", 1)[1])
            assert raw[:4] == b"\x89PNG" or b"<svg" in raw[:1000]
    titles = "Data, Consensus, Training, Parts, Maps of parts, Latent space, States, Trajectories, Occupancy, Time and memory"
    for title in titles.split(", "):
        assert "<figure>" in section(text, title), title
    assert "300" in section(text, "Data") and "15.0 Å" in section(text, "Consensus") and "1:30" in section(text, "Time and memory")
    assert re.findall(r'max="(\d+)" value="0" data-flip', text) == ["3", "3"]  # four steps of two trajectories
    assert "evaluation.json: no such file" in section(text, "Evaluation") and "<figure>" not in section(text, "Preflight")


def test_errors_of_poses_are_told(run_folder: Path) -> None:
    assert "The given poses are wrong by about 1.7° about an axis and 2.7 Å along one" in section(html(run_folder), "Training")
    assert any(line.startswith("poses       corrected; the given ones were wrong by about 1.7°") for line in summary.lines(run_folder))


def test_the_frame_of_volumes_is_told(run_folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    for held, words in ((None, "in the frame of the poses"), (1, "Part 2, which moves least, is held still in all")):
        stores.writable(run / "volumes.zarr").attrs["held_part"] = held
        assert words in section(html(run), "States")


def test_empty_run_names_what_is_missing(tmp_path: Path) -> None:
    text = html(tmp_path)
    assert text.count("Not in this run") == 13  # all but the programs' versions
    with pytest.raises(InputError, match="no such folder"):
        report.run(Config(), results=tmp_path / "nowhere", output=tmp_path / "r.html")


def test_running_training_shows_its_metrics(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    lines = [json.dumps({"epoch": e, "loss": 10.0 / e, "latent_sd": 0.1, "images_per_second": 5.0, "time": e}) for e in (1, 2)]
    (tmp_path / "logs" / "discover.metrics.jsonl").write_text("\n".join(lines))
    assert "discover: 2 epochs, loss 10.00 to 5.00" in section(html(tmp_path), "Training")


def test_hostile_text_is_escaped() -> None:
    content = report_page.table([("<b>", 1.5)]) + report_page.story({"<i>": "&"})
    page = report_page.page("<script>a</script>", "", [("1<2", "x")], [("S", content)])
    assert "<script>a" not in page and "<b>&lt;b" not in page and "&lt;i&gt;" in page and "1&lt;2" in page


def test_leakage_is_one_for_a_cause_and_zero_for_chance() -> None:
    rng = np.random.default_rng(0)
    causes = rng.normal(size=(5000, 8))
    assert report_sections.explained(causes, causes @ np.arange(8.0) + 3) == pytest.approx(1)
    assert np.mean([report_sections.explained(causes, rng.normal(size=5000)) for _ in range(20)]) < 0.002
    mixed = causes[:, 0] + rng.normal(size=5000)  # half of the variance
    assert report_sections.explained(causes, mixed) == pytest.approx(0.5, abs=0.05)
