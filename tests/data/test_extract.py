"""extract_features_withdlc.py through its launcher."""

import re
import shutil

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, L, V, assert_codes, encoder_logits, extract_command, launch, tiny_vae
from forked import Run
from grids import grid_cells
from PIL import Image, ImageOps

from dlc.data import Features
from dlc.data.images import center_crop, normalize
from dlc.machine.noise import Stream, integers, normal
from dlc.nets.pixels import PixelEncoder
from dlc.weights.networks import load_encoder, load_vae

INDICES = torch.tensor([index for index in range(15) if index != 9])  # of the rows; image 9 is broken
BOTH = ("--dtype", "float32", "--posterior", "moments", "--flip", "both")


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.suffix in (".npy", ".json")}


@pytest.fixture(scope="module")
def extract(images, tiny_models, tmp_path_factory):
    """extract(flags…): the features of a run of its own, in a folder of its own."""

    def run(*flags, processes=1, data=images):
        root = tmp_path_factory.mktemp("run")
        flags = extract_command("", 1, data, root / "features", tiny_models, *flags)[3:]
        process = Run("extract_features_withdlc", flags, root / "output.txt", processes)
        assert process.wait(), process.said()
        rows = Features(root / "features")
        rows.validate()
        return rows

    return run


@pytest.fixture(scope="module")
def both(extract):
    """Features by one process without readers: moments of both flips."""
    return extract("--num-workers", 0, *BOTH)


def everything(rows):
    return [stack.gather(np.arange(rows.count)) for stack in (rows.latents, rows.codes, rows.labels, rows.paths)]


@pytest.mark.slow
def test_rows_are_what_the_contract_says(features, images, tiny_models):
    rows = Features(features)
    rows.validate()
    assert (rows.count, rows.image_size, rows.L, rows.V, rows.num_classes) == (14, IMAGE_SIZE, L, V, 2)
    assert rows.codes.array(0).dtype == np.uint16 and rows.latents.array(0).dtype == np.float16
    assert [shard["rows"] for shard in rows.manifest.shards] == [4, 4, 3, 3]
    assert [path for path, _ in rows.manifest.skipped] == ["dog/1_broken.jpg"]
    assert len(grid_cells(features / "preview.png", IMAGE_SIZE, 8, captions=True)) == 2

    # row 3 and, after the broken file, row 13: index 14 of the data set
    vae = load_vae(tiny_models[0])
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
        np.testing.assert_allclose(rows.latents.gather([row])[0], latent[0].numpy(), atol=2e-3, rtol=2e-3)
        assert_codes(rows.codes.gather([row]), encoder_logits(tiny_models[1], [images / name]))


@pytest.mark.slow
def test_shards_do_not_depend_on_processes_and_readers(features, images, both, extract, tiny_models, tmp_path):
    """The same bytes by 1, 2 and 3 processes, from none, one and three readers."""
    data, path = shutil.copytree(images, tmp_path / "images"), tmp_path / "features"
    (data / "cat/moving.gif").touch()
    result = launch(extract_command("torchrun", 2, data, path, tiny_models), tmp_path)
    assert contents(path) == contents(features)
    assert result.stdout.count(f"warning: --data-path {data}: left out 1 .gif") == 1
    assert re.search(r"done: 14 rows of 15 images in 4 shards, 1 skipped .*" + str(path), result.stdout)
    assert re.search(r"preview.png: PSNR \d+\.\d dB\n.*warning: the VAE does not keep these images", result.stdout)
    for workers, processes in ((3, 1), (0, 3)):
        rows = extract("--num-workers", workers, *BOTH, processes=processes)
        assert contents(rows.root) == contents(both.root)


@pytest.mark.slow
def test_flips_and_posteriors(features, both, extract):
    """`random` takes one of the two flips; a sample is mean and std times noise; latents without an encoder."""
    assert both.latent_shape == (4, 8, 8) and both.latent_kind == "moments"
    stored, *others = everything(both)
    moments = stored.reshape(14, 2, 2, 4, 8, 8)  # image, flip, mean or std
    random, *once = everything(Features(features))
    for twice, one in zip(others, once):  # the code is that of the image as it is
        np.testing.assert_array_equal(twice, one.repeat(2, axis=0))
    flipped = integers(0, Stream.FLIP, INDICES, 2).numpy()
    assert 0 < flipped.sum() < 14
    mean, std = moments[np.arange(14), flipped].swapaxes(0, 1)
    noise = normal(0, Stream.POSTERIOR, INDICES, (4, 8, 8)).numpy()
    np.testing.assert_allclose(random, mean + std * noise, atol=2e-3, rtol=2e-3)

    means = extract("--encoder", "none", "--flip", "none", "--dtype", "float32", "--posterior", "mean")
    assert (means.count, means.codes, means.L, means.V) == (14, None, None, None)
    none = means.latents.gather(np.arange(14))
    np.testing.assert_allclose(none, moments[:, 0, 0], rtol=1e-5, atol=1e-6)  # two crops a batch, and four
    assert not np.isclose(none, moments[:, 1, 0]).all(axis=(1, 2, 3)).any()

    draws = everything(extract(*BOTH, "--posterior", "sample"))[0].reshape(14, 2, 4, 8, 8)
    drawn = (draws - moments[:, :, 0]) / moments[:, :, 1]
    np.testing.assert_allclose(drawn[:, 0], noise, atol=1e-2)
    assert abs(np.corrcoef(*drawn.swapaxes(0, 1).reshape(2, -1))[0, 1]) < 0.1  # a draw for each flip
    assert 0.9 < drawn[:, 1].std() < 1.1


@pytest.mark.slow
def test_filled_up_batches_are_the_same(both, extract, images, tiny_models):
    """Of 8, of which shards of 4 and the broken image leave 4 and 3; and also where a network is compiled for them."""
    latents, codes, *others = everything(extract("--batch-size", 8, *BOTH))
    plain = everything(both)
    np.testing.assert_allclose(latents, plain[0], rtol=1e-3, atol=1e-4)
    for one, two in zip(others, plain[2:]):
        np.testing.assert_array_equal(one, two)
    assert_codes(codes[::2], encoder_logits(tiny_models[1], [images / path for path in plain[3][::2]]))
    views = torch.randint(255, (3, 32, 32, 3), dtype=torch.uint8)
    compiled = PixelEncoder(tiny_vae(), load_encoder(tiny_models[1]), torch.device("cpu"), compile=True)
    with torch.inference_mode():
        assert_codes(compiled.codes(views, 8), load_encoder(tiny_models[1]).encode_pixels(views))


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_neighbours(images, extract, rounded, tmp_path):
    """With two images of a batch of four broken, the third and fourth have the same bytes; and so the last of a shard
    with an image fewer."""
    whole = everything(extract("--batch-size", 4, *BOTH))
    fewer = shutil.copytree(images, tmp_path / "fewer")
    for name in ("cat/1.png", "cat/4.png", "cat/5.png"):  # 1, 4 and 5; the last shard is 12 to 14
        (fewer / name).write_text("not an image")
    (fewer / "dog/6.png").unlink()
    kept = [index for index in range(14) if index not in (1, 4, 5, 13)]
    for one, two in zip(everything(extract("--batch-size", 4, *BOTH, data=fewer)), whole):
        np.testing.assert_array_equal(one, two.reshape(14, 2, *two.shape[1:])[kept].reshape(one.shape))


@pytest.mark.slow
def test_images_that_are_mended_later(features, images, tiny_models, tmp_path):
    """Where none can be read nothing is left; some are skipped; once all can, it is as if all always could."""
    data, path = shutil.copytree(images, tmp_path / "images"), tmp_path / "features"
    good = {file: file.read_bytes() for file in data.rglob("*.png")}

    def run(*mended, flags=()):
        for file in good:
            text = b"version https://git-lfs.github.com/spec/v1\n"
            file.write_bytes(good[file] if str(file.relative_to(data)).startswith(mended) else text)
        return launch(extract_command("forked", 1, data, path, tiny_models, *flags), tmp_path, check=False)

    result, some = run("none"), ("cat/1", "cat/2", "dog/0", "dog/2", "dog/6")
    assert result.returncode == 2 and "Traceback" not in result.stderr and not path.exists()
    assert re.search("none of the 15 images of .* can be read, as 'cat/0.png': .*git lfs pull", result.stderr)
    assert "10 skipped" in run(*some).stderr
    assert "nothing to do; 10 of 15 images were skipped" in run(*some).stderr
    result = run("cat", flags=("--strict",))
    assert result.returncode == 2 and "cat/0.png" not in result.stderr and "or leave out --strict" in result.stderr
    assert "4 shards, 4 to do" in run("cat", "dog").stderr and contents(path) == contents(features)


def test_center_crop_is_adms():
    """ADM's crop: of a 300x200 image to 64, one halving to 150x100, then 96x64, then the middle."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    expected = image.resize((150, 100), Image.Resampling.BOX).resize((96, 64), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(center_crop(image, 64), expected.crop((16, 0, 80, 64)))
