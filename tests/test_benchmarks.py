"""Benchmarks at tiny sizes: they run, they start scripts with flags that exist, and the pages show their results."""

import importlib
import json
import re
import sys
import time
from argparse import Namespace
from functools import partial

import pytest
import torch
from conftest import ROOT
from forked import Run

from benchmarks import extraction, gpu, loading, memory, prior, readme, record, roofline, sampling, steps, train_options
from dlc.machine.cli import ArgumentParser


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


def test_a_result_changes_the_page(monkeypatch, tmp_path):
    """A GPU's rows come into the table and replace a CPU's in the figures; a block without a benchmark fails."""
    result = json.loads((readme.RESULTS / "sampling-cpu.json").read_text())
    result["machine"]["gpu"], result["rows"][-1]["images/s"] = "H1", 1234.5
    for path in readme.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "sampling-gpu.json").write_text(json.dumps(result))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert "- Sampling: 1,230 images/s" in " ".join(readme.figures()) and readme.figures()[-1].endswith("(H1).")
    page = tmp_path / "page.md"
    page.write_text("<!-- begin sampling (x) -->\nold\n<!-- end sampling -->\n")
    text = readme.filled(page)
    assert "| DPM-Solver++-25 | H1 | bf16 | 25 | 25 | 1,230 |" in text and "old" not in text
    page.write_text("<!-- begin nothing (x) -->\n<!-- end nothing -->\n")
    with pytest.raises(ValueError, match="has a block 'nothing'"):
        readme.filled(page)


def test_scripts_accept_the_flags(monkeypatch, tmp_path):
    """The commands that benchmarks start, parsed by the scripts themselves."""
    parse, commands = ArgumentParser.parse_args, []

    def stop(*command, **_):
        commands.append(list(map(str, command)))
        raise InterruptedError

    monkeypatch.setattr(train_options, "run", stop)
    for module in (extraction, sampling, train_options):
        monkeypatch.setattr(module, "run_script", stop)
    args = Namespace(
        image_size=64, vae="v", encoder="e", data_path="d", num_workers=1, steps=2, batch=2, batches=2, batch_size=2,
        images=4, precision="bf16", compile=False, model=["DiTSEM-Ti/8"],
    )  # fmt: skip
    few, data = Namespace(**{**vars(args), "model": "DiTSEM-Ti/8"}), dict(features=["--features-path", "f"])
    for function, *inputs in (
        (extraction.rate_of_the_whole, tmp_path, args),
        (train_options.make_data, tmp_path, args),
        (sampling.script, tmp_path, tmp_path, "bf16", sampling.HALVED, few),
        (train_options.train, train_options.ROWS[-1], few.model, 2, data, tmp_path, args),
    ):
        with pytest.raises(InterruptedError):
            function(*inputs)
        at = next(place for place, word in enumerate(commands[-1]) if word.endswith(".py"))
        monkeypatch.setattr(sys, "argv", commands[-1][at:])
        with monkeypatch.context() as patched, pytest.raises(InterruptedError):  # not SystemExit
            patched.setattr(ArgumentParser, "parse_args", lambda parser, *args: parse(parser, *args) and stop())
            importlib.import_module(commands[-1][at][:-3].replace("/", ".")).main()


def test_rows_go_on_where_they_stopped(rows_of, monkeypatch, capsys):
    """A row that failed is tried again, one that is done is not; when time is up, nothing is begun."""
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


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu.CHECKS)
def test_checks(name):
    difference, bound = gpu.CHECKS[name](torch.device("cpu"))
    assert difference <= bound


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, flags, rate",
    [
        (loading, "--rows 128 --batch 16", "samples/s"),
        (memory, "--models DiTSEM-Ti/8 --batch 2", "images at once"),
        (prior, "--model DLCPrior-Ti --L 4 --V 8 --repeats 1 --no-compile", "codes/s"),
    ],
)
def test_benchmarks_run(module, flags, rate, rows_of):
    assert all(row[rate] > 0 for row in rows_of(module, *flags.split()))


@pytest.mark.slow
def test_every_kind_of_row_runs_on_a_cpu(rows_of, monkeypatch, tmp_path):
    """benchmarks.gpu with the real scripts, tiny networks, and one row of each function; nothing is compiled."""
    kinds = {(row[0], row[3]): row for row in reversed(gpu.ROWS)}
    backbone = dict(embed_dim=24, depth=1, num_heads=2, reg_tokens=2)
    encoder = partial(extraction.SEMEncoder, "vit_tiny_patch16_224", 32, 4, 8, backbone_args=backbone)
    monkeypatch.setattr(extraction, "SEMEncoder", encoder)
    monkeypatch.setattr(extraction, "SD_VAE", dict(extraction.SD_VAE, block_out_channels=(8,) * 4, norm_num_groups=4))
    monkeypatch.setattr(sampling, "TRAINING_STEPS", 2)
    monkeypatch.setattr(gpu, "ROWS", [row for row in gpu.ROWS if row == kinds[row[0], row[3]]])
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: None)

    def forked(*command, **environment):
        """A script in a process that has everything imported; a stage's benchmark has a test of its own."""
        words = list(map(str, command))
        if words[0] == "-m" and words[1] in ("benchmarks.prior", "benchmarks.extraction"):
            return ""
        at = next(place for place, word in enumerate(words) if word.endswith(".py"))
        processes = 2 if {"--multi_gpu", "train_options/fsdp.yaml", "--no-python"} & set(words[:at]) else 1
        arguments = [word.replace("--compile", "--no-compile") for word in words[at + 1 :]]
        if "sample" in words[at]:
            arguments += ["--num-sampling-steps", "2"]
        output = tmp_path / f"output {time.time_ns()}"
        run = Run(words[at][:-3].replace("/", "."), arguments, output, processes, ROOT)
        if not run.wait():
            raise RuntimeError(run.said())
        return run.said()

    for module in (extraction, sampling, gpu):
        monkeypatch.setattr(module, "run_script", forked)
    monkeypatch.setattr(train_options, "run", lambda *command, output: (forked(*command) and None, 0.0))
    rows_of(gpu, "--minutes", 60, "--images", 2, "--num-workers", 0)
    rows = json.loads((tmp_path / "gpu-cpu.json").read_text())["rows"]
    assert len(rows) == len(gpu.ROWS) and not [row["said"] for row in rows if "failed" in (row["said"] or "")]
    assert all(row["value"] is not None for row in rows if row["said"] is None)
    assert {row["part"] for row in rows} == set(gpu.PARTS_OF_ALL)


def test_what_is_expected_of_a_card(monkeypatch):
    """GPU.md's arithmetic for one H100, and the words beside a value that is far from it."""
    one = roofline.Roofline("DiTSEM-XL/2", roofline.card_of("NVIDIA H100 80GB HBM3"))
    assert 256 / sum(one.training(256).values()) == pytest.approx(540, rel=0.01)  # images per second
    assert 64 / 250 / sum(one.sampling(64).values()) == pytest.approx(3.75, rel=0.01)
    eight = [roofline.Roofline("DiTSEM-XL/2", one.card, 8, sharded) for sharded in (False, True)]
    assert [1e3 * sum(each.training(32).values()) for each in eight] == pytest.approx([85, 71], rel=0.02)
    bench = gpu.Bench(Namespace(model="DiTSEM-XL/2"), None)
    monkeypatch.setattr(bench, "card", roofline.card_of("NVIDIA H200"), raising=False)
    row = dict(zip(("part", ""), gpu.TRAINED), value=400.0, unit="images/s", expected=600.0) | {
        "of the data sheet": 0.3
    }
    assert gpu.judge(row, bench) == ["bar missed", "a surprise: 0.67 times what was expected"]
    assert row["bar"] == "550 images/s, 45% of the data sheet"
    good = dict(row, value=610.0) | {"of the data sheet": 0.46, "differs by": 0.01}
    assert gpu.judge(good, bench) == ["bar reached"]
    assert gpu.judge(good | {"differs by": 0.2}, bench)[1:] == ["differs by more than rounding: its result is wrong"]


@pytest.mark.slow
def test_steps_agree(rows_of, monkeypatch):
    """Whatever the layout and the draws, a step computes the same, up to rounding."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: None)
    for row in rows_of(steps, *"--model DiTSEM-Ti/8 --batch 2 --turns 1 --threads 1".split()):
        assert row["differs by"] <= 1e-6 and row["seconds"] > 0


@pytest.mark.slow
def test_out_of_memory_is_a_result(tmp_path):
    failed, _ = train_options.run("-c", "import torch; raise torch.OutOfMemoryError", output=tmp_path / "out.txt")
    none, peak = train_options.run("-c", "bytearray(2**27)", output=tmp_path / "out.txt")
    assert failed == "out of memory" and none is None and 0.125 < peak < 0.25  # its own, not this large process's
    with pytest.raises(RuntimeError, match="another"):
        train_options.run("-c", "raise ValueError('another')", output=tmp_path / "out.txt")
