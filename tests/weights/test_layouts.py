"""Diffusion transformers of others: each layout is read, and says what it is, or is refused in one line."""

import argparse
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, golden, refusal
from tiny_weights import assert_same, contents, save, save_folder, tiny

from dlc.weights.foreign.dits import to_diffusers
from dlc.weights.info import info, recorded_of
from dlc.weights.load import describe, load_model, load_pretrained
from dlc.weights.meta import RunMeta
from models import DiT

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def weights():
    """Raw and EMA weights of a small DiT."""
    return tiny().state_dict(), tiny(seed=1).state_dict()


def said(path, **options):
    return describe(load_model(path, **options)[2])


TRANSFORMER = "diffusion_pytorch_model.safetensors"


# ---------------------------------------------------------------------- DiT's, DLC's


@pytest.mark.parametrize(
    "name, sizes, suffix",
    [
        ("DiT-Ti/4", dict(num_classes=5), ".pt"),
        ("DiTSEM-Ti/4", dict(L=3, V=4), ".bin"),
        ("DiTCONT-Ti/4", dict(in_dim=6), ".safetensors"),
        ("DiT-Ti/4", dict(num_classes=5, learn_sigma=False), ".weights"),
    ],
)
def test_bare_files(name, sizes, suffix, tmp_path):
    model = tiny(name, **sizes)
    path = save(model.state_dict(), tmp_path / f"model{suffix}")
    loaded, found, meta = load_model(path)
    assert_same(loaded, model)
    assert (found, meta.step, meta.process, loaded.training) == (name, None, None, False)
    assert describe(meta) == (
        f"DiT's names, {'5 classes and the null label, ' * (sizes.get('num_classes') == 5)}taken to predict noise "
        "(--objective says another); weights as in the file, EMA or raw unknown, step unknown"
    )
    assert load_model(path, process="gaussian")[2].process["process"] == "gaussian"
    assert "M parameters, latents 4 x 8 x 8" in info(path)[0]


def test_without_positions(tmp_path):
    """pos_embed is a constant: for the size that something tells, or else 32 cells, which is said."""
    model = tiny()
    weights = {key: value for key, value in model.state_dict().items() if key != "pos_embed"}
    torch.save(weights, tmp_path / "bare.pt")
    assert_same(load_model(tmp_path / "bare.pt", input_size=8)[0], model)
    loaded, _, meta = load_model(tmp_path / "bare.pt")
    assert loaded.x_embedder.img_size == (32, 32)
    assert "no pos_embed: taken to be of latents of 32 x 32 cells" in describe(meta)
    arguments = argparse.Namespace(model="DiT-Ti/4", global_seed=0, image_size=64)
    torch.save(dict(ema=weights, model=weights, args=arguments), tmp_path / "0000500.pt")
    assert_same(load_model(tmp_path / "0000500.pt")[0], model)
    assert "new: pos_embed" in load_pretrained(tmp_path / "bare.pt", tiny(seed=1))


def test_training_files(tmp_path):
    model, ema = tiny(), tiny(seed=1)
    objects = dict(global_batch_size=np.int64(256), results_dir=pathlib.Path("results"), weights=np.arange(3))
    objects["feature_path"] = pathlib.PureWindowsPath("C:/x")
    arguments = argparse.Namespace(model="DiT-Ti/4", global_seed=3, image_size=64, num_classes=5, vae="mse", **objects)
    wrapped = {f"module._orig_mod.{key}": value for key, value in model.state_dict().items()}
    path = tmp_path / "0050000.pt"
    torch.save(dict(model=wrapped, ema=ema.state_dict(), opt={}, args=arguments), path)
    loaded, _, meta = load_model(path)
    assert_same(loaded, ema)
    assert describe(meta) == "training checkpoint, DiT's names; EMA weights, step 50,000"
    known = dict(model="DiT-Ti/4", num_classes=5, global_seed=3)
    assert (meta.image_size, meta.vae, meta.noted) == (64, "mse", known)
    assert_same(load_model(path, ema=False)[0], model)
    assert "trained on: image_size 64, vae mse" in info(path)
    many = RunMeta(noted=dict(classes=[f"n{number:08}" for number in range(1000)]))
    (line,) = (line for line in recorded_of(many) if "n00000000" in line)
    assert len(line) < 250
    torch.save(dict(model=model.state_dict(), ema=None, args=arguments), path)
    loaded, _, meta = load_model(path)
    assert_same(loaded, model)
    assert describe(meta) == "training checkpoint, whose 'ema' is empty, DiT's names; raw weights, step 50,000"
    arguments.vae = "/somewhere/else"
    torch.save(dict(model=model.state_dict(), args=arguments), path)
    refusal(load_model, path, words="has no ema weights, only 'model': give --no-ema")
    assert load_model(path, ema=False)[2].vae is None
    torch.save(dict(ema=ema.state_dict(), args=arguments), path)
    refusal(load_model, path, ema=False, words=r"has no raw weights, only ema.\*: leave out --no-ema")
    torch.save(dict(state_dict={"encoder.weight": torch.zeros(1)}), tmp_path / "last.ckpt")
    refusal(load_model, tmp_path / "last.ckpt", words="is not a diffusion transformer .DiT")


ONE = torch.tensor(1)


def named(prefix, weights):
    return {f"{prefix}{key}": value for key, value in weights.items()}


FILES = {  # what training scripts save, by raw and averaged weights
    "timm": lambda raw, ema: dict(state_dict=raw, state_dict_ema=ema, epoch=3),
    "ema.module": lambda raw, ema: dict(model=raw, ema=dict(module=ema, decay=0.999)),
    "ema_pytorch": lambda raw, ema: dict(model=raw, ema={**named("online_model.", raw), **named("ema_model.", ema)}),
    "AveragedModel": lambda raw, ema: dict(model=raw, swa_model={**named("module.", ema), "n_averaged": ONE}),
    "Lightning": lambda raw, ema: dict(state_dict={**named("model.", raw), **named("ema_model.", ema)}),
    "its callback": lambda raw, ema: dict(state_dict=named("model.", raw), callbacks={"EMA{}": dict(ema_weights=ema)}),
    "its WeightAveraging": lambda raw, ema: dict(current_model_state=raw, state_dict=ema),
    "an optimizer": lambda raw, ema: dict(model=raw, optimizer=dict(exp_avg=raw, ema_params=ema)),
    "a list": lambda raw, ema: dict(state_dict=raw, ema=dict(shadow_params=list(ema.values()))),
    "NeMo": lambda raw, ema: dict(state_dict=raw, optimizer_states=[dict(ema=tuple(ema.values()))]),
    "no dots": lambda raw, ema: dict(
        state_dict={**named("model.", raw), **{f"model_ema.{key.replace('.', '')}": ema[key] for key in ema}}
    ),
    "two averages": lambda raw, ema: dict(model=raw, ema_0_999=ema, ema_0_9999=ema),
    "target": lambda raw, ema: dict(online=raw, target=ema),
    "slow": lambda raw, ema: dict(fast=raw, slow=ema),
    "evaluated": lambda raw, ema: dict(model=raw, eval_model=ema),
}
LIST = "keeps EMA weights as .*: save them .*, or give --no-ema"
SEVERAL = r"holds several models, {}\.\*, {}\.\*: save the state dict"
REFUSED = {  # how the averaged and the raw ones are refused; None: not looked at
    **{name: (LIST, "") for name in ("a list", "NeMo", "no dots")},
    "two averages": (SEVERAL.format("ema_0_999", "ema_0_9999"), ""),
    "target": (SEVERAL.format("online", "target"), None),
    "slow": (None, SEVERAL.format("fast", "slow")),
    "evaluated": (None, ""),
}


@pytest.mark.parametrize("name", FILES)
def test_averaged_weights_by_any_name(name, weights, tmp_path):
    """They are taken, and the raw ones with --no-ema; never the raw ones, or the first of several, in silence."""
    path, refused = save(FILES[name](*weights), tmp_path / "last.ckpt"), REFUSED.get(name, ("", ""))
    for averaged, words in zip((True, False), refused):
        if words:
            refusal(load_model, path, ema=averaged, words=words)
        elif words == "":
            model, _, meta = load_model(path, ema=averaged)
            assert_same(model, weights[averaged])
            assert meta.weights == ("ema" if averaged else "raw") or not averaged and refused[0] != ""


@pytest.mark.parametrize("name", ["model_ema.safetensors", "ema_0.9999.pt"])
def test_ema_in_a_file_beside(name, weights, tmp_path):
    """Of a folder without a record of ours; diffusers' variant non_ema is not taken for EMA weights."""
    for file, tensors in (("model.safetensors", weights[0]), (name, weights[1])):
        save(tensors, tmp_path / file)
    for ema in (True, False):
        model, _, meta = load_model(tmp_path, ema=ema)
        assert_same(model, weights[ema])
        assert meta.weights == ("ema" if ema else "raw")
    (tmp_path / name).rename(tmp_path / "model.non_ema.safetensors")
    assert load_model(tmp_path)[2].weights == "as in the file"


def test_a_label_table_without_a_null_row(weights, tmp_path):
    """The last class is never taken for the null label, where the file's arguments or its config say the classes."""
    for classes, said in ((5, ""), (4, "says 4 classes, .* 6 rows$"), (6, "trained without a null")):
        file = dict(model=weights[0], ema=weights[0], args=argparse.Namespace(num_classes=classes))
        torch.save(file, tmp_path / "0000001.pt")
        bare = save_folder(tmp_path / "bare", dict(num_classes=classes), weights[0])
        for path in (tmp_path / "0000001.pt", bare):
            if said:
                refusal(load_model, path, words=said)
            else:
                assert load_model(path)[0].y_embedder.num_classes == 5


def test_dlc_accelerate(tmp_path):
    """Names and shapes of what the DLC project's training saves, as listed from the original."""
    lines = (ROOT / "tests/goldens/dlc_accelerate.txt").read_text().splitlines()
    found = filter(None, (re.fullmatch(r"(_orig_mod\.\S+) (\(.*\)) float32", line) for line in lines))
    shapes = {one[1]: tuple(map(int, re.findall(r"\d+", one[2]))) for one in found}
    assert len(shapes) == 72
    sets = {kind: {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()} for kind in ("raw", "ema")}
    for number in (2, 10):
        (tmp_path / f"RESULTS/checkpoints/checkpoints/checkpoint_{number}").mkdir(parents=True)
    last = tmp_path / "RESULTS/checkpoints/checkpoints/checkpoint_10"
    save(sets["raw"], last / "model.safetensors")
    save(sets["ema"], last / "custom_checkpoint_0.pkl")
    save(dict(state={}), last / "optimizer.bin")
    (last / "random_states_0.pkl").write_bytes(b"\x80\x02cposix\nsystem\n")
    flags = dict(model="DiTSEM-Ti/4", image_size=64, global_batch_size=256, vae="ema", global_seed="x")
    metadata = tmp_path / "RESULTS/checkpoints/metadata.json"
    metadata.write_text(json.dumps(dict(current_epoch=3, args=flags)))
    others = ("RESULTS", "RESULTS/checkpoints", "RESULTS/checkpoints/checkpoints")
    for where, kind in ((last, "raw"), (last, "ema"), *((tmp_path / other, "ema") for other in others)):
        model, name, meta = load_model(where, ema=kind == "ema")
        assert name == "DiTSEM-Ti/4" and meta.weights == kind and meta.step is None
        assert_same(model, {key.removeprefix("_orig_mod."): value for key, value in sets[kind].items()})
    assert said(tmp_path / "RESULTS") == (
        "newest checkpoint of a DLC run, checkpoint_10, accelerate checkpoint of the DLC project, DiT's names; "
        "EMA weights, step unknown"
    )
    assert "L 16, V 16" in info(last)[0]
    assert {
        "trained on: image_size 64, vae ema",
        "with: model DiTSEM-Ti/4, global_batch_size 256, global_seed x",
    } < set(info(tmp_path / "RESULTS"))
    metadata.write_text("{")
    load_model(tmp_path / "RESULTS")
    for name, kind in (("custom_checkpoint_0.pkl", "ema"), ("model.safetensors", "raw")):
        assert torch.equal(load_model(last / name)[0].pos_embed, sets[kind]["_orig_mod.pos_embed"])
    (last / "custom_checkpoint_0.pkl").unlink()
    assert "has no EMA weights (custom_checkpoint_0.pkl): give --no-ema" in refusal(load_model, last)


# ---------------------------------------------------------------------- diffusers


@pytest.fixture(scope="module")
def reference():
    values, weights = golden("diffusers_dit")
    ours = {key[4:]: value for key, value in values.items() if key.startswith("dit/")}
    return values, weights, ours, values["config"]


def test_diffusers_golden(reference, tmp_path):
    values, weights, ours, config = reference
    folder = save_folder(tmp_path / "transformer", config, weights, TRANSFORMER)
    for time, out in (("dit", "out_dit"), ("diffusers", "out")):
        model, name, meta = load_model(folder, diffusers_time=time)
        assert name == "DiT-2x16/2" and model.blocks[0].attn.num_heads == 2
        assert_same(model, ours)
        with torch.inference_mode():
            torch.testing.assert_close(model(values["x"], values["t"], values["y"]), values[out], rtol=0, atol=1e-5)
        assert {block.norm2.eps for block in model.blocks} == {1e-6 if time == "dit" else config.get("norm_eps", 1e-5)}
        words = "DiT" if time == "dit" else "diffusers"
        assert f"DiT under diffusers' names, with the time frequencies and eps of {words} (as asked)" in describe(meta)
    assert "eps of DiT (--diffusers-time gives the other)" in said(folder)
    (folder / "config.json").write_text(json.dumps({**config, "norm_eps": 1e-6}))
    model, _, _ = load_model(folder, diffusers_time="diffusers")
    with torch.inference_mode():
        torch.testing.assert_close(model(values["x"], values["t"], values["y"]), values["out_eps6"], rtol=0, atol=1e-5)
    bare = save(tiny().state_dict(), tmp_path / "dit.pt")
    refusal(load_model, bare, diffusers_time="diffusers", words="is not in diffusers' layout")
    assert to_diffusers(ours).keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in to_diffusers(ours).items())


def shard(folder, kind, variant=""):
    """Cut the weights of a transformer folder in two shards and an index."""
    weights, placed = safetensors.torch.load_file(folder / TRANSFORMER), {}
    names = sorted(weights)
    for number, part in enumerate((names[:20], names[20:]), 1):
        file = f"diffusion_pytorch_model{variant}-0000{number}-of-00002.{kind}"
        save({name: weights[name] for name in part}, folder / file)
        placed.update(dict.fromkeys(part, file))
    (folder / TRANSFORMER).unlink()
    index = folder / f"diffusion_pytorch_model.{kind}.index{variant}.json"
    index.write_text(json.dumps(dict(metadata={}, weight_map=placed)))
    return index


def test_diffusers_folders(reference, hub, tmp_path):
    _, weights, ours, config = reference
    folder = save_folder(tmp_path / "pipe/transformer", config, weights, TRANSFORMER)
    (tmp_path / "pipe/model_index.json").write_text(json.dumps(dict(_class_name="DiTPipeline", vae=["diffusers", "x"])))

    def check(path, words):
        model, _, meta = load_model(path)
        assert_same(model, ours)
        assert "owner" not in str(path) or meta.vae == path
        assert words in describe(meta), describe(meta)
        assert "DiT-2x16/2" in info(path)[0] and "num_heads 2, num_classes 7" in info(path)[0]

    check(tmp_path / "pipe", "diffusers pipeline (DiTPipeline), DiT under diffusers' names")
    check(folder / TRANSFORMER, "DiT under diffusers' names")
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "Transformer2DModel"}))
    for kind in ("safetensors", "bin"):
        copy = shutil.copytree(tmp_path / "pipe", tmp_path / kind)
        index = shard(copy / "transformer", kind)
        check(copy, "2 shards")
        check(index, "2 shards")
    hub.add("owner/pipe", {**contents(tmp_path / "pipe"), "vae/diffusion_pytorch_model.safetensors": b"x"})
    hub.add("owner/pipe", contents(copy), revision="v2")
    check("owner/pipe", "from the hub, diffusers pipeline")
    check("owner/pipe@v2", "2 shards, DiT under")
    assert not any("vae/" in path for _, path, _ in hub.requests if "resolve" in path)
    refusal(load_pretrained, "owner/gone", tiny(), words="owner/gone")
    half = {key: value.half() for key, value in weights.items()}
    model, _, meta = load_model(
        save_folder(tmp_path / "half", config, half, "diffusion_pytorch_model.fp16.safetensors")
    )
    assert "fp16 variant" in describe(meta)
    assert_same(model, {key: value if key == "pos_embed" else value.half().float() for key, value in ours.items()})


def test_broken_diffusers_folders(reference, tmp_path):
    _, weights, _, config = reference
    folder, name = tmp_path / "transformer", "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight"
    copies = "has different copies of the time and label embedders in its blocks"
    for tensors, changes, words in (
        ({name: weights[name] + 1e-6}, {}, copies),
        ({"transformer_blocks.0.attn1.to_q.weight": torch.zeros(3)}, {}, "has to_q, to_k and to_v of different shapes"),
        ({"more": torch.zeros(1)}, {}, "has unknown more"),
        ({}, dict(activation_fn="gelu"), "is not a DiT: activation_fn in its config.json"),
        ({}, dict(norm_elementwise_affine=True), "is not a DiT: norm_elementwise_affine in its config.json"),
        ({}, dict(num_attention_heads=3), "transformer"),
        ({}, dict(sample_size="8"), "transformer"),
    ):
        refusal(
            load_model, save_folder(folder, {**config, **changes}, {**weights, **tensors}, TRANSFORMER), words=words
        )
    index = shard(save_folder(folder, config, weights, TRANSFORMER), "safetensors")
    for broken in ({"a": "/etc/passwd"}, [], {"a": "gone.safetensors"}):
        index.write_text(json.dumps(dict(weight_map=broken)))
        line = refusal(load_model, folder)
        assert refusal(load_pretrained, folder, tiny()) == refusal(info, folder) == line and str(folder) in line
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    refusal(load_model, tmp_path / "empty", words="is a diffusers pipeline without transformer/")


@pytest.mark.parametrize("generation", [1, 2])
def test_dlc_pipelines(generation, tmp_path):
    model = tiny("DiTSEM-Ti/4", L=3, V=4)
    if generation == 1:
        table = {"y_embedder.embedding_table.weight": model.sem_embedder.embedding_table}
        weights = to_diffusers(
            {**{key: value for key, value in model.state_dict().items() if "sem_" not in key}, **table}
        )
        weights = {key.replace("embedding_table.weight", "embedding_table"): value for key, value in weights.items()}
        config = dict(sample_size=8, in_channels=4, out_channels=8, dlc_l=3, dlc_v=4)
    else:
        weights, config = model.state_dict(), dict(input_size=8, in_channels=4, L=3, V=4)
    folder = save_folder(tmp_path / "pipe/transformer", config, weights, TRANSFORMER)
    index = dict(_class_name=["pipeline_dlc_dit", "DLCDiTPipeline"])
    (tmp_path / "pipe/model_index.json").write_text(json.dumps(index))
    for path in (tmp_path / "pipe", folder):
        loaded, name, _ = load_model(path)
        assert_same(loaded, model)
        assert name == "DiTSEM-Ti/4"
    assert "diffusers pipeline (DLCDiTPipeline)" in said(tmp_path / "pipe")


# ---------------------------------------------------------------------- other sizes


def test_sizes_without_a_name(tmp_path):
    model = DiT(input_size=8, patch_size=2, hidden_size=96, depth=2, num_heads=4, num_classes=3, mlp_ratio=2.3).eval()
    path = save(model.state_dict(), tmp_path / "96.pt")
    words = f'does not tell its heads: write {{"num_heads": N}} to {tmp_path / "config.json"}'
    refusal(load_model, path, words=re.escape(words))
    (tmp_path / "config.json").write_text(json.dumps(dict(num_heads=4)))
    loaded, name, _ = load_model(path)
    assert_same(loaded, model)
    assert name == "DiT-2x96/2" and loaded.blocks[0].attn.num_heads == 4
    for heads, words in ((7, "7 heads do not divide"), ("4", "num_heads is '4'"), (10**9, "num_heads is 1000000000")):
        (tmp_path / "config.json").write_text(json.dumps(dict(num_heads=heads)))
        assert words in refusal(load_model, path)


# ---------------------------------------------------------------------- what predicts something else


FLOWS = golden("flow")[0]


def of_others(whose):
    """Weights and other values of SiT's or REPA's tiny network."""
    values = {name.partition("/")[2]: value for name, value in FLOWS.items() if name.startswith(f"{whose}/")}
    tensors = {name[2:]: values.pop(name) for name in list(values) if name.startswith("w/")}
    return tensors, values


def saved(path, tensors, **arguments):
    """As a training script of theirs saves them, or with no arguments bare; beside it, the number of heads."""
    path.parent.mkdir(exist_ok=True)
    (path.parent / "config.json").write_text('{"num_heads": 2}')
    file = dict(model=tensors, ema=tensors, opt={}, args=argparse.Namespace(**arguments)) if arguments else tensors
    torch.save(file, path)
    return path


SIT = dict(path_type="Linear", prediction="velocity", num_classes=7)
REPA = dict(path_type="linear", prediction="v", enc_type="dinov2-vit-b", proj_coeff=0.5)
WAYS = (  # whose, the file, arguments, what load_model is told, words of the line
    ("sit", "0400000.pt", SIT, {}, "SiT's velocity, its time and sign turned round and its unused channels left out"),
    ("sit", "SiT-XL-2-256x256.pt", {}, {}, "SiT's velocity, its time"),
    ("sit", "bare.pt", {}, dict(process="flow"), "taken to predict a SiT's velocity"),
    ("repa", "last.pt", {}, {}, "velocity, in REPA's time, its projectors left out"),
    ("repa", "0400000.pt", REPA, {}, "velocity, in REPA's time"),
    ("repa without", "SiT-B-2.pt", {}, {}, "velocity, in REPA's time"),
)


@pytest.mark.parametrize("whose, name, arguments, told, words", WAYS)
def test_velocities(whose, name, arguments, told, words, tmp_path):
    """They load as models of our flow process: REPA's to the bit, SiT's at 1 - t with its sign turned."""
    tensors, values = of_others(whose.partition(" ")[0])
    if whose == "repa without":
        tensors = {name: value for name, value in tensors.items() if "projectors" not in name}
    path = saved(tmp_path / name, tensors, **arguments)
    model, _, meta = load_model(path, **told)
    assert words in describe(meta) and meta.process["process"] == "flow" and model.out_channels == 4
    with torch.no_grad():
        ours = model(values["x"], values["t"] if "repa" in whose else 1 - values["t"], values["y"])
    expected = values["out"] if "repa" in whose else -values["out"]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    if told == {}:
        refusal(load_model, path, process="gaussian", words="the process flow: leave out --objective")
        ours = DiT(8, 2, hidden_size=32, depth=len(model.blocks), num_heads=2, num_classes=7, learn_sigma=False)
        assert words.partition(",")[0] in load_pretrained(path, ours)
        assert_same(ours.eval(), model)


def test_velocities_that_are_refused(tmp_path):
    tensors, _ = of_others("sit")
    for change, words in (
        (dict(prediction="noise"), "of prediction 'noise': only a velocity one is read"),
        (dict(path_type="VP"), "SiT model of path_type 'VP': only a linear one"),
        ({}, "it has no final_layer.linear.bias of 1 dimensions"),
    ):
        harmed = tensors if change else {key: value for key, value in tensors.items() if "linear.bias" not in key}
        refusal(load_model, saved(tmp_path / "a.pt", harmed, **{**SIT, **change}), words=words)


OTHER_KINDS = {  # a tensor's name, and words of the line; of others' blocks the rest is a DiT's
    "module.blocks.0.mlp.w12.weight": "is a LightningDiT model, whose blocks are not DiT's",
    "decoder_blocks.0.attn.qkv.weight": "is a DDT model, whose blocks are not DiT's",
    "vocab_embed.embedding": "prior over codes",
    "blocks.0.ls1.gamma": "--encoder takes",
    "teacher.backbone.cls_token": "--encoder takes",
    "first_stage_model.decoder.conv_in.weight": "--vae takes",
    "model.diffusion_model.input_blocks.0.0.weight": "no tensor in it has a name that is known",
}


def test_other_kinds(weights, tmp_path, tiny_models):
    path = tmp_path / "lone.pt"
    for name, words in OTHER_KINDS.items():
        torch.save({**(weights[0] if "blocks are" in words else {}), name: torch.zeros(1)}, path)
        assert words in refusal(load_model, path) and path.name in refusal(info, path)
    for path, flag, words in zip(tiny_models, ("--vae", "--encoder"), ("AutoencoderKL of 4 channels", "L 6, V 300")):
        refusal(load_model, path, words=f"{flag} takes")
        (line,) = info(path)
        assert f"for {flag}: " in line and words in line, line
