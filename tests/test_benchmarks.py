"""The benchmarks' own parts: that they run, and that the pages say what the results say."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, ROOT, save_images
from PIL import Image

from benchmarks import extraction, gpu, growth, growth_stage, readme, record, sampling, train_options


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


@pytest.fixture
def bars(monkeypatch, tmp_path, tiny_models):
    """bars(flags…): benchmarks.gpu in this process, its results and pages in tmp_path; the rows. Networks are tiny."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend="eager"))
    for module in (record, readme):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "PAGES", ("page.md",))
    monkeypatch.setattr(sampling, "STEPS", 4)
    for module in (sampling, extraction):
        monkeypatch.setattr(module, "write_networks", lambda root, encoder=True: link(root))
    (tmp_path / "page.md").write_text("<!-- begin gpu (x) -->\n<!-- end gpu -->\n")

    def link(root):
        for name, path in zip(("vae", "sem"), tiny_models):
            (root / name).symlink_to(path)

    def run(*flags):
        call(gpu, monkeypatch, "--num-workers", 1, *flags)
        return json.loads((tmp_path / "gpu-cpu.json").read_text())["rows"]

    return run


@pytest.mark.slow
def test_bars_are_written_row_by_row_and_go_on(bars, monkeypatch, tmp_path, capsys):
    """A row that failed is tried again, one that is done is not; when time is up, nothing is begun."""
    product, called = gpu.embedding.milliseconds, []

    def failing(way, *args):
        called.append(way)
        if len(called) == 2:
            raise RuntimeError("no\nluck")
        return product(way, *args)

    monkeypatch.setattr(gpu.embedding, "milliseconds", failing)
    first, second = bars("--only", "embedding")
    assert first["ms"] > 0 and second["ms"] is None and second["said"] == "failed: no luck"
    assert [row["ms"] for row in bars("--only", "embedding")[:1]] == [first["ms"]] and len(called) == 3
    capsys.readouterr()
    rows = bars("--only", "embedding", "correctness", "--minutes", 0)
    assert (
        len(rows) == 2 and "put off, the same command goes on with them: correctness, fp16" in capsys.readouterr().out
    )
    rows = bars("--only", "correctness")
    differs = {row[""]: row["differs by"] for row in rows if row["part"] == "correctness"}
    assert list(differs) == list(gpu.CHECKS) and len(rows) == len(gpu.CHECKS) + 2
    assert [row["said"] for row in rows if row["reached"] is None] == [None, None, "CUDA graphs need a GPU"]
    assert all(row["reached"] for row in rows if row["differs by"] is not None)
    assert differs["compiled"] == 0 and 0 < differs["sampling in bf16"] < 0.1
    assert bars("--only", "embedding", "--batch", 3) != rows  # of other sizes: from the beginning
    assert "GPU: not measured yet" in (tmp_path / "page.md").read_text()


@pytest.mark.slow
def test_bars_of_every_stage(bars, monkeypatch):
    """Parts of extraction and the baseline in earnest; scripts that other tests run stand still."""
    trained, drawn = [], []
    monkeypatch.setattr(sampling, "TRAINING_STEPS", 1)
    monkeypatch.setattr(extraction, "rate_of_the_whole", lambda root, args: 2.5)
    monkeypatch.setattr(train_options, "train", lambda row, *_: trained.append(row) or (2.0, [1.0], 3.5))
    monkeypatch.setattr(sampling, "script", lambda root, folder, *flags: drawn.append(flags[:2]) or (5.0, folder))
    parts = ("training", "sampling", "extraction", "prior")
    rows = {(row["part"], row[""]): row for row in bars("--only", *parts, "--images", 2)}
    assert [part for part, *_ in gpu.ROWS if part in parts] == [part for part, _ in rows]
    assert not any((row["said"] or "").startswith("failed") for row in rows.values()), rows
    assert trained[:2] == ["train_fast --compile --grad-accum 1", f"train_fast {gpu.ROWS[6][4][0]} --grad-accum 1"]
    row = rows["training", gpu.OURS]
    assert row["images/s"] == 16 and row["memory GiB"] == 3.5 and row["share of peak"] > 0 and row["bar"] is None
    assert ("bf16", ["--cuda-graphs"]) in drawn and rows["sampling", gpu.DRAWN]["images/s"] == 5
    assert all(row["codes/s" if part == "prior" else "images/s"] > 0 for (part, _), row in rows.items())


def test_bars_are_judged_on_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "ON_GPU", True)
    bench = gpu.Bench(gpu.argument_parser().parse_args(["--batch", "256"]), None)

    def judged(part, name, **values):
        row = dict(dict.fromkeys(gpu.COLUMNS), part=part, **{"": name}, **values)
        gpu.judge(bench, row)
        bench.rows.append(row)
        return row["bar"], row["reached"]

    assert judged("embedding", gpu.embedding.GATHERED, ms=1.0) == (None, None)  # no step to compare with
    assert judged("training", gpu.OURS, **{"images/s": 512.0, "of the data sheet": 0.49}) == (
        "50% of the data sheet",
        False,
    )
    gpu.judge(bench, bench.rows[0])  # measured before the step, such as by --only
    assert bench.rows[0]["reached"]
    assert judged("embedding", gpu.embedding.GATHERED, ms=9.9) == ("2% of a step of 500 ms", True)
    assert judged("embedding", gpu.embedding.ONE_HOT, ms=9.9) == (None, None)
    assert judged("sampling", gpu.DRAWN, **{"images/s": 4.5}) == ("4.5 images/s", True)
    for name, rate in zip(gpu.PARTS, (300.0, 100.0, 91.0)):
        bar = judged("extraction", name, **{"images/s": rate})
    assert bar == ("90% of its slowest part", True)
    assert judged("training", gpu.OURS, said="failed: x") == (None, None)


@pytest.mark.slow
def test_growth_of_every_stage(tmp_path):
    """Each stage at its tiny size, in this process; the real scripts, which several processes run, stand still."""
    for key, stage in growth_stage.stages().items():
        if stage.grows != "processes":
            growth_stage.prepare(key, tmp_path, stage.tiny)
            stage.open(stage.folder(tmp_path, stage.tiny), stage.tiny)()
            assert stage.sizes[-1] >= 8 * stage.sizes[0] and stage.tiny <= stage.sizes[0]


@pytest.mark.slow
def test_growth_table(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    for name in ("Fréchet", "statistics of features"):
        call(growth, monkeypatch, "--tiny", "--only", name, "--dir", tmp_path)
    other, row = json.loads((tmp_path / "growth-cpu.json").read_text())["rows"]  # the one measured before is kept
    assert other[""] == "statistics of features" and row["from … to"] == "16 / 64" and row["memory exponent"] is None
    rows = [
        growth.row_of(stage, (1, 10, 100), ((1, 9.0), (10, 10), (last, 10)))
        for stage, last in (
            (growth_stage.STAGES["Fréchet distance", "features"], 10_000),
            (growth.Stage(*6 * [None], why=None), 110),
        )
    ]
    assert [row["exponent"] for row in rows] == pytest.approx([3, 1.04], abs=0.01)
    assert "D^3" in rows[0]["why"] and rows[1]["why"] is None and rows[0]["memory exponent"] == 0
    assert growth.exponent((1, 10), (7, 9), 8) is None
