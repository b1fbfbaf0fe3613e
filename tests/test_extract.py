"""extract_features_withdlc.py through its launcher."""
import json
import re
import shutil

import numpy as np
import torch
from conftest import IMAGE_SIZE, L, V, extract_command, launch
from PIL import Image, ImageOps

from dlc.encoder import load_encoder
from dlc.features import Features, kind_dir
from dlc.latents import IMAGENET_MEAN, IMAGENET_STD, center_crop, load_vae, normalize
from dlc.noise import Stream, integers, normal


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.suffix in (".npy", ".json")}


def test_rows_are_what_the_contract_says(features, images, tiny_models):
    rows = Features(features)
    rows.validate()
    assert (rows.count, rows.image_size, rows.L, rows.V, rows.num_classes) == (14, IMAGE_SIZE, L, V, 2)
    assert rows.codes.array(0).dtype == np.uint16 and rows.latents.array(0).dtype == np.float16
    assert [shard["rows"] for shard in rows.manifest["shards"]] == [4, 4, 3, 3]
    assert [path for path, _ in rows.manifest["skipped"]] == ["dog/1_broken.jpg"]
    assert Image.open(features / "preview.png").size == (8 * IMAGE_SIZE, 2 * IMAGE_SIZE)

    # row 3 and, after the broken file, row 13: index 14 of the data set
    vae, encoder = load_vae(tiny_models[0]), load_encoder(tiny_models[1])
    for row, index, name in ((3, 3, "cat/3.png"), (13, 14, "dog/6.png")):
        assert rows.paths.gather([row])[0] == name
        assert rows.labels.gather([row])[0] == ("cat", "dog").index(name[:3])
        image = Image.open(images / name).convert("RGB")
        crop = center_crop(image, IMAGE_SIZE)
        if integers(0, Stream.FLIP, torch.tensor([index]), 2).item():
            crop = ImageOps.mirror(crop)
        with torch.inference_mode():
            posterior = vae.encode(normalize(torch.from_numpy(np.array(crop))[None])).latent_dist
            noise = normal(0, Stream.POSTERIOR, torch.tensor([index]), (4, 8, 8))
            latent = (posterior.mean + posterior.std * noise) * vae.config.scaling_factor
            code = encoder.codes(normalize(torch.from_numpy(np.array(center_crop(image, 32)))[None], IMAGENET_MEAN, IMAGENET_STD))
        np.testing.assert_allclose(rows.latents.gather([row])[0], latent[0].numpy(), atol=2e-3, rtol=2e-3)
        np.testing.assert_array_equal(rows.codes.gather([row])[0], code[0].numpy())


def test_shards_do_not_depend_on_the_number_of_processes(features, images, tiny_models, tmp_path):
    result = launch(extract_command("torchrun", 2, images, tmp_path, tiny_models), tmp_path)
    assert contents(tmp_path) == contents(features)
    assert re.search(r"done: 14 rows of 15 images in 4 shards, 1 skipped .*" + str(tmp_path), result.stdout)


def test_without_an_encoder(features, images, tiny_models, tmp_path):
    """Latents and labels alone; and, the flips left away, every crop as it is."""
    flags = ("--encoder", "none", "--flip", "none", "--dtype", "float32")
    launch(extract_command("python", 1, images, tmp_path, tiny_models, *flags), tmp_path)
    rows = Features(tmp_path)
    rows.validate()
    assert (rows.count, rows.codes, rows.L, rows.V) == (14, None, None, None)
    assert rows.latents.array(0).dtype == np.float32
    flipped = integers(0, Stream.FLIP, torch.arange(15), 2).numpy()[np.arange(15) != 9].astype(bool)      # 9 is broken
    same = [np.allclose(one, two, atol=2e-3, rtol=2e-3) for one, two in zip(
        rows.latents.gather(np.arange(14)), Features(features).latents.gather(np.arange(14)))]
    assert 0 < flipped.sum() < 14 and same == (~flipped).tolist()


def test_a_run_that_was_cut_off_is_completed(features, images, tiny_models, tmp_path):
    shutil.copytree(features, tmp_path, dirs_exist_ok=True)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").unlink()
    settings = {key: value for key, value in manifest.items() if key not in ("count", "shards", "skipped")}
    (tmp_path / "progress").mkdir()
    (tmp_path / "progress/settings.json").write_text(json.dumps(settings))
    for shard in (0, 2):                                                    # done; 1 and 3 were not
        record = dict(rows=manifest["shards"][shard]["rows"], skipped=manifest["skipped"] if shard == 2 else [])
        (tmp_path / f"progress/{shard:06d}.json").write_text(json.dumps(record))
    untouched = kind_dir(tmp_path, IMAGE_SIZE, "features") / "000000.npy"
    before = untouched.stat().st_mtime_ns
    kind_dir(tmp_path, IMAGE_SIZE, "features").joinpath("000003.npy").unlink()
    command = extract_command("python", 1, images, tmp_path, tiny_models)
    result = launch(command, tmp_path)
    assert "4 shards, 2 to do" in result.stdout
    assert contents(tmp_path) == contents(features)
    assert untouched.stat().st_mtime_ns == before
    assert "is complete; nothing to do" in launch(command, tmp_path).stdout


def test_center_crop_is_adms():
    """ADM's crop: of a 300x200 image to 64, one halving to 150x100, then 96x64, then the middle."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    expected = image.resize((150, 100), Image.Resampling.BOX).resize((96, 64), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(center_crop(image, 64), expected.crop((16, 0, 80, 64)))
    for size in ((1, 500), (64, 64), (65, 640), (1000, 64)):
        assert center_crop(Image.new("RGB", size), 64).size == (64, 64)
