"""Benchmarks at tiny sizes: they run, they start scripts with flags that exist, and the pages show their results."""

import importlib
import json
import re
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT

from benchmarks import extraction, gpu, growth, loading, memory, prior, readme, record, sampling, train_options
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
@pytest.mark.parametrize("name", [name for name in gpu.CHECKS if name != "CUDA graphs"])
def test_checks(name):
    difference, bound = gpu.CHECKS[name](torch.device("cpu"))
    assert difference <= bound


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, flags, rate",
    [
        (loading, "--rows 128 --batch 16", "samples/s"),
        (memory, "--models DiTSEM-Ti/8 --batch 2 --L 4 --V 8", "images at once"),
        (prior, "--model DLCPrior-Ti --L 4 --V 8 --repeats 1 --no-compile", "codes/s"),
    ],
)
def test_benchmarks_run(module, flags, rate, rows_of):
    assert all(row[rate] > 0 for row in rows_of(module, *flags.split()))


@pytest.mark.slow
def test_growth(tmp_path):
    for row in growth.ROWS:
        assert growth.measure(row, tmp_path, row.tiny)[0] > 0
    cubic = growth.table_row(growth.ROWS[0], (1, 10, 100), [(1, 1), (1, 1), (1000, 1)])
    assert cubic["exponent"] == pytest.approx(3) and cubic["why"] == "not known"


@pytest.mark.slow
def test_out_of_memory_is_a_result(tmp_path):
    failed, _ = train_options.run("-c", "import torch; raise torch.OutOfMemoryError", output=tmp_path / "out.txt")
    none, peak = train_options.run("-c", "bytearray(2**27)", output=tmp_path / "out.txt")
    assert failed == "out of memory" and none is None and 0.125 < peak < 0.25  # its own, not this large process's
    with pytest.raises(RuntimeError, match="another"):
        train_options.run("-c", "raise ValueError('another')", output=tmp_path / "out.txt")
