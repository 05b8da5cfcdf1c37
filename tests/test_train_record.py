"""The measured figures of training, from a case to docs/training.md."""

import json
import re

import pytest

from train import record

SMALL = (
    *("stage=t2v", "model.unet=tiny", "streams.video.num_frames=3"),
    *("streams.video.height=32", "streams.video.width=32", "streams.video.workers=0"),
)
ENVIRONMENT = {"gpu": "NVIDIA X1", "torch": "2.11", "triton": "3.6", "gemm_tflops": 700.2}


def test_cases_are_measured_and_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "SECONDS", 0.01)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(
        record,
        "CASES",
        {name: record.Case(name, SMALL, cached=name == "cache") for name in ("full", "cache")},
    )
    rows = {
        name: record.measure(case) | {"memory GiB": 61.25, "synchronisations": 0} for name, case in record.CASES.items()
    }
    (tmp_path / "x1.json").write_text(json.dumps({"environment": ENVIRONMENT, "rows": rows}))
    record.PAGE.write_text(f"Before.\n\n{record.BEGIN}\nold\n{record.END}\n\nAfter.\n")
    assert record.main(["--page"]) == 0
    page = record.PAGE.read_text()
    assert re.search(r"\| cache \| 2 clips, 3x32x32 \| [\d.]+ \| .* \| 61.2 \| [\d.]+% \| 0 \|", page)
    assert page.startswith("Before.\n")
    assert page.endswith("\n\nAfter.\n")
    assert "old" not in page
    record.write_page()
    assert page == record.PAGE.read_text()


def test_the_page_shows_the_figures_that_are_committed(tmp_path, monkeypatch):
    text = record.PAGE.read_text()
    (tmp_path / "training.md").write_text(text)
    monkeypatch.setattr(record, "PAGE", tmp_path / "training.md")
    record.write_page()
    assert record.PAGE.read_text() == text


def test_an_unknown_case_is_named(capsys):
    assert record.main(["fast"]) == 2
    assert capsys.readouterr().err.startswith("record: got case 'fast', needs one of full, checkpointing,")


@pytest.mark.parametrize("name", record.CASES)
def test_cases_are_configurations(name):
    from train.bench import FULL_SIZE
    from train.config import Config, load

    case = record.CASES[name]
    config = load(Config, None, [*(FULL_SIZE if case.full_size else ()), *case.overrides])
    assert (config.model.unet == "sd21") == case.full_size
