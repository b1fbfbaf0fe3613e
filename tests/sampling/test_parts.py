"""--part: launches that share a set without a launcher, as the tasks of a job array do; at once, killed, repeated."""

import json

import pytest
from conftest import extract_command, refusal, sample_folder
from forked import Run
from test_extract import contents
from test_features import MANIFEST, shard
from test_sample_killed import FLAGS
from tiny_prior import save_prior

from dlc.data import FeatureWriter
from dlc.machine.part import WHOLE, Part, asked_part
from dlc.sampling.code_folder import SHARD, CodesRecord
from dlc.sampling.conditions import PriorCodes
from dlc.sampling.pictures import npz_rows

SAMPLE = ("sample_ddp_computed_dlc", *FLAGS)  # 6 images in 3 batches


@pytest.mark.parametrize(
    "variables, part",
    [
        ({}, WHOLE),
        (dict(ARRAY_TASK_ID="7", ARRAY_TASK_COUNT="3", ARRAY_TASK_MIN="3", ARRAY_TASK_STEP="2"), Part(2, 3)),
        (dict(NTASKS="4", STEP_NUM_TASKS="4", PROCID="3"), Part(3, 4)),
        (dict(NTASKS="4", PROCID="0"), WHOLE),  # the batch script itself
        (dict(NTASKS="4", STEP_NUM_TASKS="1", PROCID="0", STEP_ID="4294967290"), WHOLE),  # salloc's shell, a step
        (dict(ARRAY_TASK_ID="1", ARRAY_TASK_COUNT="2", STEP_NUM_TASKS="4", PROCID="3"), Part(7, 8)),
    ],
)
def test_the_part_that_slurm_says(monkeypatch, variables, part):
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert asked_part(None) == part and asked_part(Part(1, 2)) == Part(1, 2)
    monkeypatch.setenv("RANK", "0")  # a launcher has joined the tasks
    assert asked_part(None).count == int(variables.get("ARRAY_TASK_COUNT", 1))


def test_mistaken_parts(monkeypatch, error_of):
    for text in ("3/3", "1", "-1/3", "1/0"):
        assert f"argument --part: {text}: wanted i/n" in error_of("sample_ddp", f"--part={text}")
    for name, value in dict(ID=9, COUNT=3, MIN=1).items():  # --array=1,4,9
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert "SLURM_ARRAY_TASK_ID is 9, one of 3 tasks that are not evenly spaced" in error_of("sample_ddp")


def outputs(root):
    """The bytes of pictures, codes and sets."""
    return {path.name: path.read_bytes() for path in root.rglob("*") if path.suffix in (".png", ".npy", ".npz")}


@pytest.mark.slow
def test_samples(workplace, tmp_path):
    def start(name, *flags, script=SAMPLE, into="samples", **environment):
        script, *words = script
        words += [*flags, "--sample-dir", tmp_path / into]
        return Run(script, words, tmp_path / f"{name}.txt", cwd=workplace, environment=environment)

    array = dict(SLURM_ARRAY_TASK_COUNT="3", SLURM_ARRAY_TASK_MIN="10", SLURM_ARRAY_TASK_ID="12")
    killed = start("1", "--part", "1/3", script=("faulty", "signalled,SIGKILL,000003.png,1", *SAMPLE))
    whole, others = start("whole", into="whole"), [start("0", "--part", "0/3"), start("2", **array)]
    killed.dies()
    for run in (whole, *others):
        assert run.wait(), run.said()
    assert all("images are left to other parts" in run.said() for run in others)
    assert "part 2/3 of the images, by SLURM_ARRAY_TASK_ID" in others[1].said()
    assert not list((tmp_path / "samples").glob("*.npz"))
    folder = sample_folder(tmp_path / "samples")
    (folder / ".lock.1-of-7").write_bytes(b"")  # of another division, killed
    drawn = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    runs = [start(f"again {number}", "--part", "1/3") for number in range(2)]  # of the part that is missing
    for run in runs:
        assert run.wait() and "done: 6 images" in run.said(), run.said()
    assert all(path.stat().st_mtime_ns == when for path, when in drawn.items())
    assert outputs(tmp_path / "samples") == outputs(tmp_path / "whole")
    assert npz_rows(next(tmp_path.glob("samples/*.npz"))) == 6 and not list(tmp_path.rglob(".*"))
    assert [run["part"] for run in json.loads((folder / "samples.json").read_text())["runs"]].count("1/3") == 2


@pytest.mark.slow
def test_samples_of_a_prior(workplace, monkeypatch, said_by, tmp_path):
    for place in ("data.codes", "sampling.code_folder", "sampling.prior_draw", "sampling.conditions"):
        monkeypatch.setattr(f"dlc.{place}.SHARD", 4)
    monkeypatch.setattr(PriorCodes, "block", 4)
    monkeypatch.chdir(workplace)
    flags = ["--model", "DiTSEM-Ti/4", "--prior", save_prior(tmp_path / "prior"), "--num-fid-samples", 6]
    flags += ["--num-sampling-steps", 2, "--per-proc-batch-size", 3, "--sample-dir"]
    for name, *part in (("whole",), ("parts", "--part", "1/2"), ("parts", "--part", "0/2")):
        said = said_by("sample_ddp_computed_dlc", *flags, tmp_path / name, *part)
        assert ("4 images are left to other parts" in said) == ("1/2" in part)
    whole, parts = outputs(tmp_path / "whole"), outputs(tmp_path / "parts")
    assert len(whole) == 6 + 4 and whole == parts  # two files of codes, the .npz and the contact sheet


@pytest.mark.slow
def test_features(features, images, tiny_models, tmp_path):
    words = extract_command("", 1, images, tmp_path / "parts", tiny_models)[3:]

    def start(number, fault=None):
        return Run("extract_features_withdlc", (*words, "--part", f"{number}/3"), tmp_path / f"{number}", fault=fault)

    runs = [start(number) for number in (0, 2)]
    for run in runs:
        assert run.wait() and "shards are left to other parts" in run.said(), run.said()
    start(1, "signalled,SIGKILL,manifest.json,1").dies()
    assert not (tmp_path / "parts/manifest.json").exists()
    last = start(0)
    assert last.wait(), last.said()
    assert contents(tmp_path / "parts") == contents(features)
    left = {path.name for path in features.iterdir() if path.suffix != ".txt"}
    assert {path.name for path in (tmp_path / "parts").iterdir()} == left


def test_codes(said_by, tmp_path):
    prior, num = save_prior(tmp_path / "prior"), 2 * SHARD + 10

    def draw(out, *flags):
        return said_by("sample_prior", "--ckpt", prior, "--num-codes", num, "--out", tmp_path / out, *flags)

    draw("whole")
    for left in (1, 0):
        assert f"{left} of 3 shards to draw" in (said := draw("parts", "--part", "1/2")) and "2 shards are left" in said
    assert f"done: {num} codes" in (said := draw("parts", "--part", "0/2")) and "these codes" in said
    records = [CodesRecord.read(tmp_path / name / "codes.json") for name in ("whole", "parts")]
    assert records[0].codes_sha256 == records[1].codes_sha256 is not None and records[0].usage == records[1].usage
    assert [(run["part"], run["shards"]) for run in records[1].runs] == [("1/2", 1), ("0/2", 2)]
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {*map("{:06d}.npy".format, range(3)), "codes.json"}


def test_launches_that_make_the_same_are_kept_apart(monkeypatch, tmp_path):
    """Of one part, and of two divisions. What a part leaves on its way is safe from those who come and go."""
    monkeypatch.setattr("dlc.machine.files.LOCK_PATIENCE", 0.1)
    first, other, third = (FeatureWriter(tmp_path, MANIFEST, Part(index, 2)) for index in (0, 1, 1))  # one shard
    assert first.start()
    for part in (Part(0, 2), WHOLE, Part(1, 3)):
        refusal(FeatureWriter(tmp_path, MANIFEST, part).start, words="another process is writing to")
    half = first.folder("features") / f".000000.npy.{'0' * 32}.tmp"
    half.write_bytes(b"half")
    assert other.start() and other.finish(1) is None and other.left_over == [0] and half.exists()
    first.write(0, shard(3), [])
    assert third.start() and third.finish(1).count == 3 and half.exists() and (tmp_path / "progress").exists()
    assert first.finish(1).count == 3 and not half.exists() and not (tmp_path / "progress").exists()
    assert not list(tmp_path.glob(".*"))
