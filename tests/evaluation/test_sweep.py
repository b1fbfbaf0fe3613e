"""evaluate.py sweep: which settings are drawn, that none is drawn twice, the table and the plot, and wrong flags."""

import importlib
import json
import sys

import numpy as np
import pytest
from conftest import L
from PIL import Image

from evaluation import sweep
from evaluation.sweep import Sweep, all_settings, draw_curves, drawn_as, name_of, report, table_of

FLAGS = dict(sampling=["--model", "DiT-Ti/4"], evaluation=["--reference", "x.npz"])
SETTINGS = all_settings({"cfg-scale": [1.0, 1.5, 2.0], "t-max": [400, 999]})


class StandIn:
    """Draws and evaluates nothing; a setting's FID is a function of it. Ends with an error at call number `fail_at`."""

    def __init__(self, fail_at=None):
        self.drawn, self.fail_at = [], fail_at

    def __call__(self, setting, folder):
        if len(self.drawn) == self.fail_at:
            raise ValueError("sampling ended with exit status 1")
        self.drawn.append(setting)
        assert folder.name == name_of(setting)
        return dict(fid=round((setting["cfg-scale"] - 1.6) ** 2 + setting["t-max"] / 1e4, 4), recall=0.5)


def quiet(*_, **__):
    pass


def test_a_stopped_sweep_continues(tmp_path):
    """Finished settings are not repeated, values may be added, and unguided settings are drawn once."""
    first = StandIn(fail_at=2)
    with pytest.raises(ValueError, match="exit status 1"):
        Sweep(tmp_path, FLAGS).run(SETTINGS, first, quiet)
    second = StandIn()
    results = Sweep(tmp_path, FLAGS).run(SETTINGS, second, quiet)
    assert first.drawn == [{"cfg-scale": 1.0, "t-max": 999}, {"cfg-scale": 1.5, "t-max": 400}]
    assert second.drawn == SETTINGS[3:]
    assert [setting for setting, _ in results] == SETTINGS
    assert results[0][1] == results[1][1] == dict(fid=0.4599, recall=0.5)
    third = StandIn()
    more = all_settings({"cfg-scale": [1.0, 1.5, 3.0], "t-max": [400, 999]})
    assert len(Sweep(tmp_path, FLAGS).run(more, third, quiet)) == 6
    assert third.drawn == [{"cfg-scale": 3.0, "t-max": 400}, {"cfg-scale": 3.0, "t-max": 999}]
    assert len(json.loads((tmp_path / "sweep.json").read_text())["results"]) == 7


def test_settings():
    assert len(SETTINGS) == 6 and all_settings({"cfg-scale": [1.5, 1.5]}) == [{"cfg-scale": 1.5}]
    assert drawn_as({"cfg-scale": 1.0, "t-min": 3, "sampler": "heun"}) == {
        "cfg-scale": 1.0,
        "t-min": 0,
        "sampler": "heun",
    }
    assert drawn_as({"t-max": 400}) == {"t-max": 400}  # guided by the script's default
    assert name_of({"cfg-scale": 1.5, "sampler": "dpmsolver++"}) == "cfg-scale-1.5_sampler-dpmsolverpp"


def test_sweep_of_other_flags(tmp_path):
    Sweep(tmp_path, FLAGS).run(SETTINGS[:1], StandIn(), quiet)
    with pytest.raises(ValueError, match="other flags of evaluation: --reference x.npz there, --reference y.npz here"):
        Sweep(tmp_path, dict(FLAGS, evaluation=["--reference", "y.npz"]))
    for harm, message in (
        ('{"sampling": []}', "evaluation is missing"),
        (json.dumps(dict(FLAGS, results=[{"setting": 1, "metrics": {}}])), "a result lacks its setting or its metrics"),
        ("[]", "holds a JSON list"),
    ):
        (tmp_path / "sweep.json").write_text(harm)
        with pytest.raises(ValueError, match=message):
            Sweep(tmp_path, FLAGS)


def test_table_and_plot(tmp_path, monkeypatch):
    results = Sweep(tmp_path, FLAGS).run(SETTINGS, StandIn(), quiet)
    said = []
    report(results, tmp_path, lambda text, **_: said.append(text))
    table = (tmp_path / "sweep.txt").read_text()
    assert said[0] == table == table_of(results)
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["cfg-scale", "t-max", "fid", "recall"] and lines[4] == ["1.5", "999", "0.1099", "0.5"]
    assert Image.open(tmp_path / "sweep.png").size[0] > 900  # two panels beside each other
    (tmp_path / "sweep.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report(results, tmp_path, lambda text, **_: said.append(text))
    assert "pip install matplotlib" in said[-1] and not (tmp_path / "sweep.png").exists()


def test_lines_of_the_plot(tmp_path, monkeypatch):
    """A line per value of the other flag, its points in the order of the axis; a metric that some setting lacks."""
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, *points, **kwargs: drawn.append((points, kwargs["label"])))
    monkeypatch.setattr(Axes, "legend", lambda *_, **__: None)
    results = [({"cfg-scale": cfg, "t-max": end}, dict(fid=cfg + end)) for cfg in (2.0, 1.0, 3.0) for end in (400, 999)]
    results[0][1]["recall"] = 0.25
    draw_curves(results, tmp_path / "x.png")
    assert drawn[:2] == [
        (((1.0, 2.0, 3.0), (401.0, 402.0, 403.0)), "t-max 400"),
        (((1.0, 2.0, 3.0), (1000.0, 1001.0, 1002.0)), "t-max 999"),
    ]
    assert drawn[2] == (((2.0,), (0.25,)), "t-max 400")


def test_commands_of_a_setting(tmp_path, monkeypatch):
    """What is launched: the sampling script with its flags and the setting, then evaluate.py; and what is read."""
    commands = []

    def launch(processes, script, flags, what):
        commands.append((processes, script.name, flags))
        if script.name.startswith("sample"):
            (tmp_path / "out/set").mkdir(parents=True)
            (tmp_path / "out/set.npz").write_bytes(b"")
        elif flags[0] == "agreement":
            values = dict(metrics=dict(fid=2.0), code_agreement=dict(share=0.5))
            (tmp_path / "out/set.metrics.json").write_text(json.dumps(values))

    monkeypatch.setattr(sweep, "launch", launch)
    monkeypatch.setattr(sys, "argv", ["evaluate.py sweep"])
    reference = tmp_path / "reference.npz"
    reference.write_bytes(b"")
    own = ["--cfg-scale", "1.5", "--reference", str(reference), "--agreement", "--processes", "2", "--discard"]
    own += ["--encoder", "sem", "--metrics", "fid", "is", "--dlc-dir", "codes"]
    _, args, drawing, handed = sweep.parse_args([*own, "--", "--num-fid-samples", "8"])
    assert drawing.num_fid_samples == 8 and sweep.check_flags(args, handed) == {"cfg-scale": [1.5]}
    found = sweep.draw_and_evaluate(args, handed, {"cfg-scale": 1.5}, tmp_path / "out")
    assert found == dict(fid=2.0, code_agreement=0.5)
    samples = str(tmp_path / "out/set.npz")
    flags = ["--num-fid-samples", "8", "--cfg-scale", "1.5", "--sample-dir", str(tmp_path / "out")]
    assert commands == [
        (2, "sample_ddp_computed_dlc.py", flags),
        (2, "evaluate.py", [samples, "--reference", str(reference), "--metrics", "fid", "is"]),
        (2, "evaluate.py", ["agreement", samples, "--encoder", "sem", "--dlc-dir", "codes"]),
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["set.metrics.json"]  # --discard


def test_failed_programs(tmp_path):
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    with pytest.raises(ValueError, match="sampling ended with exit status 3 .see above."):
        sweep.launch(1, tmp_path / "fails.py", [], "sampling")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--agreement"], "nothing to sweep: give values of one or more of --cfg-scale"),
        (["--cfg-scale", "1"], "nothing to measure: give --reference, --agreement or both"),
        (["--cfg-scale", "0.5", "--agreement"], "argument --cfg-scale: 0.5: must be at least 1"),
        (["--cfg-scale", "1", "--reference", "nowhere"], "--reference nowhere does not exist"),
        (["--t-min", "500", "--t-max", "400", "--agreement"], "t-min 500 is above t-max 400"),
        (["--sampler", "euler", "--agreement"], "--sampler euler: wanted one of ddpm"),
        (["--cfg-scale", "1", "--agreement", "--script", "sample_ddp.py"], "which sample_ddp.py does not draw"),
        (["--cfg-scale", "1", "--agreement", "--metrics", "fid"], "--metrics goes with --reference"),
        (["--cfg-scale", "1", "--metrics", "is", "--encoder", "x"], "--encoder goes with --agreement"),
        (["--cfg-scale", "1", "--agreement", "--vae", "ema"], "--vae is of the ceiling, which is measured on images"),
        (["--cfg-scale", "1", "--metrics", "is", "--inception", "x"], "--inception x does not exist"),
        (["--cfg-scale", "1", "--agreement"], "no checkpoint of DiTSEM-XL/2 under --results-dir results"),
        (["--cfg-scale", "1", "--agreement", "--flotz"], "unrecognized arguments: --flotz"),
        (["--cfg-scale", "1", "--agreement", "--crop", "3", "--resize", "3"], "exclude each other: give one"),
        (["--cfg-scale", "1", "--agreement", "--", "--cfg-scale", "2"], "--cfg-scale after -- is a flag that is swept"),
        (["--cfg-scale", "1", "--agreement", "--", "--sample-dir=x"], "--sample-dir after -- is for sweep to choose"),
        (["--cfg-scale", "1", "--agreement", "--", "--modle", "x"], "unrecognized arguments: --modle x"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_flags(flags, message, error_of, tmp_path):
    assert message in error_of("evaluate", "sweep", *flags)
    assert not list(tmp_path.iterdir())  # nothing is begun


def test_what_measures_is_opened_first(workplace, tiny_models, images, evaluation_place, error_of):
    """A missing encoder, one of other codes, weights and references that do not fit: before anything is drawn."""
    results, codes = str(workplace / "results"), str(workplace / "features")
    drawing = ("--", "--model", "DiTSEM-Ti/4", "--num-fid-samples", 3, "--results-dir", results)
    before = sorted(evaluation_place.iterdir())
    for flags, message in (
        (("--agreement", "--encoder", "nowhere"), "nowhere"),
        (("--agreement", "--encoder", "tiny.bin"), "tiny.bin"),
        (("--agreement", "--dlc-dir", "samples.npz"), "samples.npz"),
        (("--agreement", "--data-path", images, "--num-images", 99), "--num-images 99: features"),
        (("--reference", "reference.npz", "--inception", "nowhere.pth"), "--inception nowhere.pth does not exist"),
        (("--reference", "reference.npz"), "--metrics precision needs at least 4 images in each set, and there are 3"),
        (("--reference", "tiny.bin"), "--reference tiny.bin is neither an .npz nor a folder"),
    ):
        assert message in error_of("evaluate", "sweep", "--cfg-scale", 1, *flags, *drawing), flags
    np.save("other.npy", np.zeros((9, L), np.uint8))
    error = error_of("evaluate", "sweep", "--cfg-scale", 1, "--agreement", "--dlc-dir", "other.npy", *drawing)
    assert "--dlc-dir other.npy: the samples are to be drawn for other codes" in error
    (evaluation_place / "other.npy").unlink()
    assert sorted(evaluation_place.iterdir()) == before
    args = ["--agreement", "--cfg-scale", "1", "--reference", "reference.npz", "--metrics", "fid", "--dlc-dir", codes]
    _, args, drawing, _ = sweep.parse_args([*args, *map(str, drawing)])
    sweep.check_measures(args, drawing)  # with nothing wrong


def test_whole_command(tmp_path, monkeypatch, capsys):
    """From the flags to the table, with a stand-in for what draws and evaluates."""
    monkeypatch.chdir(tmp_path)
    stand_in = StandIn()
    monkeypatch.setattr(sweep, "draw_and_evaluate", lambda args, handed, *setting: stand_in(*setting))
    monkeypatch.setattr(sweep, "check_measures", lambda args, drawing: None)
    argv = ["evaluate.py", "sweep", "--cfg-scale", "1", "2", "--t-max", "400", "999", "--agreement"]
    for drawn in (3, 3):
        monkeypatch.setattr(sys, "argv", list(argv))
        importlib.import_module("evaluate").main()
        said = capsys.readouterr().out
        assert len(stand_in.drawn) == drawn and "look at sweep/sweep.png" in said
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["sweep.json", "sweep.png", "sweep.txt"]
