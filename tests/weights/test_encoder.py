import json
import re
from pathlib import Path

import pytest
import torch
from conftest import change_json, golden, refusal
from tiny_weights import contents, save, save_folder

from dlc.nets.digest import weights_sha256
from dlc.nets.encoder import SEMEncoder, save_encoder
from dlc.weights.foreign.encoders import state_dict_of
from dlc.weights.foreign.layouts import File, unpack
from dlc.weights.foreign.names import names_of, read_foreign
from dlc.weights.networks import load_encoder

SMALL = dict(embed_dim=24, depth=2, num_heads=2)


def test_agrees_with_reference():
    values, weights = golden("sem_encoder")
    encoder = SEMEncoder("vit_small_patch14_reg4_dinov2", 224, L=3, V=4, backbone_args=SMALL).eval()
    file = File("x", Path("x"), "encoder", tensors=weights)
    unpack(file)
    encoder.load_state_dict(state_dict_of(names_of(file), encoder.backbone))
    with torch.no_grad():
        images = values["x"].float()
        torch.testing.assert_close(encoder(images), values["sem"], atol=1e-5, rtol=1e-5)
        assert torch.equal(encoder.codes(images), values["dlc"])  # whose tokens are clear by 1e-3


def test_save_and_load(tmp_path):
    torch.manual_seed(0)
    encoder = SEMEncoder("vit_tiny_patch16_224", 32, L=5, V=7, temperature=0.5, backbone_args=SMALL).eval()
    save_encoder(encoder, tmp_path)
    loaded = load_encoder(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        sem = loaded(images)
        assert torch.equal(sem, encoder(images)) and torch.equal(loaded.codes(images), sem.argmax(dim=2))
        torch.testing.assert_close(sem, (encoder.logits(images) / 0.5).softmax(dim=2))
    change_json(tmp_path / "config.json", L=6)
    refusal(load_encoder, tmp_path, words="has other shapes")
    refusal(load_encoder, tmp_path, L=512, words="L 6 there, 512 here")
    (tmp_path / "model.safetensors").unlink()
    refusal(load_encoder, tmp_path, words="model.safetensors does not exist")


# ---------------------------------------------------------------------- published layouts


@pytest.fixture(scope="module")
def published():
    """Reference values, the configuration, and the weights as transformers' files have them."""
    values, weights = golden("dinov2_registers_sem")
    return values, values["config"], weights


def check(encoder, values):
    """It computes the published embeddings and codes, in float32."""
    assert {(one.dtype, one.is_meta) for one in encoder.parameters()} == {(torch.float32, False)}
    with torch.inference_mode():
        torch.testing.assert_close(encoder(values["pixel_values"]), values["sem"], atol=1e-5, rtol=1e-7)
        assert torch.equal(encoder.codes(values["pixel_values"]), values["dlc"])


def renamed(weights, prefix="", *changes):
    """The backbone's tensors under other names, the head's under their own."""

    def name(key):
        for old, new in changes:
            key = re.sub(old, new, key)
        return prefix + key

    return {key if key.startswith("sem_") else name(key): value for key, value in weights.items()}


# the modules of transformers 5, which `torch.save(model.state_dict())` writes
OF_5 = [(r"(attention\.)+([qkv])(uery|ey|alue)", r"attention.\2_proj")]
OF_5 += [(r"attention\.output\.dense", "attention.o_proj")]


def dinov2_names(weights, encoder, prefix=""):
    """The names of DINOv2 for transformers' weights, which are an encoder's by now; they are all but timm's."""
    named = {name.removeprefix("backbone."): value for name, value in encoder.state_dict().items()}
    named["register_tokens"], named["pos_embed"] = named.pop("reg_token"), weights["embeddings.position_embeddings"]
    named |= {name: weights[f"embeddings.{name}"] for name in ("cls_token", "mask_token")}
    named |= {f"norm.{kind}": weights[f"layernorm.{kind}"] for kind in ("weight", "bias")}
    return renamed(named, prefix)


@pytest.mark.parametrize(
    "prefix, changes, file",
    [
        ("", [], "model.safetensors"),
        ("", OF_5, "pytorch_model.bin"),
        ("backbone.", [], "pytorch_model.bin"),
        ("model.dinov2_with_registers.", OF_5, "model.safetensors"),
    ],
)
def test_transformers(published, tmp_path, prefix, changes, file):
    values, config, weights = published
    encoder = load_encoder(save_folder(tmp_path, config, renamed(weights, prefix, *changes), file))
    check(encoder, values)
    assert (encoder.L, encoder.V, encoder.temperature, encoder.image_size) == (8, 8, 1.0, 224)
    assert encoder.said == (
        "transformers' names, ViT of width 16 with 2 blocks and 4 registers, L=8, V=8 (by its config.json), "
        "224x224 pixels"
    )
    check(load_encoder(tmp_path / file), values)  # the file of the folder
    save_encoder(encoder, tmp_path / "ours")
    check(load_encoder(tmp_path / "ours"), values)


def test_dinov2s_and_timms_names(published, tmp_path):
    values, config, weights = published
    encoder = load_encoder(save_folder(tmp_path / "folder", config, weights, "pytorch_model.bin"))
    timm_names = {key.removeprefix("backbone."): value for key, value in encoder.state_dict().items()}
    teacher = dinov2_names(weights, encoder, "module.backbone._orig_mod.")
    in_chunks = {key.replace("blocks.", "blocks.0."): value for key, value in teacher.items()}
    for layout, named in (
        ("DINOv2's names", dinov2_names(weights, encoder)),
        ("DINOv2's names", {"teacher": dinov2_names(weights, encoder, "backbone.")}),
        ("DINOv2's names", {"teacher": {**in_chunks, "dino_head.mlp.0.weight": torch.zeros(1)}}),
        ("timm's names, ViT of width 16", timm_names),
    ):
        loaded = load_encoder(save_folder(tmp_path / "folder", config, named, "pytorch_model.bin"))
        check(loaded, values)
        assert loaded.said.startswith(layout)


def test_timm(tmp_path):
    import timm

    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=518, depth=2)
    head = {"sem_embed.weight": torch.randn(12, 5 * 384), "sem_norm.weight": torch.ones(12)}
    weights = {**vit.state_dict(), **head, "sem_norm.bias": torch.zeros(12)}
    assert vit.pos_embed.shape[1] == 37**2
    encoder = load_encoder(save(weights, tmp_path / "timm.pth"), L=4)
    assert encoder.config["backbone"] == "vit_small_patch14_reg4_dinov2"
    assert encoder.config["backbone_args"] == dict(depth=2) and (encoder.L, encoder.V) == (4, 3)
    assert encoder.backbone.pos_embed.shape[1] == 16**2
    weights["pos_embed"] = torch.cat([torch.ones(1, 1, 384), weights["pos_embed"]], dim=1)  # not folded in
    unfolded = load_encoder(save(weights, tmp_path / "timm.pth"), L=4).state_dict()
    torch.testing.assert_close(unfolded.pop("backbone.cls_token"), vit.cls_token + 1)
    assert all(torch.equal(unfolded[key], value) for key, value in encoder.state_dict().items() if key in unfolded)


def test_sizes_are_read_before_anything_is_built(tmp_path, monkeypatch):
    import timm

    for module in ("encoders", "names"):
        monkeypatch.setattr(f"dlc.weights.foreign.{module}.check_tensors", lambda tensors, path: tensors)
    (tmp_path / "x.pth").touch()
    for size, width, depth, registers in (("giant", 1536, 40, 4), ("base", 768, 12, 0)):
        with torch.device("meta"):
            name = f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2"
            vit = timm.create_model(name, num_classes=0, img_size=518)
            weights = {**vit.state_dict(), "sem_embed.weight": torch.zeros(512 * 256, (1 + registers) * width)}
            weights |= {f"sem_norm.{kind}": torch.zeros(512 * 256) for kind in ("weight", "bias")}
        monkeypatch.setattr("dlc.weights.foreign.layouts.load_tensors", lambda path, weights=weights: dict(weights))
        _, found, file = read_foreign("x.pth", tmp_path / "x.pth", "encoder", given={})
        assert found == dict(L=512, V=256, backbone=name, backbone_args={}, image_size=224)
        assert f"ViT of width {width} with {depth} blocks and {registers} registers, L=512, V=256 (the" in file.said


def test_configurations(published, tmp_path):
    values, config, weights = published
    nested = dict(model_type="sem", backbone_config={**config, "L": None, "V": None}, L=8, temp=0.5)
    encoder = load_encoder(save_folder(tmp_path, nested, weights))
    assert (encoder.L, encoder.V, encoder.temperature) == (8, 8, 0.5)
    encoder.temperature = 1.0
    check(encoder, values)
    refusal(load_encoder, tmp_path, L=4, words="L 8 there, 4 here; leave out the flag")
    tempered = save_folder(tmp_path, config, {**weights, "temp": torch.tensor(0.25)})
    assert load_encoder(tempered).temperature == 0.25
    for change, message in (
        (dict(L=7), "has other shapes: sem_embed.weight"),
        (dict(L=7, V=None), "has a head of 64 numbers, no multiple of L 7"),
        (dict(L=None, V=None), "does not say how its head's 64 numbers are L times V: give --L"),
        (dict(L="8"), "says L '8' in its config.json, wanted a whole number"),
        (dict(temp=0), "temperature is 0, wanted a number from 1e-06"),
        (dict(hidden_act="relu"), "config.json: hidden_act is 'relu', wanted gelu"),
        (dict(hidden_size=32), "config.json: hidden_size is 32, wanted 16"),
        (dict(num_attention_heads=None), "has width 16, none of DINOv2's, and no config.json that says its number"),
        (dict(num_attention_heads=3), "timm cannot build"),
    ):
        refusal(load_encoder, save_folder(tmp_path, {**config, **change}, weights), words=message)
    save_folder(tmp_path, config, weights)
    for processor, message in (
        (dict(crop_size=dict(height=28, width=28)), ""),
        (dict(image_mean=[0.5] * 3), "image_mean is .*, wanted ImageNet's"),
        (dict(crop_size=dict(height=10**9)), "image_size is 1000000000"),
        (dict(crop_size=225), "not a multiple of its patch"),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
        if message:
            refusal(load_encoder, tmp_path, words=message)
        else:
            assert load_encoder(tmp_path).image_size == 28


def test_what_is_no_sem_encoder(published, tmp_path):
    _, config, weights = published
    bare = {key: value for key, value in weights.items() if not key.startswith("sem_")}
    head = {key: value for key, value in weights.items() if key.startswith("sem_")}
    for tensors, message in (
        (bare, r"has a backbone, but no SEM head \(sem_embed, sem_norm\), which DINOv2 alone does not have"),
        (head, "has no ViT backbone .*: wanted the weights of a SEM encoder"),
        ({"x": torch.zeros(1)}, "is not an encoder of images: no tensor in it has a name that is known"),
        ({**weights, "sem_embed.weight": torch.zeros(64)}, "has no sem_embed.weight of 2 dimensions"),
        ({**weights, "embeddings.position_embeddings": torch.zeros(1, 12, 16)}, "has other shapes: backbone.pos_embed"),
        (
            {**weights, "encoder.layer.0.mlp.fc1.weight": torch.zeros(70, 16)},
            "has width 16 and a gated MLP, other than",
        ),
    ):
        refusal(load_encoder, save_folder(tmp_path, config, tensors, "pytorch_model.bin"), words=message)
    none = {key: value for key, value in weights.items() if "layernorm" not in key}
    none["embeddings.cls_token"] = torch.zeros(1, 1, 0)
    refusal(load_encoder, save_folder(tmp_path / "none", dict(L=8), none), words="has width 0, none of DINOv2's")


def test_from_the_hub(published, hub):
    values, config, weights = published
    folder = save_folder(Path("sem"), {**config, "L": None, "V": None}, weights)
    hub.add("lavoies/SEM_dinov2_L8", {**contents(folder), "modeling_sem.py": b"raise SystemExit"})
    encoder = load_encoder("lavoies/SEM_dinov2_L8")
    check(encoder, values)
    assert encoder.said.startswith("from the hub, transformers' names") and "L=8, V=8 (by its name)" in encoder.said


def test_the_final_norm_of_published_weights(published, tmp_path):
    """Where a file has its scale and shift they are used, and neither codes nor the digest depend on them."""
    _, config, weights = published
    plain = {key: value for key, value in weights.items() if "layernorm" not in key}
    norm = [weights[f"layernorm.{name}"] for name in ("weight", "bias")]
    learned, plain = (load_encoder(save_folder(tmp_path, config, tensors)) for tensors in (weights, plain))
    pixels = torch.randint(255, (2, 224, 224, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected = plain.patch_tokens(pixels) * norm[0] + norm[1]
        torch.testing.assert_close(learned.patch_tokens(pixels), expected)
        assert learned.patch_tokens(pixels).shape == (2, *learned.patch_shape) == (2, 256, 16)
    assert weights_sha256(learned) == weights_sha256(plain)
