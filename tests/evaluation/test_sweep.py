"""evaluate.py sweep: which settings are drawn, that none is drawn twice, the table and the plot, and wrong flags."""

import contextlib
import json

import pytest
from conftest import refusal
from matplotlib.figure import Figure
from PIL import Image

from evaluation import sweep
from evaluation.sweep import all_settings, draw_curves, drawn_as, folder_of, over_seeds, table_of

COMMAND = "--cfg-scale 1 1.5 2 --t-max 400 999 --agreement -- --model DiTSEM-Ti/4".split()


def test_a_stopped_sweep_continues(tmp_path, monkeypatch, capsys):
    """Finished settings are not repeated, values may be added, and unguided settings are drawn once."""
    monkeypatch.chdir(tmp_path)

    def drawn(command, fail_at=None, reference="one"):
        """The settings that a stand-in for the programs draws, and what is said; it fails at call number fail_at."""
        settings = []

        def draw_and_evaluate(args, handed, setting):
            if len(settings) == fail_at:
                raise ValueError("sampling ended with exit status 1")
            settings.append((setting.get("cfg-scale"), setting.get("t-max")))
            fid = round((setting["cfg-scale"] - 1.6) ** 2 + setting.get("t-max", 999) / 1e4, 4)
            conditions = dict(sha256=f"of seed {setting.get('seeds')}")
            common = dict(checkpoint="ckpt", step=7, reference=reference, conditions=conditions)
            return dict(setting=setting, metrics=dict(fid=fid, code_agreement=0.5), common=common)

        monkeypatch.setattr(sweep, "draw_and_evaluate", draw_and_evaluate)
        monkeypatch.setattr(sweep, "find_checkpoint", lambda args: "ckpt")
        with contextlib.suppress(SystemExit):
            sweep.main(command)
        return settings, "".join(capsys.readouterr())

    settings, said = drawn(COMMAND, fail_at=2)
    assert settings == [(1.0, None), (1.5, 400)]
    assert "error: sampling ended with exit status 1; finished settings are kept: run the same command again" in said
    settings, said = drawn(COMMAND)
    assert settings == [(1.5, 999), (2.0, 400), (2.0, 999)]
    table = (tmp_path / "sweep/sweep.txt").read_text()
    assert table in said and "look at sweep/sweep.png" in said
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["cfg-scale", "t-max", "fid", "code_agreement"] and lines[1][2:] == lines[2][2:]
    assert lines[4] == ["1.5", "999", "0.1099", "0.5"] and len(lines) == 8
    assert lines[7] == "drawn from ckpt, step 7".split()
    assert Image.open(tmp_path / "sweep/sweep.png").size[0] > 900  # two panels beside each other
    assert drawn(["--cfg-scale", "1", "3", *COMMAND[4:]])[0] == [(3.0, 400), (3.0, 999)]
    assert len(json.loads((tmp_path / "sweep/sweep.json").read_text())["results"]) == 7
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["sweep.json", "sweep.png", "sweep.txt"]
    settings, said = drawn(["--cfg-scale", "4", *COMMAND[4:]], reference="another")
    assert "cfg-scale 4.0, t-max 400 has another reference than those before: give another --out" in said
    assert len(drawn(["--cfg-scale", "2", "--seeds", "0", "1", "--out", "seeds", *COMMAND[4:]])[0]) == 4
    settings, said = drawn([*COMMAND, "--vae", "mse"])
    assert not settings and "has other flags of sampling: ['--model', 'DiTSEM-Ti/4'] there" in said


def test_means_over_seeds():
    found = [(dict({"cfg-scale": 1.5}, seeds=seed), dict(fid=fid)) for seed, fid in enumerate((3.0, 5.0, 4.0))]
    rows = over_seeds([*found, ({"cfg-scale": 2.0}, dict(fid=7.0))])
    assert rows == [({"cfg-scale": 1.5}, dict(fid=[4, pytest.approx(3**-0.5)])), ({"cfg-scale": 2.0}, dict(fid=[7]))]
    lines = [line.split("  ") for line in table_of(rows).splitlines()]
    assert [line[-1].strip() for line in lines] == ["fid", "4 ± 0.5774", "7"]


def test_curves(tmp_path, monkeypatch):
    """A line may lack a metric, without a change of the others' colours; agreement has a line of chance."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: drawn.append(figure))
    agreement = dict(code_agreement=0.5, code_agreement_by_chance=0.1)
    found = [({"cfg-scale": scale, "sampler": "heun"}, agreement) for scale in (1.0, 2.0)]
    found += [({"cfg-scale": scale, "sampler": "ddpm"}, dict(fid=scale, **agreement)) for scale in (1.0, 2.0)]
    draw_curves(over_seeds(found), tmp_path / "sweep.png")
    of_fid, of_agreement = drawn[0].axes
    assert [len(line.get_xdata()) for line in of_fid.lines] == [0, 2]
    assert of_fid.lines[1].get_color() == of_agreement.lines[1].get_color()
    assert [*of_agreement.lines[2].get_ydata()] == [0.1, 0.1] and of_agreement.texts[0].get_text() == "chance"


def test_settings():
    assert all_settings({"cfg-scale": [1.5, 1.5]}) == [{"cfg-scale": 1.5}]
    unguided = {"cfg-scale": 1.0, "sampler": "heun"}
    assert drawn_as({"cfg-scale": 1.0, "t-min": 3, "sampler": "heun"}) == unguided
    assert drawn_as({"t-max": 400}) == {"t-max": 400}  # guided by the script's default
    scales = {"cfg-scale": [1.0, 1.5], "guide-ckpt": ["a"], "guide-scale": [1.0, 2.0], "internal-scale": [1.0, 3.0]}
    drawn = [drawn_as(setting) for setting in all_settings({**scales, "guide-t-max": [5]})]
    assert drawn == [
        {"cfg-scale": 1.0},
        {"cfg-scale": 1.0, "internal-scale": 3.0, "guide-t-max": 5},
        {"cfg-scale": 1.0, "guide-ckpt": "a", "guide-scale": 2.0, "guide-t-max": 5},
        {"cfg-scale": 1.5},
        {"cfg-scale": 1.5, "internal-scale": 3.0, "guide-t-max": 5},
    ]
    assert drawn_as({"guide-ckpt": "a", "guide-scale": 1.0}) == {"guide-ckpt": "a", "guide-scale": 1.0}
    assert folder_of({"cfg-scale": 1.5, "sampler": "dpmsolver++"}) == "cfg-scale-1.5_sampler-dpmsolverpp"
    assert folder_of({"guide-ckpt": "runs/small"}) == "guide-ckpt-runs-small"


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """(processes, script, flags) of each program that is launched; a stand-in writes what sweep reads of its files."""
    commands = []

    def launch(processes, script, flags, what):
        commands.append((processes, script.name, flags))
        if script.name.startswith("sample"):
            folder = tmp_path / flags[flags.index("--sample-dir") + 1]
            (folder / "set").mkdir(parents=True)
            (folder / "set.npz").write_bytes(b"")
            settings = dict(checkpoint=flags[flags.index("--ckpt") + 1], step=7)
            values = dict(metrics=dict(fid=2.0), code_agreement=dict(share=0.5, chance=0.1))
            values["samples"] = dict(sha256="0", settings=settings)
            (folder / "set.metrics.json").write_text(json.dumps(values))

    monkeypatch.setattr(sweep, "launch", launch)
    monkeypatch.chdir(tmp_path)
    return commands


def test_commands_of_a_setting(launched, tmp_path, monkeypatch):
    """What is launched: the sampling script with its flags and the setting, then evaluate.py; and what is read."""
    monkeypatch.setattr(sweep, "find_checkpoint", lambda args: tmp_path / args.results_dir / "newest")
    (tmp_path / "reference.npz").write_bytes(b"")
    own = "--cfg-scale 1.5 --reference reference.npz --agreement --processes 2 --discard --encoder sem --metrics fid is"
    sweep.main(f"{own} --dlc-dir codes -- --num-fid-samples 8 --results-dir runs".split())
    (result,) = json.loads((tmp_path / "sweep/sweep.json").read_text())["results"]
    assert result["metrics"] == dict(fid=2.0, code_agreement=0.5, code_agreement_by_chance=0.1)
    assert result["common"]["step"] == 7
    samples = "sweep/cfg-scale-1.5/set.npz"
    flags = ["--num-fid-samples", "8", "--ckpt", str(tmp_path / "runs/newest"), "--cfg-scale", "1.5"]
    flags += ["--sample-dir", "sweep/cfg-scale-1.5", "--part", "0/1"]
    assert launched == [
        (2, "sample_ddp_computed_dlc.py", flags),
        (2, "evaluate.py", [samples, "--reference", "reference.npz", "--metrics", "fid", "is"]),
        (2, "evaluate.py", ["agreement", samples, "--encoder", "sem", "--dlc-dir", "codes"]),
    ]
    assert [path.name for path in (tmp_path / "sweep/cfg-scale-1.5").iterdir()] == ["set.metrics.json"]  # --discard


def test_an_axis_of_ema_lengths(launched, tmp_path, monkeypatch):
    """Each length is rebuilt once, as of the checkpoint, and drawn from; the table names the checkpoint itself, also
    where a run was named, whose newest may be another by the next setting."""
    ckpt, made = tmp_path / "run/checkpoints/0000007", []
    ckpt.mkdir(parents=True)
    config = dict(format="dlc-dit", format_version=1, model="x", family="DiTSEM", arguments={}, process=None)
    (ckpt / "config.json").write_text(json.dumps(config))
    (ckpt / "meta.json").write_text('{"format_version": 1, "ema_images": 56}')

    def rebuild(args):
        made.append((args.run, args.length, args.at))
        args.out.mkdir()
        return ["rebuilt"]

    monkeypatch.setattr(sweep, "rebuild", rebuild)
    command = "--ema-length 0.05 0.1 --cfg-scale 1 2 --agreement".split()
    after = ["--", f"--ckpt={tmp_path / 'run'}", "--num-fid-samples", "4"]
    with pytest.raises(SystemExit):  # there are no snapshots
        sweep.main([*command, *after])
    assert not launched
    (tmp_path / "run/ema").mkdir()
    sweep.main([*command, "--discard", *after])
    assert made == [(tmp_path / "run", 0.05, 56), (tmp_path / "run", 0.1, 56)]
    drawn = [" ".join(flags) for _, script, flags in launched if script.startswith("sample")]
    names = [f"sweep/ema-{length}-at-56" for length in (0.05, 0.1)]
    pairs = [(name, scale) for name in names for scale in ("1.0", "2.0")]
    assert [words.split(" --sample")[0] for words in drawn] == [
        f"--num-fid-samples 4 --ckpt {name} --cfg-scale {scale}" for name, scale in pairs
    ]
    table = (tmp_path / "sweep/sweep.txt").read_text().splitlines()
    assert table[0].split()[:2] == ["ema-length", "cfg-scale"] and table[-1] == f"drawn from {ckpt}, step 7"
    assert not list((tmp_path / "sweep").glob("ema-0*"))


def test_a_program_that_fails(tmp_path):
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    words = "sampling ended with exit status 3 .see above."
    refusal(sweep.launch, 1, tmp_path / "fails.py", [], "sampling", words=words)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--cfg-scale 1", "nothing to measure: give --reference, --agreement or both"),
        ("--t-min 500 --t-max 400 --agreement", "t-min 500 is above t-max 400"),
        ("--cfg-scale 1 --agreement --script sample_ddp.py", "which sample_ddp.py does not draw"),
        ("--cfg-scale 1 --agreement --metrics fid", "--metrics goes with --reference"),
        ("--cfg-scale 1 --agreement --vae ema", "--vae sets up the ceiling, which needs images"),
        ("--cfg-scale 1 --agreement -- --cfg-scale 2", "--cfg-scale after -- is swept: give its values before --"),
        ("--cfg-scale 1 --seeds 0 1 --agreement -- --global-seed 2", "values before --, with --seeds"),
        ("--cfg-scale 1 1.5 --agreement -- --guide-ckpt x --guide-scale 2", "in the place of --cfg-scale: give one of"),
        ("--guide-scale 1.5 --agreement", "--guide-scale goes with --guide-ckpt"),
        ("--seeds 0 1 --agreement", "nothing to sweep: give values of one or more of --ema-length"),
        ("--cfg-scale 1 --agreement -- --sample-dir=x", "--sample-dir after -- is for sweep to choose"),
        ("--ema-length 0.07 --agreement -- --no-ema", "--no-ema after -- asks for the raw weights, and --ema-length"),
        ("--cfg-scale 1 --agreement -- --modle x", "unrecognized arguments: --modle x"),
    ],
)
def test_wrong_flags(flags, message, error_of, tmp_path):
    assert message in error_of("evaluate", "sweep", *flags.split())
    assert not list(tmp_path.iterdir())  # nothing is begun
