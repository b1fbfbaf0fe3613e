"""--part: launches that share a set without a launcher, as the tasks of a job array do; at once, killed, repeated."""

import json
import threading

import numpy as np
import pytest
from conftest import extract_command, launch, refusal, sample_folder
from forked import Run
from test_extract import contents
from test_sample_killed import FLAGS
from tiny_prior import save_prior

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
        (dict(ARRAY_TASK_ID="5", ARRAY_TASK_COUNT="1", ARRAY_TASK_MIN="5", STEP_NUM_TASKS="1", PROCID="0"), WHOLE),
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
    for text in ("3/3", "1", "-1/3", "1/0", "a/b"):
        assert f"argument --part: {text}: wanted i/n" in error_of("sample_ddp", f"--part={text}")
    for name, value in dict(ID=9, COUNT=3, MIN=1).items():  # --array=1,4,9
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert "SLURM_ARRAY_TASK_ID is 9, one of 3 tasks that are not evenly spaced" in error_of("sample_ddp")


def test_every_number_is_of_one_part():
    shares = [Part(index, 4).share(range(50), block=3) for index in range(4)]
    assert sorted(sum(shares, [])) == list(range(50)) and shares[1][:6] == [3, 4, 5, 15, 16, 17]


def outputs(root):
    """The bytes of pictures, codes and sets."""
    return {path.name: path.read_bytes() for path in root.rglob("*") if path.suffix in (".png", ".npy", ".npz")}


@pytest.mark.slow
def test_samples(workplace, tmp_path):
    def start(name, *flags, script=SAMPLE, **environment):
        script, *words = script
        output, flags = tmp_path / f"{name}.txt", [*words, *flags, "--sample-dir", tmp_path / "samples"]
        return Run(script, flags, output, cwd=workplace, environment=environment)

    whole = Run(*SAMPLE[:1], [*SAMPLE[1:], "--sample-dir", tmp_path / "whole"], tmp_path / "whole.txt", cwd=workplace)
    array = dict(SLURM_ARRAY_TASK_COUNT="3", SLURM_ARRAY_TASK_MIN="10", SLURM_ARRAY_TASK_ID="12")
    killed = start("1", "--part", "1/3", script=("faulty", "signalled,SIGKILL,000003.png,1", *SAMPLE))
    others = [start("0", "--part", "0/3"), start("2", **array)]
    killed.dies()
    for run in (whole, *others):
        assert run.wait(), run.said()
    npz = next((tmp_path / "whole").glob("*.npz"))
    for run in others:
        assert "images are left to other parts" in run.said()
    assert "part 2/3 of the images, by SLURM_ARRAY_TASK_ID" in others[1].said()
    assert not list((tmp_path / "samples").glob("*.npz"))
    folder = sample_folder(tmp_path / "samples")
    (folder / ".lock.1-of-7").write_bytes(b"")  # of another division, killed
    drawn = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    runs = [start(f"again {number}", "--part", f"{number}/3") for number in (0, 1, 1)]
    for run in runs:
        assert run.wait(), run.said()
    assert sum("done: 6 images" in run.said() for run in runs) >= 2  # both launches of the part that was missing
    assert all(path.stat().st_mtime_ns == when for path, when in drawn.items())
    assert outputs(tmp_path / "samples") == outputs(tmp_path / "whole")
    assert npz_rows(npz) == 6 and not list(tmp_path.rglob(".*"))
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
    command = extract_command("", 1, images, tmp_path / "parts", tiny_models)[2:]
    flags = [(*command[1:], "--part", f"{number}/3") for number in range(3)]
    runs = [Run("extract_features_withdlc", flags[number], tmp_path / f"{number}.txt") for number in (0, 2)]
    for run in runs:
        assert run.wait(), run.said()
        assert "shards are left to other parts" in run.said()
    Run("faulty", ["signalled,SIGKILL,manifest.json,1", "extract_features_withdlc", *flags[1]], tmp_path / "1").dies()
    assert not (tmp_path / "parts/manifest.json").exists()
    launch(("forked", 1, "extract_features_withdlc.py", *flags[0]), tmp_path)
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
    assert records[0].codes_sha256 == records[1].codes_sha256 and records[0].usage == records[1].usage
    assert [(run["part"], run["shards"]) for run in records[1].runs] == [("1/2", 1), ("0/2", 2)]
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {*map("{:06d}.npy".format, range(3)), "codes.json"}


def test_launches_that_make_the_same_are_kept_apart(monkeypatch, tmp_path):
    """Of one part, and of two divisions. What a part leaves on its way is safe from those who come and go."""
    from test_features import MANIFEST, shard

    from dlc.data import FeatureWriter

    monkeypatch.setattr("dlc.machine.files.LOCK_PATIENCE", 0.1)
    manifest = MANIFEST  # of one shard
    first = FeatureWriter(tmp_path, manifest, Part(0, 2))
    assert first.start()
    for part in (Part(0, 2), WHOLE, Part(1, 3)):
        refusal(FeatureWriter(tmp_path, manifest, part).start, words="another process is writing to")
    half = first.folder("features") / f".000000.npy.{'0' * 32}.tmp"
    half.write_bytes(b"half")
    other = FeatureWriter(tmp_path, manifest, Part(1, 2))
    assert other.start() and other.finish(1) is None and other.left_over == [0] and half.exists()
    first.write(0, shard(3), [])
    third = FeatureWriter(tmp_path, manifest, Part(1, 2))
    assert third.start() and third.finish(1).count == 3 and half.exists() and (tmp_path / "progress").exists()
    results = []
    threads = [threading.Thread(target=lambda: results.append(first.finish(1)))]
    for thread in threads:
        thread.start()
        thread.join()
    assert results[0].count == 3 and not half.exists() and not (tmp_path / "progress").exists()
    assert not list(tmp_path.glob(".*")) and np.load(first.shard_path("labels", 0)).shape == (3,)
