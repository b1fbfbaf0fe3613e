import json

import pytest
import torch
from conftest import golden

from dlc.encoder import SEMEncoder, convert_reference_weights, load_encoder, save_encoder

SMALL = dict(embed_dim=24, depth=2, num_heads=2)


def reference_encoder():
    return SEMEncoder("vit_small_patch14_reg4_dinov2", 224, L=3, V=4, backbone_args=SMALL).eval()


def test_agrees_with_reference():
    values, weights = golden("sem_encoder")
    encoder = reference_encoder()
    encoder.load_state_dict(convert_reference_weights(weights, encoder.backbone))
    with torch.no_grad():
        images = values["x"].float()
        torch.testing.assert_close(encoder(images), values["sem"], atol=1e-5, rtol=1e-5)
        assert torch.equal(encoder.codes(images), values["dlc"])  # whose tokens are clear by 1e-3


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"backbone.{key}",
        lambda key: f"module.backbone.{key}",
        lambda key: f"backbone._orig_mod.{key}",
        lambda key: f"backbone.{key.replace('blocks.', 'blocks.0.')}",
    ],
)
def test_checkpoint_layouts(rename):
    """The layouts that training leaves: wrapped by DDP or torch.compile, or blocks in chunks; with losses' heads."""
    _, weights = golden("sem_encoder")
    encoder = reference_encoder()
    expected = convert_reference_weights(weights, encoder.backbone)
    teacher = {**{rename(key): value for key, value in weights.items()}, "dino_head.mlp.0.weight": torch.zeros(1)}
    converted = convert_reference_weights(teacher, encoder.backbone)
    assert converted.keys() == expected.keys() == encoder.state_dict().keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)


def test_reference_checkpoint_file(tmp_path):
    """A whole ViT-S/14 with registers under DINOv2's names, through a file."""
    import timm

    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=224)
    weights = {key.replace("reg_token", "register_tokens"): value for key, value in vit.state_dict().items()}
    weights["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), weights["pos_embed"]], dim=1)
    weights.update(
        {
            "sem_embed.weight": torch.randn(12, 5 * 384),
            "sem_norm.weight": torch.ones(12),
            "sem_norm.bias": torch.zeros(12),
            "mask_token": torch.zeros(1, 384),
        }
    )
    path = tmp_path / "teacher.pth"
    torch.save({"teacher": {f"backbone.{key}": value for key, value in weights.items()}}, path)
    encoder = load_encoder(path, backbone="vit_small_patch14_reg4_dinov2", L=4, V=3)
    assert torch.equal(encoder.backbone.cls_token, vit.cls_token)
    with pytest.raises(ValueError, match=r"has other shapes.*L=4, V=5"):
        load_encoder(path, backbone="vit_small_patch14_reg4_dinov2", L=4, V=5)
    del weights["sem_norm.bias"]
    torch.save({"teacher": {f"backbone.{key}": value for key, value in weights.items()}}, path)
    with pytest.raises(ValueError, match="lacks sem_norm.bias"):
        load_encoder(path, backbone="vit_small_patch14_reg4_dinov2", L=4, V=3)


def test_save_and_load(tmp_path):
    torch.manual_seed(0)
    encoder = SEMEncoder("vit_tiny_patch16_224", 32, L=5, V=7, temperature=0.5, backbone_args=SMALL).eval()
    save_encoder(encoder, tmp_path)
    loaded = load_encoder(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        sem = loaded(images)
        assert torch.equal(sem, encoder(images))
        assert sem.shape == (2, 5, 7)
        torch.testing.assert_close(sem.sum(dim=2), torch.ones(2, 5))
        assert torch.equal(loaded.codes(images), sem.argmax(dim=2))
        torch.testing.assert_close(sem, (encoder.logits(images) / 0.5).softmax(dim=2))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "L": 6}))
    with pytest.raises(ValueError, match="has other shapes"):
        load_encoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no model.safetensors"):
        load_encoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match="L 6 there, 512 here"):
        load_encoder(tmp_path, L=512)


def test_head_reads_the_tokens_before_the_final_norm():
    encoder = SEMEncoder("vit_tiny_patch16_224", 32, L=5, V=7, backbone_args=dict(SMALL, reg_tokens=2)).eval()
    assert encoder.sem_embed.in_features == 3 * 24  # class token and two registers
    images = torch.randn(2, 3, 32, 32)
    backbone = encoder.backbone
    with torch.no_grad():
        tokens = backbone.patch_embed(images)
        tokens = backbone.norm_pre(backbone.patch_drop(backbone._pos_embed(tokens)))
        for block in backbone.blocks:
            tokens = block(tokens)
        logits = encoder.sem_norm(encoder.sem_embed(tokens[:, :3].flatten(1)))
        torch.testing.assert_close(encoder(images), logits.view(2, 5, 7).softmax(dim=2))


@pytest.mark.parametrize(
    "backbone, message",
    [
        ("vit_gigantic", "timm cannot build"),
        ("resnet18", "timm cannot build|no class"),
        ("vit_base_patch16_siglip_224", "no class or register tokens"),
    ],
)
def test_unfit_backbones_are_refused(backbone, message):
    with pytest.raises(ValueError, match=message):
        SEMEncoder(backbone)


def test_missing_encoder():
    with pytest.raises(ValueError, match="does not exist"):
        load_encoder("nowhere.pth")
