"""VAEs by path, file and hub id, in each layout, with scale and shift from where it has them; and those of other than
four channels, from extraction to samples."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import IMAGE_SIZE, change_json, extract_command, launch, refusal, sample_folder, tiny_vae
from PIL import Image
from tiny_weights import assert_same, contents

from dlc.data import Features
from dlc.data.images import center_crop, normalize
from dlc.nets.pixels import PixelEncoder
from dlc.nets.vae import check_decodes, decode, latent_settings, latent_shape, posterior
from dlc.weights.foreign.layouts import File
from dlc.weights.foreign.names import read_foreign
from dlc.weights.foreign.vaes import config_of_shapes
from dlc.weights.networks import load_vae

CHANNELS, SCALE, SHIFT = 16, 1.5305, 0.0609  # the latter two are those of Stable Diffusion 3
NORMAL = dict(latents_mean=[0.1 * i for i in range(CHANNELS)], latents_std=[0.5 + 0.1 * i for i in range(CHANNELS)])
PATH = "dog/6.png"  # after the broken one, image 14
MEAN, STD = [0.5, -1.0, 2.0, 0.0], [2.0, 0.5, 1.0, 4.0]


def small_vae(attention=False, **config):
    """As a file that is alone is taken to be: of 32 groups."""
    if attention:
        config["down_block_types"] = ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
        config["up_block_types"] = ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]
    return tiny_vae(block_out_channels=(32, 64), norm_num_groups=32, **config)


def ldm_names(vae):
    """By hand, for this test: the names of latent diffusion's autoencoder for those of diffusers."""
    levels = len(vae.config.block_out_channels)
    renamed = {}
    for key, value in vae.state_dict().items():
        key = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{levels - 1 - int(match[1])}", key)
        key = re.sub(r"down_blocks\.(\d)", r"down.\1", key)
        key = key.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        key = key.replace("mid_block.attentions.0", "mid.attn_1").replace(".resnets.", ".block.")
        key = key.replace(".attentions.", ".attn.").replace("conv_shortcut", "nin_shortcut")
        key = key.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        if ".attn" in key:
            key = key.replace("group_norm", "norm").replace("to_out.0", "proj_out")
            key = re.sub(r"to_([qkv])", r"\1", key)
            if value.ndim == 2:
                value = value[:, :, None, None].contiguous()
        renamed[key.replace("conv_norm_out", "norm_out")] = value
    return renamed


@pytest.mark.parametrize("shift", [0.0, 0.25])
def test_shift_or_mean_and_std_per_channel(tmp_path, shift):
    """latents = (z - shift) * scale, or (z - mean) * scale / std per channel, and decoding undoes it."""
    given = dict(shift_factor=shift) if shift else dict(latents_mean=MEAN, latents_std=STD)
    vae = small_vae(**given, scaling_factor=0.5)
    vae.save_pretrained(tmp_path)
    loaded = load_vae(str(tmp_path))
    unset = dict(shift_factor=0.0, latents_mean=None, latents_std=None)
    assert latent_settings(loaded) == {**unset, "latent_channels": 4, "scaling_factor": 0.5, **given}
    assert shift or loaded.said.endswith("scaling factor 0.5, mean and standard deviation per channel")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.inference_mode():
        expected = vae.encode(images).latent_dist
        mean, std = posterior(loaded, images)
        means, stds = ([shift] * 4, [1.0] * 4) if shift else (MEAN, STD)
        per_channel = [torch.tensor(values).view(1, 4, 1, 1) for values in (means, stds)]
        torch.testing.assert_close(mean, (expected.mean - per_channel[0]) * 0.5 / per_channel[1])
        torch.testing.assert_close(std, expected.std * 0.5 / per_channel[1])
        torch.testing.assert_close(decode(loaded, mean), vae.decode(expected.mean).sample, atol=1e-4, rtol=1e-4)
        half = decode(loaded.to(torch.bfloat16), mean.to(torch.bfloat16))
        assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("attention", [False, True])
def test_single_files_of_ldm(tmp_path, attention):
    from diffusers import AutoencoderKL

    vae = small_vae(attention=attention, scaling_factor=0.7)
    vae.save_pretrained(tmp_path / "folder")
    names = ldm_names(vae)
    safetensors.torch.save_file(names, tmp_path / "vae.safetensors")
    if not attention:  # which that converter does not know at the levels
        theirs = AutoencoderKL.from_single_file(
            str(tmp_path / "vae.safetensors"), config=str(tmp_path / "folder"), local_files_only=True
        )
        assert_same(theirs.eval(), vae)
    whole = {f"first_stage_model.{key}": value for key, value in names.items()}
    whole |= {"first_stage_model.loss.logvar": torch.zeros(1), "model.diffusion_model.x": torch.zeros(1)}
    for value, scale, said in (
        ({"state_dict": {**whole, "cond_stage_model.x": torch.zeros(1)}, "step": 3}, 0.18215, "Stable Diffusion's"),
        ({**whole, "conditioner.embedders.1.x": torch.zeros(1)}, 0.13025, "SDXL's, by the model around it"),
    ):
        torch.save(value, tmp_path / "whole.ckpt")
        loaded = load_vae(str(tmp_path / "whole.ckpt"))
        assert_same(loaded, vae)
        assert loaded.config.scaling_factor == scale and said in loaded.said
        assert "first_stage_model.*, LDM's names" in loaded.said
    refusal(load_vae, str(tmp_path / "vae.safetensors"), words="of 4 channels, which does not say its scaling factor")
    torch.save({"mean": torch.tensor(MEAN).view(1, 4, 1, 1), "std": torch.tensor(STD)}, tmp_path / "latents_stats.pt")
    loaded = load_vae(str(tmp_path / "vae.safetensors"))
    assert_same(loaded, vae)
    assert loaded.config.latents_mean == MEAN and loaded.config.scaling_factor == 1.0
    shutil.copy(tmp_path / "folder/config.json", tmp_path)
    loaded = load_vae(str(tmp_path / "vae.safetensors"))
    assert_same(loaded, vae)
    assert loaded.config.scaling_factor == 0.7


@pytest.mark.parametrize(
    "name, channels, attention, scale",
    [
        ("vae-ft-mse-840000", 4, 0, 0.18215),  # Stable Diffusion's
        ("sdxl_vae", 4, 0, 0.13025),
        ("ae", 16, 0, None),  # of Stable Diffusion 3, and FLUX's
        ("vavae", 32, 1, None),
    ],
)
def test_published_single_files(name, channels, attention, scale, tmp_path, monkeypatch):
    """Sizes by their shapes alone; the scale where nothing else can be meant, else a config has to say it."""
    from diffusers import AutoencoderKL

    widths = [128, 128, 256, 256, 512] if attention else [128, 256, 512, 512]
    plain, quant = len(widths) - attention, channels != 16
    wanted = dict(
        latent_channels=channels,
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * plain + ["AttnDownEncoderBlock2D"] * attention,
        up_block_types=["AttnUpDecoderBlock2D"] * attention + ["UpDecoderBlock2D"] * plain,
        **dict(use_quant_conv=quant, use_post_quant_conv=quant, layers_per_block=2, norm_num_groups=32),
        **dict(in_channels=3, out_channels=3, mid_block_add_attention=True),
    )
    with torch.device("meta"):
        vae = AutoencoderKL(**wanted)
    assert config_of_shapes(File("x", Path("x"), "vae"), vae.state_dict()) == wanted
    monkeypatch.setattr("dlc.weights.foreign.names.check_tensors", lambda tensors, path: tensors)
    path = tmp_path / f"{name}.ckpt"
    torch.save(ldm_names(vae), path)
    if scale is None:
        refusal(read_foreign, name, path, "vae", words=f"a VAE of {channels} channels, which does not say its scaling")
    else:
        assert read_foreign(name, path, "vae")[1]["arguments"]["scaling_factor"] == scale


def test_pipelines_and_hub_ids(tmp_path, hub):
    vae = small_vae(scaling_factor=0.3)
    vae.save_pretrained(tmp_path / "pipeline/vae")
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    loaded = load_vae(str(tmp_path / "pipeline"))
    assert_same(loaded, vae)
    assert "AutoencoderKL of 4 channels, 2 pixels per latent cell" in loaded.said
    folder = tmp_path / "pipeline/vae"
    hub.add("owner/vae", contents(folder))
    hub.add("owner/pipeline", contents(tmp_path / "pipeline"), "v1")
    config = (folder / "config.json").read_bytes()
    hub.add("owner/file", {"vae.safetensors": safetensors.torch.save(ldm_names(vae)), "config.json": config})
    for name, said in (
        ("owner/vae", "from the hub, diffusers' names, AutoencoderKL"),
        ("owner/pipeline@v1", "from the hub, diffusers pipeline (None), diffusers' names"),
        ("owner/file", "from the hub, LDM's names"),
    ):
        loaded = load_vae(name)
        assert_same(loaded, vae)
        assert loaded.said.startswith(said) and loaded.config.scaling_factor == 0.3
    refusal(load_vae, "owner/pipeline", words="--vae owner/pipeline: the hub has no revision 'main' of it")
    (folder / "config.json").unlink()
    refusal(load_vae, str(folder), words="does not say its scaling factor: put a config.json")
    shutil.rmtree(folder)
    refusal(load_vae, str(tmp_path / "pipeline"), words="is a diffusers pipeline without vae/")


def test_names_of_older_diffusers(tiny_models, tmp_path):
    """Stability AI's files name the attention's layers as diffusers did before 0.17."""
    vae = shutil.copytree(tiny_models[0], tmp_path / "vae")
    path = vae / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    expected = load_vae(str(vae))
    assert sum("attentions" in name for name in weights) == 20
    for old, new in dict(query="to_q", key="to_k", value="to_v", proj_attn="to_out.0").items():
        weights = {name.replace(f".{new}.", f".{old}."): value for name, value in weights.items()}
    path.unlink()
    torch.save(weights, vae / "diffusion_pytorch_model.bin")
    new = ("scaling_factor", "force_upcast", "shift_factor", "latents_mean", "use_quant_conv")
    config = json.loads((vae / "config.json").read_text())  # an old one says less
    (vae / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in new}))
    loaded = load_vae(str(vae))
    assert loaded.config.scaling_factor == 0.18215
    assert_same(loaded, expected)


def test_files_that_are_no_vae(tmp_path):
    for tensors, message in (
        ({"x": torch.zeros(1)}, "is not a VAE: no tensor in it has a name that is known"),
        ({"encoder.down.0.block.0.conv1.weight": torch.full((3, 3, 1, 1), torch.nan)}, "NaN or infinite"),
        ({"encoder.conv_out.weight": torch.zeros(3)}, "is not a VAE: it has no encoder"),
    ):
        torch.save(tensors, tmp_path / "vae.pt")
        refusal(load_vae, str(tmp_path / "vae.pt"), words=message)
    refusal(load_vae, str(tmp_path / "nothing.safetensors"), words="does not exist: it is neither a file or folder")


def test_other_autoencoders(tmp_path):
    """AutoencoderDC has no posterior, another factor and other names of its keys; other classes are refused."""
    from diffusers import AutoencoderDC, AutoencoderTiny

    torch.manual_seed(0)
    sizes = dict(block_out_channels=(16, 32, 32), layers_per_block=(1,) * 3, qkv_multiscales=((),) * 3)
    sizes["block_types"] = "ResBlock"
    both = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in sizes.items()}
    vae = AutoencoderDC(latent_channels=8, scaling_factor=0.41, **both).eval()
    vae.save_pretrained(tmp_path / "dc")
    loaded = load_vae(str(tmp_path / "dc"))
    assert_same(loaded, vae)
    assert loaded.said.endswith("DC of 8 channels, 4 pixels per latent cell, scaling factor 0.41")
    assert latent_shape(loaded, 32) == (8, 8, 8)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.inference_mode():
        mean, std = posterior(loaded, images)
        torch.testing.assert_close(mean, vae.encode(images).latent * 0.41)
        torch.testing.assert_close(decode(loaded, mean), vae.decode(mean / 0.41).sample, atol=1e-4, rtol=1e-4)
        assert mean.shape == (2, 8, 4, 4) and not std.any()
        crops = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
        assert PixelEncoder(loaded, None, torch.device("cpu")).moments(crops, 1).shape == (1, 16, 4, 4)
    sizes = dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8))
    AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(tmp_path / "tiny")
    refusal(load_vae, str(tmp_path / "tiny"), words="is not a VAE: no tensor in it has a name that is known")


# ---------------------------------------------------------------------- other channels, from extraction to samples


@pytest.fixture(scope="module")
def deep_vaes(tmp_path_factory):
    """A tiny VAE like Stable Diffusion 3's, of 16 channels, 4 pixels per cell and no 1x1 convolutions; and the same,
    whose config says mean and standard deviation of each channel in place of a shift."""
    root = tmp_path_factory.mktemp("deep")
    torch.manual_seed(1)
    config = dict(scaling_factor=SCALE, shift_factor=SHIFT, use_quant_conv=False, use_post_quant_conv=False)
    tiny_vae(3, **config, latent_channels=CHANNELS).save_pretrained(root / "mean")
    shutil.copytree(root / "mean", root / "moments")
    change_json(root / "moments/config.json", **NORMAL, shift_factor=None)
    return root


@pytest.mark.slow
def test_from_extraction_to_samples(deep_vaes, tiny_models, images, tmp_path, error_of):
    pixels = normalize(torch.from_numpy(np.array(center_crop(Image.open(images / PATH), IMAGE_SIZE)))[None])
    for kind in ("mean", "moments"):
        vae = load_vae(str(deep_vaes / kind))
        flags = ("--posterior", kind, "--dtype", "float32", "--flip", "none")
        command = extract_command("forked", 1, images, tmp_path / kind, (deep_vaes / kind, tiny_models[1]), *flags)
        launch(command, tmp_path)
        features = Features(tmp_path / kind)
        features.validate()
        names = features.paths.gather(np.arange(features.count)).tolist()
        with torch.inference_mode():
            expected = torch.cat(posterior(vae, pixels), dim=1)[:, : CHANNELS if kind == "mean" else None]
        np.testing.assert_allclose(features.latents.gather([names.index(PATH)]), expected, atol=1e-4)
        assert features.latent_shape == (CHANNELS, 16, 16)
        assert {**vars(features.manifest), **latent_settings(vae)} == vars(features.manifest)
    model, other = ("--model", "DiTSEM-Ti/4"), ("--vae", tiny_models[0])
    train = (*model, "--features-path", tmp_path / "mean", "--max-steps", 2, "--global-batch-size", 4)
    train += ("--num-workers", 0, "--sample-every", 2)
    launch(("forked", 1, "train_diffusion.py", *train), tmp_path)
    meta = json.loads((tmp_path / "results/checkpoints/0000002/meta.json").read_text())
    assert (meta["shift_factor"], meta["scaling_factor"]) == (SHIFT, SCALE)
    assert (tmp_path / "results/previews/0000002.png").is_file()
    sample = (*model, "--dlc-dir", tmp_path / "mean", "--num-fid-samples", 2, "--num-sampling-steps", 2)
    launch(("forked", 1, "sample_ddp_computed_dlc.py", *sample), tmp_path)
    assert Image.open(sample_folder(tmp_path / "samples") / "000001.png").size == (IMAGE_SIZE, IMAGE_SIZE)
    assert "has 4 latent channels, the " in error_of("sample_ddp_computed_dlc", *sample, *other)
    assert "has 4 latent channels, the " in error_of("train_diffusion", *train, *other, "--results-dir", "other")


def test_what_a_vae_cannot_decode(deep_vaes, tiny_models):
    vae = load_vae(str(deep_vaes / "mean"))
    settings = latent_settings(vae)
    check_decodes(vae, "x", CHANNELS, settings, "the latents")
    check_decodes(vae, "x", CHANNELS, dict(scaling_factor=None), "the latents")  # nothing is known
    check_decodes(load_vae(str(tiny_models[0])), "x", 4, dict(scaling_factor=0.18215), "the latents")
    for channels, source, message in (
        (CHANNELS, dict(settings, **NORMAL), r"has latents mean None, the latents \[0.0, 0.1"),
        (CHANNELS, dict(settings, latents_std=NORMAL["latents_std"]), "has latents std None"),
        (4, settings, "--vae x has 16 latent channels, the latents 4"),
        (CHANNELS, dict(settings, scaling_factor=0.5), f"has scaling factor {SCALE}, the latents 0.5"),
        (CHANNELS, dict(settings, shift_factor=0.5), f"has shift factor {SHIFT}, the latents 0.5"),
        (CHANNELS, dict(scaling_factor=SCALE), f"has shift factor {SHIFT}, the latents 0.0"),
    ):
        refusal(check_decodes, vae, "x", channels, source, "the latents", words=message)
