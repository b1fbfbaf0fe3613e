"""Weights out: what is written is read back, and a pipeline of diffusers draws what our sampler draws."""

import os
import sys

import numpy as np
import pytest
import torch
from conftest import refusal
from test_checkpoints import config, meta_of
from tiny_weights import assert_same, tiny

from diffusion.process_table import create_process
from dlc import checkpoints as tool
from dlc.machine.files import write_folder
from dlc.nets.vae import decode
from dlc.sampling.latents import create_sampler, sample_latents
from dlc.weights.checkpoint import save_checkpoint
from dlc.weights.info import info
from dlc.weights.load import describe, load_model
from dlc.weights.meta import config_of
from dlc.weights.networks import load_vae
from models import DiT

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True, scope="module")
def modules_cache(tmp_path_factory):
    """Where diffusers copies files of code to, before it imports them."""
    from diffusers.utils import dynamic_modules_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture
def export_to(tmp_path, tiny_models):
    """Export a checkpoint as a user does, by flags; gives the folder and what was said."""

    def call(checkpoint, format, *flags, name="out"):
        said, command = [], ["export", checkpoint, tmp_path / name, "--format", format, *flags]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["checkpoints", *map(str, command)])
            patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
            tool.main()
        return tmp_path / name, "\n".join(said)

    return call


def checkpoint_of(tmp_path, model, name, **sizes):
    ema = tiny(name, seed=1, **sizes)
    meta = meta_of(7, vae="ema", scaling_factor=0.18215, shift_factor=0.0, features_path="/somewhere")
    optimizers = [torch.optim.AdamW(model.parameters())]
    return save_checkpoint(tmp_path, config(model, name), meta, model=model, ema=ema, optimizers=optimizers), ema


def our_images(model, vae, y, guidance, steps, sampler=None):
    """Two images in [0, 1] by our sampler, from diffusers' noise of seed 5."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dlc.sampling.latents.normal", lambda *_: noise)
        draws = dict(seed=0, indices=torch.arange(2), latent_shape=(4, 8, 8), channels=model.in_channels)
        sampler = sampler or create_sampler("dpmsolver++", steps)
        latents = sample_latents(model, sampler, y=torch.tensor(y), cfg_scale=guidance, **draws)
        with torch.inference_mode():
            return (decode(load_vae(str(vae)), latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def images_of(pipe, guidance, steps, **condition):
    """The same by a pipeline."""
    pipe.set_progress_bar_config(disable=True)
    how = dict(guidance_scale=guidance, num_inference_steps=steps, output_type="np")
    return pipe(**condition, **how, generator=torch.Generator().manual_seed(5)).images


@pytest.mark.parametrize("name, sizes", [("DiT-Ti/4", dict(num_classes=5)), ("DiTCONT-Ti/4", dict(in_dim=6))])
def test_safetensors(name, sizes, export_to, tmp_path):
    model = tiny(name, **sizes)
    path, ema = checkpoint_of(tmp_path, model, name, **sizes)
    folder, said = export_to(path, "safetensors")
    loaded, found, meta = load_model(folder)
    assert_same(loaded, ema)
    known = found, meta.step, meta.noted["lr"], meta.weights, meta.scaling_factor
    assert known == (name, 7, 1e-4, "ema", 0.18215)
    assert describe(meta) == "exported by this program; EMA weights, step 7"
    assert_same(load_model(folder / "model.safetensors")[0], ema)
    assert "as safetensors, licence unknown" in said
    card = (folder / "README.md").read_text()
    assert all(words in card for words in ('license: "unknown"', "| lr | 0.0001 |", "| step | 7 |", "| depth | 6 |"))
    assert "somewhere" not in card
    raw, _ = export_to(path, "safetensors", "--no-ema", "--license", "cc-by-nc-4.0", name="raw")
    assert_same(load_model(raw, ema=False)[0], model)
    refusal(load_model, folder, ema=False, words="out has no raw weights: leave out --no-ema")
    assert "raw weights" in describe(load_model(raw)[2]) and '"cc-by-nc-4.0"' in (raw / "README.md").read_text()
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "meta.json", "model.safetensors"]


def test_a_pipeline_of_a_dit(export_to, tmp_path, tiny_models):
    """diffusers' pipeline with our file of code draws our images; its own class, those of weights trained there."""
    from diffusers import DiffusionPipeline, DiTPipeline

    path, ema = checkpoint_of(tmp_path, tiny(), "DiT-Ti/4", num_classes=5)
    folder, _ = export_to(path, "diffusers", "--vae", tiny_models[0])

    def difference(pipe, model, guidance=1.5, steps=4):
        ours = our_images(model, tiny_models[0], [1, 4], guidance, steps)
        return np.abs(images_of(pipe, guidance, steps, class_labels=[1, 4]) - ours).max()

    assert difference(DiTPipeline.from_pretrained(folder, trust_remote_code=True), ema) < 1e-5
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert difference(pipe, ema, 1.0, 3) < 1e-5
    for label in (5, 999, 1000, -1):
        refusal(pipe, class_labels=[label], num_inference_steps=2, words=f"class_labels: {label} is no class, wanted 0")
    pipe.save_pretrained(tmp_path / "saved")
    assert difference(DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True), ema) < 1e-5
    for exported in (folder, tmp_path / "saved"):
        loaded, name, meta = load_model(exported)
        assert_same(loaded, ema)
    assert name == "DiT-Ti/4" and "of DiT (as recorded)" in describe(meta)
    card = (folder / "README.md").read_text()
    assert "trust_remote_code=True" in card and "--cfg-channels all" in card and "| global_batch_size | 8 |" in card

    stock, _ = export_to(folder, "diffusers", "--diffusers-time", "diffusers", "--vae", tiny_models[0], name="stock")
    loaded, _, meta = load_model(stock)
    theirs = DiTPipeline.from_pretrained(stock, trust_remote_code=True)
    assert difference(theirs, loaded) < 1e-5 < difference(theirs, ema) and "of diffusers (as rec" in describe(meta)


def test_a_pipeline_of_a_ditsem(export_to, tmp_path, tiny_models):
    from diffusers import DiffusionPipeline

    path, ema = checkpoint_of(tmp_path, tiny("DiTSEM-Ti/4", L=3, V=4), "DiTSEM-Ti/4", L=3, V=4)
    folder, _ = export_to(path, "diffusers", "--vae", tiny_models[0])
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    codes = [[0, 1, 2], [3, 3, 0]]
    for guidance, steps in ((1.5, 4), (1.0, 3)):
        theirs = images_of(pipe, guidance, steps, dlcs=torch.tensor(codes))
        assert np.abs(theirs - our_images(ema, tiny_models[0], codes, guidance, steps)).max() < 1e-5
    assert len(pipe(dlcs=codes, num_inference_steps=2).images) == 2
    for token in (4, -1, 1.5):
        refusal(pipe, dlcs=[[0, 1, token]], words=r"wanted codes \(N, 3\) of tokens from 0 to 3")
    assert_same(load_model(folder)[0], ema)


def test_mistakes(export_to, tmp_path, tiny_models, capsys):
    mlp = DiT(input_size=8, patch_size=4, hidden_size=192, depth=6, num_heads=3, mlp_ratio=2.0)
    for name, model in dict(cont=tiny("DiTCONT-Ti/4", in_dim=6), dit=tiny(), mlp=mlp).items():
        torch.save(model.state_dict(), tmp_path / f"{name}.pt")
    (tmp_path / "there").mkdir()
    (tmp_path / "checkpoints/0000007").mkdir(parents=True)
    for checkpoint, format, flags, name, message in (
        ("dit.pt", "safetensors", (), "there", "there exists: give another path"),
        ("dit.pt", "safetensors", (), "nowhere/out", "does not exist"),
        ("dit.pt", "safetensors", (), "checkpoints/0000008", "would be read as a checkpoint of the run"),
        ("dit.pt", "safetensors", ("--vae", tiny_models[0]), "out", "--vae goes with the formats of diffusers"),
        ("cont.pt", "diffusers", ("--vae", tiny_models[0]), "out", "is for the published DiT and DiTSEM"),
        ("mlp.pt", "diffusers", ("--vae", tiny_models[0]), "out", "has an MLP that is not 4 times as wide"),
        ("gone.pt", "diffusers", (), "out", "gone.pt does not exist"),
        ("dit.pt", "diffusers", ("--vae", "nowhere"), "out", "nowhere"),
        ("dit.pt", "onnx", (), "out", "invalid choice: 'onnx'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            export_to(tmp_path / checkpoint, format, *flags, name=name)
        line = capsys.readouterr().err
        assert stopped.value.code == 2 and message in line and line.count("\n") == 1, line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "cont.pt", "dit.pt", "mlp.pt", "there"]


def test_whole_or_not_at_all(tmp_path):
    def cut_off(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    refusal(write_folder, tmp_path / "out", cut_off, words="cannot write .*out", error=OSError)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, time_scale", [("DiT-Ti/4", 1.0), ("DiTSEM-Ti/4", 1000.0)])
def test_a_pipeline_of_a_flow(name, time_scale, export_to, tmp_path, tiny_models):
    from diffusers import DiffusionPipeline

    process = create_process("flow", time_scale=time_scale)
    sizes, argument, y = dict(num_classes=5), "class_labels", [1, 4]
    if name.startswith("DiTSEM"):
        sizes, argument, y = dict(L=3, V=4), "dlcs", [[0, 1, 2], [3, 3, 0]]
    model = tiny(name, learn_sigma=False, **sizes)
    path = save_checkpoint(tmp_path, config_of(name, model, process), meta_of(7), model=model, ema=model, optimizers=[])
    folder, _ = export_to(path, "diffusers", "--vae", tiny_models[0])
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    for drawing, guidance, steps in ((pipe, 1.5, 4), (again, 1.0, 3)):
        sampler = create_sampler("euler", steps, process, learn_sigma=False)
        ours = our_images(model, tiny_models[0], y, guidance, steps, sampler)
        assert np.abs(images_of(drawing, guidance, steps, **{argument: y}) - ours).max() < 1e-5
    for exported in (folder, tmp_path / "saved"):
        loaded, _, meta = load_model(exported)
        assert_same(loaded, model)
        assert meta.process == process.config
    assert f"time_scale {time_scale}" in "\n".join(info(folder))
    assert "--sampler euler --num-sampling-steps 25" in (folder / "README.md").read_text()
