"""evaluate.py sweep: which settings are drawn, that none is drawn twice, the table and the plot, and wrong flags."""

import contextlib
import json

import pytest
from conftest import refusal
from matplotlib.figure import Figure
from PIL import Image

from evaluation import sweep
from evaluation.sweep import all_settings, draw_curves, drawn_as, folder_of, over_seeds, table_of

COMMAND = "--cfg-scale 1 1.5 2 --t-max 400 999 --agreement -- --ckpt x --num-fid-samples 8".split()


def value_of(flags, name):
    return flags[flags.index(name) + 1] if name in flags else None


@pytest.fixture
def drawn_by(tmp_path, monkeypatch, capsys):
    """drawn_by(words…): what a sweep launches, as (script, its flags), and what it says. A stand-in for the programs
    writes what sweep reads of their files; its launch number fail_at ends like a program that failed."""
    monkeypatch.chdir(tmp_path)

    def run(*words, fail_at=None, reference="one"):
        launched = []

        def launch(processes, script, flags, what):
            if len(launched) == fail_at:
                raise ValueError(f"{what} ended with exit status 1")
            launched.append((f"{processes} x {script.name}", flags))
            if script.name.startswith("sample"):
                folder = tmp_path / value_of(flags, "--sample-dir")
                (folder / "set").mkdir(parents=True)
                (folder / "set.npz").write_bytes(b"")
                seeded = dict(sha256=f"of seed {value_of(flags, '--global-seed')}")
                settings = dict(checkpoint=value_of(flags, "--ckpt"), step=7, conditions=seeded)
                fid = (float(value_of(flags, "--cfg-scale")) - 1.6) ** 2 + int(value_of(flags, "--t-max") or 999) / 1e4
                values = dict(samples=dict(sha256="0", settings=settings), metrics=dict(fid=round(fid, 4)))
                agreement = dict(share=0.5, chance=0.1)
                content = dict(**values, reference=reference, code_agreement=agreement)
                (folder / "set.metrics.json").write_text(json.dumps(content))

        monkeypatch.setattr(sweep, "launch", launch)
        monkeypatch.setattr(sweep, "find_checkpoint", lambda args: tmp_path / args.results_dir / "newest")
        with contextlib.suppress(SystemExit):
            sweep.main([str(word) for word in words])
        return launched, "".join(capsys.readouterr())

    return run


def settings_in(launched):
    sampled = [flags for name, flags in launched if "sample" in name]
    return [tuple(value_of(flags, name) for name in ("--cfg-scale", "--t-max")) for flags in sampled]


def test_a_stopped_sweep_continues(drawn_by, tmp_path):
    """Finished settings are not repeated, values may be added, and unguided settings are drawn once."""
    launched, said = drawn_by(*COMMAND, fail_at=4)  # the first two settings are two programs each
    assert settings_in(launched) == [("1.0", None), ("1.5", "400")]
    assert "ended with exit status 1; finished settings are kept: run the same command again" in said
    launched, said = drawn_by(*COMMAND)
    assert settings_in(launched) == [("1.5", "999"), ("2.0", "400"), ("2.0", "999")]
    table = (tmp_path / "sweep/sweep.txt").read_text()
    assert table in said and "look at sweep/sweep.png" in said
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["cfg-scale", "t-max", "fid", "code_agreement"] and lines[1][2:] == lines[2][2:]
    assert lines[4] == ["1.5", "999", "0.1099", "0.5"] and len(lines) == 8
    assert lines[7] == "drawn from x, step 7".split()
    assert Image.open(tmp_path / "sweep/sweep.png").size[0] > 900  # two panels beside each other
    assert settings_in(drawn_by("--cfg-scale", 1, 3, *COMMAND[4:])[0]) == [("3.0", "400"), ("3.0", "999")]
    assert len(json.loads((tmp_path / "sweep/sweep.json").read_text())["results"]) == 7
    files = [path.name for path in (tmp_path / "sweep").iterdir() if path.is_file()]
    assert sorted(files) == ["sweep.json", "sweep.png", "sweep.txt"]
    launched, said = drawn_by("--cfg-scale", 4, *COMMAND[4:], reference="another")
    assert "cfg-scale 4.0, t-max 400 has another reference than those before: give another --out" in said
    assert len(settings_in(drawn_by("--cfg-scale", 2, "--seeds", 0, 1, "--out", "seeds", *COMMAND[4:])[0])) == 4
    launched, said = drawn_by(*COMMAND, "--vae", "mse")
    assert not launched and "has other flags of sampling: ['--ckpt', 'x', '--num-fid-samples', '8'] there" in said


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


def test_commands_of_a_setting(drawn_by, tmp_path):
    """What is launched: the sampling script with its flags and the setting, then evaluate.py; and what is read."""
    (tmp_path / "reference.npz").write_bytes(b"")
    own = "--cfg-scale 1.5 --reference reference.npz --agreement --processes 2 --discard --encoder sem --metrics fid is"
    launched, _ = drawn_by(*f"{own} --dlc-dir codes -- --num-fid-samples 8 --results-dir runs".split())
    (result,) = json.loads((tmp_path / "sweep/sweep.json").read_text())["results"]
    assert result["metrics"] == dict(fid=0.1099, code_agreement=0.5, code_agreement_by_chance=0.1)
    assert result["common"]["step"] == 7
    samples = "sweep/cfg-scale-1.5/set.npz"
    flags = ["--num-fid-samples", "8", "--ckpt", str(tmp_path / "runs/newest"), "--cfg-scale", "1.5"]
    flags += ["--sample-dir", "sweep/cfg-scale-1.5", "--part", "0/1"]
    assert launched == [
        ("2 x sample_ddp_computed_dlc.py", flags),
        ("2 x evaluate.py", [samples, "--reference", "reference.npz", "--metrics", "fid", "is"]),
        ("2 x evaluate.py", ["agreement", samples, "--encoder", "sem", "--dlc-dir", "codes"]),
    ]
    assert [path.name for path in (tmp_path / "sweep/cfg-scale-1.5").iterdir()] == ["set.metrics.json"]  # --discard


def test_an_axis_of_ema_lengths(drawn_by, tmp_path, monkeypatch):
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
    launched, said = drawn_by(*command, *after)
    assert not launched and "is no checkpoint of a run that was trained with --ema-lengths" in said
    (tmp_path / "run/ema").mkdir()
    launched, _ = drawn_by(*command, "--discard", *after)
    assert made == [(tmp_path / "run", 0.05, 56), (tmp_path / "run", 0.1, 56)]
    drawn = [" ".join(flags) for name, flags in launched if "sample" in name]
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
        ("--t-min 500 --t-max 400 --agreement", "--t-min 500 is above --t-max 400"),
        ("--cfg-scale 1 --agreement --script sample_ddp.py", "which sample_ddp.py does not draw"),
        ("--cfg-scale 1 --agreement --metrics fid", "--metrics goes with --reference"),
        ("--cfg-scale 1 --agreement --vae ema", "--vae sets up the ceiling, which needs images"),
        ("--cfg-scale 1 --agreement -- --cfg-scale 2", "after -- is for sweep to choose: give its values before --"),
        ("--cfg-scale 1 --seeds 0 1 --agreement -- --global-seed 2", "values before --, with --seeds"),
        ("--cfg-scale 1 1.5 --agreement -- --guide-ckpt x --guide-scale 2", "in the place of --cfg-scale: give one of"),
        ("--guide-scale 1.5 --agreement", "--guide-scale goes with --guide-ckpt"),
        ("--seeds 0 1 --agreement", "nothing to sweep: give values of one or more of --ema-length"),
        ("--cfg-scale 1 --agreement -- --sample-dir=x", "--sample-dir after -- is for sweep to choose"),
        ("--ema-length 0.07 --agreement -- --no-ema", "--no-ema after -- is for sweep to choose"),
        ("--cfg-scale 1 --agreement -- --modle x", "unrecognized arguments: --modle x"),
    ],
)
def test_wrong_flags(flags, message, error_of, tmp_path):
    assert message in error_of("evaluate", "sweep", *flags.split())
    assert not list(tmp_path.iterdir())  # nothing is begun
