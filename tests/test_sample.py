"""sample_ddp_computed_dlc.py and sample_ddp.py through their launchers; commands chained by their defaults."""
import json
import shutil
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import IMAGE_SIZE, L, SAMPLE_FLAGS, V, launch, sample_folder
from PIL import Image

import sample_ddp_computed_dlc
from diffusion import create_diffusion
from dlc.features import Features
from dlc.noise import Stream, normal
from models import DiT_models


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
    assert record["conditions"].startswith(f"14 codes of {workplace / 'features'}")
    # every row before any twice
    assert sorted(record["code_rows"][:14]) == list(range(14))
    assert record["code_rows"][14:] == record["code_rows"][:7]


def test_images_are_the_models(workplace, tiny_models):
    """Sample 17 by the definition: full guided diffusion with its own noise, the EMA weights, and its row's code."""
    from safetensors.torch import load_file

    from dlc.latents import decode, load_vae, to_uint8
    record = json.loads((sample_folder(workplace / "samples") / "samples.json").read_text())
    code = torch.from_numpy(Features(workplace / "features").codes.gather([record["code_rows"][17]]).astype(np.int64))
    model = DiT_models["DiTSEM-Ti/4"](input_size=8, L=L, V=V).eval()
    model.load_state_dict(load_file(workplace / "results/checkpoints/0000003/ema.safetensors"))
    draws = iter([0, 3, 2, 1])                      # x_T, then a draw for each step from the last
    index = torch.tensor([17])
    guided = create_diffusion("3").p_sample_loop(
        model.forward_with_cfg, (2, 4, 8, 8), clip_denoised=False, device="cpu",
        model_kwargs=dict(y=torch.cat([code, torch.full_like(code, V)]), cfg_scale=1.5),
        randn_like=lambda x: normal(0, Stream.SAMPLE_NOISE, index, (4, 8, 8), draw=next(draws)).repeat(2, 1, 1, 1))
    vae = load_vae(tiny_models[0])
    with torch.no_grad():
        image = to_uint8(decode(vae, guided[:1]))[0].numpy().astype(int)
    assert np.abs(image - read_npz(workplace / "samples")[17]).max() <= 1


def test_two_processes_and_another_batch_size_draw_the_same(workplace):
    result = launch(("torchrun", 2, "sample_ddp_computed_dlc.py", "--model", "DiTSEM-Ti/4", *SAMPLE_FLAGS,
                     "--per-proc-batch-size", 4, "--sample-dir", "two", "--ckpt", "results/checkpoints/0000003",
                     "--dlc-dir", "features"), workplace)
    assert "21 of 21 images to draw" in result.stdout
    one, two = (read_npz(workplace / root).astype(int) for root in ("samples", "two"))
    assert np.abs(one - two).max() <= 1
    assert (one != two).mean() < 1e-3


def test_the_same_command_again_draws_what_is_missing(workplace):
    shutil.copytree(workplace / "samples", workplace / "again")
    folder = sample_folder(workplace / "again")
    lost = (folder / "000004.png").read_bytes()
    (folder / "000004.png").unlink()
    (folder / "000019.png").unlink()
    (npz,) = (workplace / "again").glob("*.npz")
    npz.unlink()
    command = ("python", 1, "sample_ddp_computed_dlc.py", "--model", "DiTSEM-Ti/4", *SAMPLE_FLAGS, "--sample-dir", "again")
    assert "2 of 21 images to draw" in launch(command, workplace).stdout
    difference = np.abs(read_npz(workplace / "again").astype(int) - read_npz(workplace / "samples"))
    assert difference.max() <= 1
    assert len(lost) > 0 and (folder / "000004.png").is_file()
    written = npz.stat().st_mtime_ns
    assert "0 of 21 images to draw" in launch(command, workplace).stdout
    assert npz.stat().st_mtime_ns == written
    refused = launch((*command, "--num-sampling-steps", 4), workplace, check=False)
    assert refused.returncode == 2
    assert "num_sampling_steps 3 there, 4 here" in refused.stderr and refused.stderr.count("\n") == 1


def test_a_set_of_other_weights_or_of_more_samples_is_kept(workplace, monkeypatch, capsys):
    """The same command after training anew at the same path must not pass old samples off as the new model's."""
    shutil.copytree(workplace / "results", workplace / "anew/results")
    shutil.copytree(workplace / "samples", workplace / "anew/samples")
    path = workplace / "anew/results/checkpoints/0000003/ema.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["sem_embedder.embedding_table"] += 1
    safetensors.torch.save_file(weights, path)
    monkeypatch.chdir(workplace / "anew")
    for flags, message in (((*SAMPLE_FLAGS,), "weights_sha256 "), (("--num-fid-samples", 5, *SAMPLE_FLAGS[2:]), "is a set of 21 samples")):
        monkeypatch.setattr(sys, "argv", ["sample", "--model", "DiTSEM-Ti/4", *map(str, flags)])
        with pytest.raises(SystemExit) as stopped:
            sample_ddp_computed_dlc.main()
        assert stopped.value.code == 2 and message in capsys.readouterr().err
        shutil.copytree(workplace / "results", workplace / "anew/results", dirs_exist_ok=True)
        record = sample_folder(workplace / "anew/samples") / "samples.json"
        record.write_text(record.read_text().replace(str(workplace / "results"), str(workplace / "anew/results")))


def test_class_conditional_sampling(workplace):
    launch(("torchrun", 1, "sample_ddp.py", "--model", "DiT-Ti/4", *SAMPLE_FLAGS, "--results-dir", "results_dit",
            "--sample-dir", "samples_dit", "--cfg-scale", 1), workplace)
    assert read_npz(workplace / "samples_dit").shape == (21, IMAGE_SIZE, IMAGE_SIZE, 3)
    record = json.loads((sample_folder(workplace / "samples_dit") / "samples.json").read_text())
    assert set(record["labels"]) == {0, 1}
