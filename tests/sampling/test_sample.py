"""sample_ddp_computed_dlc.py and sample_ddp.py through their launchers; commands chained by their defaults."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import IMAGE_SIZE, SAMPLE_FLAGS, L, V, launch, sample_folder, save_checkpoint
from grids import grid_cells
from PIL import Image
from tiny_prior import save_prior

from diffusion import create_diffusion
from dlc.data import Features
from dlc.data.images import to_uint8
from dlc.machine.noise import Stream, normal
from dlc.nets.vae import decode
from dlc.sampling.command import prepare
from dlc.sampling.sampling_flags import sampling_parser
from dlc.weights.networks import load_vae
from models import DiT_models

pytestmark = pytest.mark.slow
CODES = ("sample_ddp_computed_dlc.py", "--model", "DiTSEM-Ti/4", *SAMPLE_FLAGS)  # and the script


def drawn(root):
    """The images of the only .npz, and what the samples.json of its folder says."""
    (path,) = root.glob("*.npz")
    with np.load(path) as archive:
        assert archive.files == ["arr_0"]
        return archive["arr_0"], json.loads((sample_folder(root) / "samples.json").read_text())


def test_what_sampling_leaves(workplace, tiny_models):
    folder = sample_folder(workplace / "samples")
    readable, _, digest = folder.name.rpartition("-")
    assert readable == f"DiTSEM-Ti-4-0000003-size-{IMAGE_SIZE}-vae-{tiny_models[0].name}-cfg-1.5-seed-0"
    assert len(digest) == 8
    array, record = drawn(workplace / "samples")
    assert array.shape == (21, IMAGE_SIZE, IMAGE_SIZE, 3) and array.dtype == np.uint8
    paths = sorted(folder.glob("*.png"))
    assert [path.name for path in paths] == [f"{index:06d}.png" for index in range(21)]
    np.testing.assert_array_equal(array, [np.array(Image.open(path)) for path in paths])
    sheet = grid_cells(workplace / f"samples/{folder.name}.grid.png", IMAGE_SIZE, 10, captions=True)
    stored = torch.from_numpy(Features(workplace / "features").latents.gather(record["code_rows"][12:13]))
    with torch.no_grad():
        asked = to_uint8(decode(load_vae(tiny_models[0]), stored.float()))[0].numpy().astype(int)
    assert sheet.shape[:2] == (6, 10) and (sheet[5, 0] == array[20]).all() and (sheet[3, 2] == array[12]).all()
    assert np.abs(sheet[2, 2] - asked).max() <= 1  # what sample 12 is drawn for, above it
    known = dict(checkpoint=str(workplace / "results/checkpoints/0000003"), weights="ema", step=3)
    known |= dict(vae=str(tiny_models[0]), vae_precision="fp32", num_fid_samples=21, precision="fp32")
    known |= dict(sampler="ddpm", num_sampling_steps=3, cfg_scale=1.5, cfg_channels=4, t_min=0, t_max=999)
    assert known.items() <= record.items() and len(record["weights_sha256"]) == len(record["vae_sha256"]) == 64
    conditions = dict(kind="codes", source=str(workplace / "features"), count=14, order="random", L=L, V=V)
    assert conditions.items() <= record["conditions"].items() and len(record["conditions"]["sha256"]) == 64
    (run,) = record["runs"]
    assert run["images"] == 21 and "DiTSEM-Ti/4" in run["command"] and run["versions"]["numpy"] == np.__version__
    # every row before any twice
    assert sorted(record["code_rows"][:14]) == list(range(14)) and record["code_rows"][14:] == record["code_rows"][:7]


def test_images_are_the_models(workplace, tiny_models):
    """Sample 17 by the definition: full guided diffusion with its own noise, the EMA weights, and its row's code."""
    array, record = drawn(workplace / "samples")
    code = torch.from_numpy(Features(workplace / "features").codes.gather([record["code_rows"][17]]).astype(np.int64))
    model = DiT_models["DiTSEM-Ti/4"](input_size=8, L=L, V=V).eval()
    model.load_state_dict(safetensors.torch.load_file(workplace / "results/checkpoints/0000003/ema.safetensors"))
    draws, shape = iter([0, 3, 2, 1]), (4, 8, 8)  # x_T, then a draw for each step from the last
    guided = create_diffusion("3").p_sample_loop(
        model.forward_with_cfg,
        (2, *shape),
        clip_denoised=False,
        device="cpu",
        model_kwargs=dict(y=torch.cat([code, torch.full_like(code, V)]), cfg_scale=1.5),
        randn_like=lambda x: normal(0, Stream.SAMPLE_NOISE, torch.tensor([17]), shape, next(draws)).repeat(2, 1, 1, 1),
    )
    with torch.no_grad():
        image = to_uint8(decode(load_vae(tiny_models[0]), guided[:1]))[0].numpy().astype(int)
    assert np.abs(image - array[17]).max() <= 1


@pytest.mark.parametrize("launcher, processes, batch", [("torchrun", 1, 4), ("forked", 3, 5)])
def test_processes_and_batch_size_do_not_matter(workplace, tmp_path, launcher, processes, batch):
    flags = ("--per-proc-batch-size", batch, "--sample-dir", tmp_path, "--ckpt", "results/checkpoints/0000003")
    result = launch((launcher, processes, *CODES, *flags, "--dlc-dir", "features"), workplace)
    assert "21 of 21 images to draw" in result.stdout
    (here, record), (there, earlier) = drawn(tmp_path), drawn(workplace / "samples")
    assert np.abs(here.astype(int) - there).max() <= 1 and (here != there).mean() < 1e-3
    assert record["code_rows"] == earlier["code_rows"]


def test_the_same_command_again_draws_what_is_missing(workplace, rounded, tmp_path):
    """Images that are gone, cut short or empty, with the same bytes wherever they lie in a batch; then nothing."""

    def again(*flags):
        flags = ("--per-proc-batch-size", 6, "--sample-dir", tmp_path, *flags)
        return launch(("forked", 2, *CODES, *flags), workplace).stdout

    again()
    folder, (npz,) = sample_folder(tmp_path), tmp_path.glob("*.npz")
    whole = {path: path.read_bytes() for path in [*folder.glob("*.png"), npz]}
    (folder / "000004.png").write_bytes(whole[folder / "000004.png"][:-20])
    (folder / "000011.png").write_bytes(b"")
    for index in (2, 3, 7, 12, 20):
        (folder / f"{index:06d}.png").unlink()
    (folder / f".000019.png.{'0' * 32}.tmp").write_text("of a process that was killed")
    other = tmp_path / f".{folder.name}0.npz.{'0' * 32}.tmp"  # what seed 10 is about to write
    other.write_text("")
    assert "7 of 21 images to draw" in again()
    assert {path: path.read_bytes() for path in whole} == whole
    assert other.is_file() and not list(folder.glob(".*"))
    assert [run["images"] for run in drawn(tmp_path)[1]["runs"]] == [21, 7]
    assert "2 of 23 images to draw" in again("--num-fid-samples", 23)
    assert len(drawn(tmp_path)[0]) == 23


def test_what_decides_the_images_is_in_the_name(workplace, monkeypatch):
    monkeypatch.chdir(workplace)

    def name(*flags):
        args = sampling_parser("", CODES[0], "").parse_args([*map(str, (*CODES[1:], "--sample-dir", "names", *flags))])
        folder = prepare(args, CODES[0], "DiTSEM-XL/2").folder
        folder.lock.release()
        return folder.path.name

    plain, codes = name(), np.zeros((20, L), int)
    assert plain == sample_folder(workplace / "samples").name == name("--num-fid-samples", 3000, "--compile")
    shutil.copytree(workplace / "results/checkpoints", workplace / "anew/checkpoints")
    path = workplace / "anew/checkpoints/0000003/ema.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["sem_embedder.embedding_table"] += 1
    safetensors.torch.save_file(weights, path)
    names = [plain, name("--results-dir", "anew"), name("--prior", save_prior(workplace / "p"))]
    for token in range(2):
        codes[3] = token
        np.save(workplace / "changing.npy", codes)
        names.append(name("--dlc-dir", "changing.npy"))
    sampling = "--sampler ddim,--sampler ddim --eta 0.1,--num-sampling-steps 4,--cfg-channels 3,--t-min 1,--t-max 998"
    numerics = "--precision bf16,--no-tf32,--vae-precision bf16,--no-ema,--dlc-order sequential"
    for flags in f"{sampling},{numerics}".split(","):
        names.append(name(*flags.split()))
    assert len(set(names)) == len(names)


def test_class_conditional_sampling(workplace, tmp_path):
    command = ("sample_ddp.py", "--model", "DiT-Ti/4", *SAMPLE_FLAGS, "--results-dir", "results_dit", "--cfg-scale", 1)
    flags = ("--label-sampling", "equal", "--precision", "bf16", "--vae-precision", "bf16", "--sampler", "heun")
    launch(("python", 1, *command, "--sample-dir", tmp_path, *flags), workplace)
    array, record = drawn(tmp_path)
    assert array.shape == (21, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert record["labels"] == [0, 1] * 10 + [0] and record["cfg_channels"] == 3


def test_sampling_for_vectors_and_a_strip_of_the_denoising(tiny_models, said_by, monkeypatch, tmp_path):
    """Of as many pictures as asked for, the last of which is sample 0."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "model", "DiTCONT-Ti/4", dict(in_dim=5), vae=tiny_models[0])
    np.save("vectors.npy", np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32))
    flags = ("--ckpt", "model", "--condition-path", "vectors.npy", "--num-fid-samples", 6, "--num-sampling-steps", 6)
    flags += ("--sampler", "ddim", "--eta", 0.3, "--cfg-scale", 1.2, "--progressive", 4)
    said = said_by("sample_ddp_computed_dlc", *flags)
    for words in (
        f"4 vectors of {tmp_path}/vectors.npy in random order",
        "6 of 6 images to draw",
        "note: nothing says which VAE made the checkpoint's latents",
        "note: nothing says the scaling factor of the checkpoint's latents",
    ):
        assert words in said
    images, record = drawn(tmp_path / "samples")
    assert sorted(record["vector_rows"][:4]) == [0, 1, 2, 3] and record["vector_rows"][4:] == record["vector_rows"][:2]
    assert (record["sampler"], record["num_sampling_steps"], record["cfg_channels"]) == ("ddim", 6, 4)
    (path,) = tmp_path.glob("samples/*.progressive.png")
    (strip,) = grid_cells(path, IMAGE_SIZE, 4, captions=True).astype(int)
    assert np.abs(strip[-1] - images[0]).max() <= 1 and np.abs(strip[0] - images[0]).mean() > 1
