"""sample_ddp_computed_dlc.py and sample_ddp.py through their launchers; commands chained by their defaults."""

import json
import shutil
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import IMAGE_SIZE, SAMPLE_FLAGS, L, V, launch, sample_folder, save_checkpoint
from PIL import Image

import sample_ddp_computed_dlc
from diffusion import create_diffusion
from dlc.data import Features
from dlc.machine.noise import Stream, normal
from models import DiT_models

pytestmark = pytest.mark.slow


def read_npz(root):
    (path,) = root.glob("*.npz")
    with np.load(path) as archive:
        assert archive.files == ["arr_0"]
        return archive["arr_0"]


def test_what_sampling_leaves(workplace, tiny_models):
    folder = sample_folder(workplace / "samples")
    assert folder.name == f"DiTSEM-Ti-4-0000003-size-{IMAGE_SIZE}-vae-{tiny_models[0].name}-cfg-1.5-seed-0"
    assert sorted(path.name for path in folder.glob("*.png")) == [f"{index:06d}.png" for index in range(21)]
    array = read_npz(workplace / "samples")
    assert array.shape == (21, IMAGE_SIZE, IMAGE_SIZE, 3) and array.dtype == np.uint8
    for index in range(21):
        np.testing.assert_array_equal(array[index], Image.open(folder / f"{index:06d}.png"))
    assert Image.open(workplace / f"samples/{folder.name}.grid.png").size == (8 * IMAGE_SIZE, 3 * IMAGE_SIZE)
    record = json.loads((folder / "samples.json").read_text())
    assert record["checkpoint"] == str(workplace / "results/checkpoints/0000003")
    conditions = dict(kind="codes", source=str(workplace / "features"), count=14, order="random", L=L, V=V)
    assert conditions.items() <= record["conditions"].items() and len(record["conditions"]["sha256"]) == 64
    assert len(record["weights_sha256"]) == 64 and record["weights"] == "ema" and record["step"] == 3
    assert [
        record[key]
        for key in (
            "sampler",
            "num_sampling_steps",
            "cfg_scale",
            "cfg_channels",
            "t_min",
            "t_max",
            "precision",
            "vae_precision",
            "num_fid_samples",
        )
    ] == ["ddpm", 3, 1.5, 4, 0, 999, "fp32", "fp32", 21]
    assert record["vae"] == str(tiny_models[0]) and len(record["vae_sha256"]) == 64
    (run,) = record["runs"]
    assert run["images"] == 21 and "DiTSEM-Ti/4" in run["command"] and run["versions"]["numpy"] == np.__version__
    # every row before any twice
    assert sorted(record["code_rows"][:14]) == list(range(14))
    assert record["code_rows"][14:] == record["code_rows"][:7]


def test_images_are_the_models(workplace, tiny_models):
    """Sample 17 by the definition: full guided diffusion with its own noise, the EMA weights, and its row's code."""
    from safetensors.torch import load_file

    from dlc.data.images import to_uint8
    from dlc.nets.vae import decode
    from dlc.weights.networks import load_vae

    record = json.loads((sample_folder(workplace / "samples") / "samples.json").read_text())
    code = torch.from_numpy(Features(workplace / "features").codes.gather([record["code_rows"][17]]).astype(np.int64))
    model = DiT_models["DiTSEM-Ti/4"](input_size=8, L=L, V=V).eval()
    model.load_state_dict(load_file(workplace / "results/checkpoints/0000003/ema.safetensors"))
    draws = iter([0, 3, 2, 1])  # x_T, then a draw for each step from the last
    index = torch.tensor([17])
    guided = create_diffusion("3").p_sample_loop(
        model.forward_with_cfg,
        (2, 4, 8, 8),
        clip_denoised=False,
        device="cpu",
        model_kwargs=dict(y=torch.cat([code, torch.full_like(code, V)]), cfg_scale=1.5),
        randn_like=lambda x: normal(0, Stream.SAMPLE_NOISE, index, (4, 8, 8), draw=next(draws)).repeat(2, 1, 1, 1),
    )
    vae = load_vae(tiny_models[0])
    with torch.no_grad():
        image = to_uint8(decode(vae, guided[:1]))[0].numpy().astype(int)
    assert np.abs(image - read_npz(workplace / "samples")[17]).max() <= 1


@pytest.mark.parametrize("launcher, processes, batch", [("torchrun", 2, 4), ("forked", 3, 5), ("forked", 1, 8)])
def test_processes_and_batch_size_do_not_matter(workplace, tmp_path, launcher, processes, batch):
    result = launch(
        (
            launcher,
            processes,
            "sample_ddp_computed_dlc.py",
            "--model",
            "DiTSEM-Ti/4",
            *SAMPLE_FLAGS,
            "--per-proc-batch-size",
            batch,
            "--sample-dir",
            tmp_path / "samples",
            "--ckpt",
            "results/checkpoints/0000003",
            "--dlc-dir",
            "features",
        ),
        workplace,
    )
    assert "21 of 21 images to draw" in result.stdout
    here, there = (read_npz(root).astype(int) for root in (tmp_path / "samples", workplace / "samples"))
    assert np.abs(here - there).max() <= 1
    assert (here != there).mean() < 1e-3
    rows = [
        json.loads((sample_folder(root) / "samples.json").read_text())["code_rows"]
        for root in (tmp_path / "samples", workplace / "samples")
    ]
    assert rows[0] == rows[1]


def test_the_same_command_again_draws_what_is_missing(workplace):
    """Images that are gone, cut short or empty are drawn again and the .npz is written anew; then nothing is to do."""
    shutil.copytree(workplace / "samples", workplace / "again")
    folder = sample_folder(workplace / "again")
    whole = (folder / "000004.png").read_bytes()
    (folder / "000004.png").write_bytes(whole[:-20])
    (folder / "000011.png").write_bytes(b"")
    (folder / "000019.png").unlink()
    (npz,) = (workplace / "again").glob("*.npz")
    npz.write_bytes(npz.read_bytes().replace(np.array(Image.open(folder / "000002.png")).tobytes()[:99], bytes(99)))
    (folder / f".000019.png.{'0' * 32}.tmp").write_text("of a process that was killed")
    other = workplace / "again" / f".{folder.name}0.npz.{'0' * 32}.tmp"  # what seed 10 is about to write
    other.write_text("")
    command = (
        "forked",
        1,
        "sample_ddp_computed_dlc.py",
        "--model",
        "DiTSEM-Ti/4",
        *SAMPLE_FLAGS,
        "--sample-dir",
        "again",
    )
    assert "3 of 21 images to draw" in launch(command, workplace).stdout
    difference = np.abs(read_npz(workplace / "again").astype(int) - read_npz(workplace / "samples"))
    assert difference.max() <= 1
    assert other.is_file() and not list(folder.glob(".*"))
    runs = json.loads((folder / "samples.json").read_text())["runs"]
    assert [run["images"] for run in runs] == [21, 3]
    written = npz.stat().st_mtime_ns
    assert "0 of 21 images to draw" in launch(command, workplace).stdout
    assert npz.stat().st_mtime_ns == written
    assert len(json.loads((folder / "samples.json").read_text())["runs"]) == 2
    more = launch((*command, "--num-fid-samples", 23), workplace)
    assert "2 of 23 images to draw" in more.stdout and read_npz(workplace / "again").shape[0] == 23


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_drawn_again_has_the_same_bytes(workplace, rounded, tmp_path, processes):
    """Wherever in its batch it lies, and whichever others are missing."""
    command = (
        "forked",
        processes,
        "sample_ddp_computed_dlc.py",
        "--model",
        "DiTSEM-Ti/4",
        *SAMPLE_FLAGS,
        "--per-proc-batch-size",
        6,
        "--sample-dir",
        tmp_path,
    )
    launch(command, workplace)
    folder = sample_folder(tmp_path)
    whole = {path: path.read_bytes() for path in [*folder.glob("*.png"), *tmp_path.glob("*.npz")]}
    missing = (2, 3, 7, 12, 20)
    for index in missing:
        (folder / f"{index:06d}.png").unlink()
    there = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert f"{len(missing)} of 21 images to draw" in launch(command, workplace).stdout
    assert {path: path.read_bytes() for path in whole} == whole
    assert all(path.stat().st_mtime_ns == drawn for path, drawn in there.items())


def test_codes_that_changed_are_noticed(workplace, monkeypatch, capsys):
    """One code of those drawn is another now, and more are asked for."""
    monkeypatch.chdir(workplace)
    codes = np.random.default_rng(0).integers(0, V, (80, L))
    np.save("changing.npy", codes)
    command = [
        "--model",
        "DiTSEM-Ti/4",
        "--dlc-dir",
        "changing.npy",
        "--num-sampling-steps",
        2,
        "--sample-dir",
        "changing",
        "--cfg-scale",
        1,
        "--dlc-order",
        "sequential",
        "--num-fid-samples",
    ]
    launch(("forked", 1, "sample_ddp_computed_dlc.py", *command, 70), workplace)
    codes[70] = (codes[70] + 1) % V
    np.save("changing.npy", codes)  # not drawn yet
    assert "5 of 75" in launch(("forked", 1, "sample_ddp_computed_dlc.py", *command, 75), workplace).stdout
    codes[68] = (codes[68] + 1) % V
    np.save("changing.npy", codes)
    monkeypatch.setattr(sys, "argv", ["sample", *map(str, command), "80"])
    with pytest.raises(SystemExit):
        sample_ddp_computed_dlc.main()
    assert "conditions.sha256 " in capsys.readouterr().err


def test_a_set_of_other_weights_or_of_more_samples_is_kept(workplace, monkeypatch, capsys):
    """The same command after training anew at the same path must not pass old samples off as the new model's."""
    shutil.copytree(workplace / "results", workplace / "anew/results")
    shutil.copytree(workplace / "samples", workplace / "anew/samples")
    path = workplace / "anew/results/checkpoints/0000003/ema.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["sem_embedder.embedding_table"] += 1
    safetensors.torch.save_file(weights, path)
    monkeypatch.chdir(workplace / "anew")
    for flags, message in (
        (SAMPLE_FLAGS, "weights_sha256 "),
        (("--num-fid-samples", 5, *SAMPLE_FLAGS[2:]), "is a set of 21 samples"),
    ):
        monkeypatch.setattr(sys, "argv", ["sample", "--model", "DiTSEM-Ti/4", *map(str, flags)])
        with pytest.raises(SystemExit) as stopped:
            sample_ddp_computed_dlc.main()
        assert stopped.value.code == 2 and message in capsys.readouterr().err
        shutil.copytree(workplace / "results", workplace / "anew/results", dirs_exist_ok=True)


def test_other_settings_are_refused(workplace, monkeypatch, capsys):
    """Every flag that decides the images, into the folder of another value: one line that names the difference."""
    monkeypatch.chdir(workplace)
    for flags, message in (
        (("--sampler", "ddim"), "sampler 'ddpm' there, 'ddim' here"),
        (("--no-ema",), "weights_sha256 "),
        (("--t-min", 1), "t_min 0 there, 1 here"),
        (("--t-max", 998), "t_max 999 there, 998 here"),
        (("--cfg-channels", 3), "cfg_channels 4 there, 3 here"),
        (("--precision", "bf16"), "precision 'fp32' there, 'bf16' here"),
        (("--no-tf32",), "tf32 True there"),
        (("--vae-precision", "bf16"), "vae_precision 'fp32' there"),
        (("--dlc-order", "sequential"), "conditions.order 'random' there, 'sequential' here"),
    ):
        monkeypatch.setattr(sys, "argv", ["sample", "--model", "DiTSEM-Ti/4", *map(str, (*SAMPLE_FLAGS, *flags))])
        with pytest.raises(SystemExit) as stopped:
            sample_ddp_computed_dlc.main()
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and message in said and said.count("\n") == 1
    folder = sample_folder(workplace / "samples")
    shutil.copytree(folder, workplace / "without/samples" / folder.name)
    (workplace / "without/samples" / folder.name / "samples.json").unlink()
    monkeypatch.setattr(
        sys, "argv", ["sample", "--model", "DiTSEM-Ti/4", *map(str, SAMPLE_FLAGS), "--sample-dir", "without/samples"]
    )
    with pytest.raises(SystemExit):
        sample_ddp_computed_dlc.main()
    assert "holds samples but no samples.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ("--sampler", "ddim", "--eta", 0.3),
        ("--sampler", "heun"),
        ("--sampler", "dpmsolver++", "--precision", "bf16", "--vae-precision", "bf16"),
    ],
)
def test_a_strip_of_the_denoising(workplace, tmp_path, flags):
    """As many pictures as asked for, the last of which is sample 0; and a grid from the first batch on."""
    launch(
        (
            "forked",
            1,
            "sample_ddp_computed_dlc.py",
            "--model",
            "DiTSEM-Ti/4",
            *SAMPLE_FLAGS,
            "--num-fid-samples",
            2,
            "--num-sampling-steps",
            6,
            "--progressive",
            4,
            *flags,
            "--sample-dir",
            tmp_path,
        ),
        workplace,
    )
    (path,) = tmp_path.glob("*.progressive.png")
    strip = np.array(Image.open(path)).astype(int)
    assert strip.shape == (IMAGE_SIZE, 4 * IMAGE_SIZE, 3)
    first = np.array(Image.open(sample_folder(tmp_path) / "000000.png")).astype(int)
    difference = np.abs(strip[:, -IMAGE_SIZE:] - first)
    assert (difference.max() <= 1) if "bf16" not in flags else (difference.mean() < 2)
    assert np.abs(strip[:, :IMAGE_SIZE] - first).mean() > 2 * difference.mean()


def test_class_conditional_sampling(workplace):
    """Random labels, and each class equally often."""
    for sampling, labels in (("random", {0, 1}), ("equal", [0, 1] * 10 + [0])):
        launch(
            (
                "torchrun" if sampling == "random" else "forked",
                1,
                "sample_ddp.py",
                "--model",
                "DiT-Ti/4",
                *SAMPLE_FLAGS,
                "--results-dir",
                "results_dit",
                "--sample-dir",
                f"dit_{sampling}",
                "--cfg-scale",
                1,
                "--label-sampling",
                sampling,
            ),
            workplace,
        )
        assert read_npz(workplace / f"dit_{sampling}").shape == (21, IMAGE_SIZE, IMAGE_SIZE, 3)
        record = json.loads((sample_folder(workplace / f"dit_{sampling}") / "samples.json").read_text())
        assert type(labels)(record["labels"]) == labels and record["cfg_channels"] == 3


def test_sampling_for_vectors(tiny_models, tmp_path):
    """A DiTCONT draws for the rows of --condition-path, the same by two processes, and by Heun's method; and is refused
    vectors that changed."""
    path = save_checkpoint(
        tmp_path / "results/checkpoints/0000001", "DiTCONT-Ti/4", vae=tiny_models[0], sizes=dict(in_dim=5)
    )
    weights = safetensors.torch.load_file(path / "ema.safetensors")
    generator = torch.Generator().manual_seed(0)
    safetensors.torch.save_file(
        {
            name: value if name == "pos_embed" else 0.2 * torch.randn(value.shape, generator=generator)
            for name, value in weights.items()
        },
        path / "ema.safetensors",
    )
    vectors = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    (tmp_path / "vectors").mkdir()
    np.save(tmp_path / "vectors/0.npy", vectors)
    command = (
        "sample_ddp_computed_dlc.py",
        "--model",
        "DiTCONT-Ti/4",
        "--condition-path",
        "vectors",
        "--num-fid-samples",
        6,
        "--num-sampling-steps",
        3,
        "--sampler",
        "heun",
        "--cfg-scale",
        1.2,
    )
    for processes in (1, 2):
        said = launch(("forked", processes, *command, "--sample-dir", f"samples_{processes}"), tmp_path).stdout
        assert f"4 vectors of {tmp_path / 'vectors'} in random order" in said and "6 of 6 images to draw" in said
        assert "note: the checkpoint does not say which VAE made its latents" in said
        assert "note: the checkpoint does not say the scaling factor" in said
    one, two = (read_npz(tmp_path / f"samples_{processes}").astype(int) for processes in (1, 2))
    assert np.abs(one - two).max() <= 1 and one.std() > 1
    record = json.loads((sample_folder(tmp_path / "samples_1") / "samples.json").read_text())
    assert sorted(record["vector_rows"][:4]) == [0, 1, 2, 3] and record["vector_rows"][4:] == record["vector_rows"][:2]
    assert (record["sampler"], record["num_sampling_steps"], record["cfg_channels"]) == ("heun", 3, 4)
    np.save(tmp_path / "vectors/0.npy", vectors + 1)
    result = launch(("forked", 1, *command, "--sample-dir", "samples_1"), tmp_path, check=False)
    assert result.returncode == 2 and "conditions.sha256 " in result.stdout and "Traceback" not in result.stdout
