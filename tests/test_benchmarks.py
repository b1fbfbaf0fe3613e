"""Benchmarks at tiny sizes: they run, they start scripts with flags that exist, and the pages show their results."""

import json
import math
import re
import sys
import time
from functools import partial

import pytest
import torch
from conftest import ROOT
from forked import Run

from benchmarks import (
    evaluation,
    extraction,
    gpu,
    growth,
    loading,
    memory,
    prior,
    readme,
    record,
    roofline,
    sampling,
    steps,
    train_options,
)


@pytest.fixture
def rows_of(monkeypatch, tmp_path):
    """rows_of(module, flags…): run a benchmark in this process; its rows. Results and pages are in tmp_path."""
    for module in (record, readme):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(readme, "PAGES", ())

    def run(module, *flags):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, flags)])
        module.main()
        return json.loads(next(tmp_path.glob("*-cpu.json")).read_text())["rows"]

    return run


def test_pages_say_what_the_results_say():
    assert readme.outdated_pages() == [], "run python -m benchmarks.readme"
    blocks = [re.findall(r"<!-- begin (\S+)", (ROOT / page).read_text()) for page in readme.PAGES]
    assert blocks == [["figures"], [*blocks[1]]] and sorted(blocks[1]) == sorted(readme.DEVICES)


def test_rows_go_on_where_they_stopped(rows_of, monkeypatch, capsys):
    called = []

    def check(device):
        called.append(device)
        if len(called) == 2:
            raise RuntimeError("no\nluck")
        return 0.5, 1.0

    monkeypatch.setattr(gpu, "CHECKS", dict.fromkeys(gpu.CHECKS, check))
    rows = rows_of(gpu, "--only", "correctness")
    assert [row["said"] for row in rows] == ["ok", "failed: no luck", *(len(gpu.CHECKS) - 2) * ["ok"]]
    rows = rows_of(gpu, "--only", "correctness")
    assert len(called) == len(gpu.CHECKS) + 1 and {row["said"] for row in rows} == {"ok"}
    assert len(rows_of(gpu, "--minutes", 0)) == len(rows) and "go" in capsys.readouterr().out.split("put off")[1]


def test_what_a_cpu_and_another_folder_leave_out(monkeypatch, tmp_path):
    with pytest.raises(gpu.Unavailable, match="CUDA graphs need a GPU"):
        gpu.drawing("bf16", ["--cuda-graphs"], gpu.Bench(None, tmp_path))
    bench = gpu.Bench(None, tmp_path)
    bench.card = roofline.CARDS["H100"]
    full = gpu.measure(bench, *gpu.TRAINED, lambda bench: {"said": "out of memory"}, ())
    assert full["said"] == "out of memory"
    monkeypatch.setattr(readme, "RESULTS", tmp_path)  # as BENCHMARK_RESULTS does; most results are not there
    assert readme.write_pages() == []


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu.CHECKS)
def test_checks(name):
    difference, bound = gpu.CHECKS[name](torch.device("cpu"))
    assert difference <= bound


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, flags, rate",
    [
        (evaluation, "--rows 200 --dim 8 --images 2 --turns 1", "seconds"),
        (loading, "--rows 16 --batch 4", "samples/s"),
        (memory, "--models DiTSEM-Ti/8 --batch 2", "images at once"),
        (prior, "--model DLCPrior-Ti --L 4 --V 8 --repeats 1 --no-compile", "codes/s"),
    ],
)
def test_benchmarks_run(module, flags, rate, rows_of):
    assert all(row[rate] > 0 for row in rows_of(module, *flags.split()))


@pytest.mark.slow
@pytest.mark.parametrize("row", growth.ROWS, ids=lambda row: f"{row.name}, {row.grows}")
def test_growth(row, tmp_path):
    found = growth.table_row(row, [growth.measure(row, tmp_path, size) for size in (row.tiny, 2 * row.tiny)])
    assert math.isfinite(found["exponent"])


@pytest.mark.slow
def test_every_kind_of_row_runs_on_a_cpu(rows_of, monkeypatch, tmp_path):
    """benchmarks.gpu with the real scripts, tiny networks, and one row of each function; nothing is compiled."""
    kinds = {(row[0], row[3]): row for row in reversed(gpu.ROWS)}
    backbone = dict(embed_dim=24, depth=1, num_heads=2, reg_tokens=2)
    encoder = partial(extraction.SEMEncoder, "vit_tiny_patch16_224", 32, 4, 8, backbone_args=backbone)
    monkeypatch.setattr(extraction, "SEMEncoder", encoder)
    monkeypatch.setattr(extraction, "SD_VAE", dict(extraction.SD_VAE, block_out_channels=(8,) * 4, norm_num_groups=4))
    monkeypatch.setattr(sampling, "TRAINING_STEPS", 2)
    rows = [row for row in gpu.ROWS if row == kinds[row[0], row[3]] and row[0] != "correctness"]  # which have a test
    monkeypatch.setattr(gpu, "ROWS", rows)
    monkeypatch.setattr(steps, "ROWS", steps.ROWS[:2])
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: None)

    def forked(*command, **environment):
        """A script in a process that has everything imported; a stage's benchmark has a test of its own."""
        words = list(map(str, command))
        if words[0] == "-m" and words[1] in ("benchmarks.prior", "benchmarks.extraction"):
            return ""
        at = next(place for place, word in enumerate(words) if word.endswith(".py"))
        arguments = [word.replace("--compile", "--no-compile") for word in words[at + 1 :]]
        if "sample" in words[at]:
            arguments += ["--num-sampling-steps", "2"]
        output = tmp_path / f"output {time.time_ns()}"
        run = Run(words[at][:-3].replace("/", "."), arguments, output, cwd=ROOT)
        if not run.wait():
            raise RuntimeError(run.said())
        return run.said()

    for module in (extraction, sampling, gpu):
        monkeypatch.setattr(module, "run_script", forked)
    monkeypatch.setattr(train_options, "run", lambda *command, output: (forked(*command) and None, 0.0))
    rows_of(gpu, "--minutes", 60, "--images", 2, "--batch", 2, "--num-workers", 0)
    rows = json.loads((tmp_path / "gpu-cpu.json").read_text())["rows"]
    assert len(rows) == len(gpu.ROWS) and not [row["said"] for row in rows if "failed" in (row["said"] or "")]
    assert all(row["value"] is not None for row in rows if row["said"] is None)
    assert {row["part"] for row in rows} == {*gpu.PARTS_OF_ALL} - {"correctness"}


def test_what_is_expected_of_a_card():
    """GPU.md's arithmetic for one H100."""
    one = roofline.Roofline("DiTSEM-XL/2", roofline.card_of("NVIDIA H100 80GB HBM3"))
    assert 256 / sum(one.training(256).values()) == pytest.approx(540, rel=0.01)  # images per second
    assert 64 / 250 / sum(one.sampling(64).values()) == pytest.approx(3.75, rel=0.01)
    eight = [roofline.Roofline("DiTSEM-XL/2", one.card, 8, sharded) for sharded in (False, True)]
    assert [1e3 * sum(each.training(32).values()) for each in eight] == pytest.approx([85, 71], rel=0.02)


@pytest.mark.slow
def test_steps_agree(rows_of, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: None)
    for row in rows_of(steps, *"--model DiTSEM-Ti/8 --batch 2 --turns 1 --threads 1".split()):
        assert row["differs by"] <= 1e-6 and row["seconds"] > 0
