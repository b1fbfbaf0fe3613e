"""The benchmarks' own parts: that they run, and that the pages say what the results say."""

import json
import re
import sys

import numpy as np
import pytest
from conftest import IMAGE_SIZE, ROOT, save_images
from PIL import Image

from benchmarks import readme, record, train_options


def call(module, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, flags)])
    module.main()


def test_pages_say_what_the_results_say(monkeypatch, capsys):
    """Every figure between the marks is made by python -m benchmarks.readme, and every benchmark has its block."""
    with pytest.raises(SystemExit) as stopped:
        call(readme, monkeypatch, "--check")
    assert not stopped.value.code, capsys.readouterr().out
    blocks = [re.findall(r"<!-- begin (\S+)", (ROOT / page).read_text()) for page in readme.PAGES]
    assert blocks == [["figures"], list(readme.DEVICES)]
    lines = readme.figures()
    assert len([line for line in lines if line.startswith("- ")]) == 5
    assert " ".join(lines).count("2 CPU cores") == 4 or list(readme.RESULTS.glob("*-gpu.json"))


def test_figures_are_those_of_a_gpu_where_there_is_one(monkeypatch, tmp_path):
    for path in readme.RESULTS.glob("*.json"):
        result = json.loads(path.read_text())
        (tmp_path / path.name).write_text(json.dumps(result))
        if path.name == "sampling-cpu.json":
            result["machine"]["gpu"] = "H1"
            result["rows"][-1]["images/s"] = 1234.5
            (tmp_path / "sampling-gpu.json").write_text(json.dumps(result))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert "- Sampling: 1,230 images/s" in " ".join(readme.figures()) and readme.figures()[-1].endswith("(H1).")


def test_a_result_changes_the_page(monkeypatch, tmp_path):
    """Rows of a benchmark that has just run, a row out of memory, and a block that nothing fills."""
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- begin sampling (x) -->\nold\n<!-- end sampling -->\nb\n")
    assert "CPU: not measured yet" in readme.filled(page) and "old" not in readme.filled(page)
    machine = dict(gpu="H1", cpu="C", cores=3, memory_gib=4, commit="abc", torch="2")
    (tmp_path / "sampling-gpu.json").write_text(
        json.dumps(
            dict(
                command="c",
                date="d",
                machine=machine,
                rows=[
                    {"": "one", "images/s": 1234.5, "share of peak": 0.456, "guided": True},
                    {"": "two", "images/s": None, "share of peak": 0.0123, "guided": False},
                ],
            )
        )
    )
    text = readme.filled(page)
    assert "| one | H1 | 1,230 | 46% | yes |" in text and "| two | H1 | – | 1% | no |" in text
    assert "CPU: not measured yet" in text and "GPU: not" not in text and "commit `abc`" in text
    page.write_text("<!-- begin nothing (x) -->\n<!-- end nothing -->\n")
    with pytest.raises(ValueError, match="has a block 'nothing', which is no benchmark's"):
        readme.filled(page)


@pytest.mark.slow
def test_table_of_training_options(monkeypatch, tiny_models, tmp_path):
    """The real benchmark, two of its rows on tiny data: both train the same, and there is a picture."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    save_images(tmp_path / "images")
    call(
        train_options,
        monkeypatch,
        "--model",
        "DiTSEM-Ti/4",
        "--batch",
        2,
        "--rows",
        "train_original",
        "train_features",
        "--steps",
        2,
        "--image-size",
        IMAGE_SIZE,
        "--data-path",
        tmp_path / "images",
        "--vae",
        tiny_models[0],
        "--encoder",
        tiny_models[1],
        "--num-workers",
        1,
    )
    result = json.loads((tmp_path / "train_options-cpu.json").read_text())
    assert [(row[""], row["data"], row["checkpointing"]) for row in result["rows"]] == [
        ("train_original", "images", False),
        ("train_features", "features", True),
    ]
    for row in result["rows"]:
        assert row["loss differs by"] < 1e-4 and row["images/s"] == pytest.approx(2 * row["steps/s"])
        assert 0 < row["MFU"] < 1 and 0 < row["memory GiB"] < 8
    assert Image.open(tmp_path / "train_options-cpu.png").width == 1000


@pytest.mark.slow
def test_out_of_memory_is_told(tmp_path):
    run = train_options.run
    failed, _ = run("-c", "import torch; raise torch.OutOfMemoryError('CUDA')", output=tmp_path / "output.txt")
    assert failed == "out of memory"
    none, peak = run("-c", "bytearray(2**27)", output=tmp_path / "output.txt")
    assert none is None and 0.125 < peak < 0.25  # its own, not that of this large process
    with pytest.raises(RuntimeError, match="another"):
        run("-c", "raise ValueError('another')", output=tmp_path / "output.txt")
    rows = [
        {"": "small", "model": "m", "batch": 8, "data": "images", "images/s": 5.0, "memory GiB": 2.0},
        {"": "large", "model": "m", "batch": 8, "data": "features", "images/s": None, "memory GiB": failed},
    ]
    train_options.draw_bars(rows, tmp_path / "bars.png")
    light = (np.array(Image.open(tmp_path / "bars.png")) == (150, 180, 220)).all(axis=2)
    assert light.any(axis=0).sum() == 501 and light.any(axis=1).sum() == 19  # one bar, over the whole width
