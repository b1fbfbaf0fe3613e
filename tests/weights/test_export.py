"""Weights out: what is written is read back, and a pipeline of diffusers draws what our sampler draws."""

import os
import sys

import numpy as np
import pytest
import torch
from conftest import refusal
from test_checkpoints import meta_of
from tiny_weights import assert_same, save, tiny

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
from models import DiT, DiTSEM

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


def checkpoint_of(tmp_path, name, process=None, **sizes):
    """A checkpoint of a tiny model, which is its own EMA."""
    model, process = tiny(name, **sizes), process or create_process("gaussian", timestep_respacing="")
    meta = meta_of(7, vae="ema", scaling_factor=0.18215, shift_factor=0.0, features_path="/somewhere")
    return save_checkpoint(tmp_path, config_of(name, model, process), meta, model=model, ema=model), model


def our_images(model, vae, y, guidance, sampler):
    """Two images in [0, 1] by our sampler, from diffusers' noise of seed 5."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dlc.sampling.latents.normal", lambda *_: noise)
        draws = dict(seed=0, indices=torch.arange(2), cfg_channels=model.in_channels)
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
    raw = tiny(name, seed=1, **sizes)
    path, model = checkpoint_of(tmp_path, name, **sizes)
    save(raw.state_dict(), path / "model.safetensors")
    folder, said = export_to(path, "safetensors")
    loaded, found, meta = load_model(folder)
    assert_same(loaded, model)
    known = found, meta.step, meta.noted["lr"], meta.weights, meta.scaling_factor
    assert known == (name, 7, 1e-4, "ema", 0.18215)
    assert describe(meta) == "exported by this program; EMA weights, step 7"
    assert_same(load_model(folder / "model.safetensors")[0], model)
    assert "as safetensors, licence unknown" in said
    card = (folder / "README.md").read_text()
    assert all(words in card for words in ('license: "unknown"', "| lr | 0.0001 |", "| step | 7 |", "| depth | 6 |"))
    assert "somewhere" not in card
    refusal(load_model, folder, ema=False, words="out has no raw weights: leave out --no-ema")
    folder, _ = export_to(path, "safetensors", "--no-ema", "--license", "cc-by-nc-4.0", name="raw")
    assert_same(load_model(folder, ema=False)[0], raw)
    assert "raw weights" in describe(load_model(folder)[2]) and '"cc-by-nc-4.0"' in (folder / "README.md").read_text()
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "meta.json", "model.safetensors"]


class FixedCodes(DiTSEM):
    """A model of one size of codes, which its constructor does not take."""

    def __init__(self, depth: int = 1):
        super().__init__(L=3, V=4, input_size=8, patch_size=4, hidden_size=24, num_heads=2, depth=depth)


def test_a_model_whose_arguments_do_not_say_its_codes(export_to, tmp_path):
    model = FixedCodes().eval()
    config = config_of("FixedCodes", model, create_process("gaussian", timestep_respacing=""))
    folder, _ = export_to(save_checkpoint(tmp_path, config, meta_of(7), model=model, ema=model), "safetensors")
    assert_same(load_model(folder)[0], model)


CODES = [[0, 1, 2], [3, 3, 0]]
GAUSSIAN, FLOW = create_process("gaussian", timestep_respacing=""), create_process("flow", time_scale=1000.0)


@pytest.mark.parametrize(
    "name, sizes, process, argument, y",
    [
        ("DiT-Ti/4", dict(num_classes=5), GAUSSIAN, "class_labels", [1, 4]),
        ("DiTSEM-Ti/4", dict(L=3, V=4), GAUSSIAN, "dlcs", CODES),
        ("DiT-Ti/4", dict(num_classes=5, learn_sigma=False), create_process("flow"), "class_labels", [1, 4]),
        ("DiTSEM-Ti/4", dict(L=3, V=4, learn_sigma=False), FLOW, "dlcs", CODES),
    ],
)
def test_pipelines(name, sizes, process, argument, y, export_to, tmp_path, tiny_models):
    """A pipeline of diffusers with our files of code draws our images, also where it was saved again."""
    from accelerate import cpu_offload
    from diffusers import DiffusionPipeline

    sampler = "euler" if process.config["process"] == "flow" else "dpmsolver++"
    path, model = checkpoint_of(tmp_path, name, process, **sizes)
    folder, _ = export_to(path, "diffusers", "--vae", tiny_models[0])
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    for drawing, guidance, steps in ((pipe, 1.5, 4), (again, 1.0, 3)):
        ours = our_images(model, tiny_models[0], y, guidance, create_sampler(sampler, steps, process))
        assert np.abs(images_of(drawing, guidance, steps, **{argument: y}) - ours).max() < 1e-5
    cpu_offload(again.transformer, execution_device="cpu")  # as of enable_sequential_cpu_offload
    assert np.abs(images_of(again, guidance, steps, **{argument: y}) - ours).max() < 1e-5
    for exported in (folder, tmp_path / "saved"):
        loaded, found, meta = load_model(exported)
        assert_same(loaded, model)
        assert found == name and meta.process == process.config
    assert argument == "dlcs" or "of DiT (as recorded)" in describe(meta)
    card, said = (folder / "README.md").read_text(), "\n".join(info(folder))
    assert f"--sampler {sampler} --num-sampling-steps 25" in card and "trust_remote_code=True" in card
    assert "| global_batch_size | 8 |" in card and ("time_scale 1000" in said) == (process is FLOW)
    for wrong in (4, -1, 1.5) if argument == "dlcs" else (5, 999, 1000, -1):
        given = dict(dlcs=[[0, 1, wrong]]) if argument == "dlcs" else dict(class_labels=[wrong])
        words = r"wanted codes \(N, 3\) of tokens from 0 to 3|class_labels: .* is no class, wanted 0"
        refusal(pipe, **given, num_inference_steps=2, words=words)


def test_a_pipeline_of_weights_trained_in_diffusers(export_to, tmp_path, tiny_models):
    """diffusers' own class draws the same images, which are not those of DiT's function."""
    from diffusers import DiTPipeline

    path, model = checkpoint_of(tmp_path, "DiT-Ti/4", num_classes=5)
    folder, _ = export_to(path, "diffusers", "--vae", tiny_models[0])
    stock, _ = export_to(folder, "diffusers", "--diffusers-time", "diffusers", "--vae", tiny_models[0], name="stock")
    loaded, _, meta = load_model(stock)
    assert "of diffusers (as recorded)" in describe(meta)
    theirs = images_of(DiTPipeline.from_pretrained(stock, trust_remote_code=True), 1.5, 4, class_labels=[1, 4])
    sampler = create_sampler("dpmsolver++", 4)
    own, dits = (
        np.abs(theirs - our_images(one, tiny_models[0], [1, 4], 1.5, sampler)).max() for one in (loaded, model)
    )
    assert own < 1e-5 < dits


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
        ("cont.pt", "diffusers", ("--vae", tiny_models[0]), "out", "pipelines are for the published DiT and DiTSEM"),
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
