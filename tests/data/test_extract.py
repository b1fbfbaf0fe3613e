"""extract_features_withdlc.py through its launcher."""

import itertools
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, L, V, assert_codes, encoder_logits, extract_command, launch
from forked import Run
from grids import grid_cells
from PIL import Image, ImageOps

from dlc.data import Features
from dlc.data.images import center_crop, normalize
from dlc.machine.noise import Stream, integers, normal
from dlc.weights.networks import load_vae


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.suffix in (".npy", ".json")}


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
def test_shards_do_not_depend_on_the_number_of_processes(features, images, tiny_models, tmp_path):
    result = launch(extract_command("torchrun", 2, images, tmp_path, tiny_models), tmp_path)
    assert contents(tmp_path) == contents(features)
    assert re.search(r"done: 14 rows of 15 images in 4 shards, 1 skipped .*" + str(tmp_path), result.stdout)
    assert re.search(r"preview.png: PSNR \d+\.\d dB\n.*warning: the VAE does not keep these images", result.stdout)


@pytest.fixture
def extract(images, tiny_models, tmp_path):
    """extract(flags…): the features of a run of its own, in a folder of its own, and what was said."""
    numbers = itertools.count()

    def run(*flags, processes=1, data=images):
        path = tmp_path / str(next(numbers))
        flags = extract_command("", 1, data, path, tiny_models, *flags)[3:]
        process = Run("extract_features_withdlc", flags, tmp_path / "output.txt", processes)
        assert process.wait(), process.said()
        rows = Features(path)
        rows.validate()
        return rows, process.said()

    return run


def everything(rows):
    all_rows = np.arange(rows.count)
    return [stack.gather(all_rows) for stack in (rows.latents, rows.codes, rows.labels, rows.paths)]


@pytest.mark.slow
def test_nor_do_they_depend_on_workers_and_threads(extract):
    """The same bytes from one core and from two, from none, one and three readers; by 1, 2 and 3 processes."""
    flags = ("--posterior", "moments", "--flip", "both", "--precision", "bf16")
    one = contents(extract("--num-workers", 0, *flags)[0].root)
    for workers, processes in ((1, 2), (3, 1), (0, 3)):
        assert contents(extract("--num-workers", workers, *flags, processes=processes)[0].root) == one


@pytest.mark.slow
def test_flips_and_posteriors(extract):
    """Of `both`, the even rows are those of `none`, and `random` takes one of the two; moments give back the sample."""
    kinds = ("--dtype", "float32", "--posterior")
    none, codes, labels, paths = everything(extract(*kinds, "mean", "--flip", "none")[0])
    both, *others = everything(extract(*kinds, "mean", "--flip", "both")[0])
    assert len(both) == 28
    np.testing.assert_allclose(both[::2], none, rtol=1e-5, atol=1e-6)  # four crops a batch, and two
    assert not np.isclose(both[1::2], none).all(axis=(1, 2, 3)).any()
    for two, one in zip(others, (codes, labels, paths)):  # the code is that of the image as it is
        np.testing.assert_array_equal(two, one.repeat(2, axis=0))

    indices = torch.tensor([index for index in range(15) if index != 9])  # 9 is broken
    flipped = integers(0, Stream.FLIP, indices, 2).numpy()
    chosen = both.reshape(14, 2, 4, 8, 8)[np.arange(14), flipped]
    rows = extract(*kinds, "moments")[0]
    moments = everything(rows)[0]
    assert moments.shape == (14, 8, 8, 8) and rows.latent_shape == (4, 8, 8) and rows.latent_kind == "moments"
    np.testing.assert_allclose(moments[:, :4], chosen, rtol=1e-5, atol=1e-6)
    noise = normal(0, Stream.POSTERIOR, indices, (4, 8, 8)).numpy()
    np.testing.assert_allclose(
        everything(extract(*kinds, "sample")[0])[0], moments[:, :4] + moments[:, 4:] * noise, rtol=1e-5, atol=1e-6
    )

    draws = everything(extract(*kinds, "sample", "--flip", "both")[0])[0].reshape(14, 2, 4, 8, 8)
    both_moments = everything(extract(*kinds, "moments", "--flip", "both")[0])[0].reshape(14, 2, 2, 4, 8, 8)
    noise = (draws - both_moments[:, :, 0]) / both_moments[:, :, 1]
    assert abs(np.corrcoef(noise[:, 0].ravel(), noise[:, 1].ravel())[0, 1]) < 0.1  # a draw for each flip
    assert 0.9 < noise.std() < 1.1


@pytest.mark.slow
def test_compiled_and_filled_up_batches_are_the_same(extract, images, tiny_models):
    """Compiled for batches of 8, of which shards of 4 and the broken image leave 4 and 3."""
    plain, compiled = (
        everything(extract("--batch-size", 8, "--dtype", "float32", *flags)[0]) for flags in ((), ("--compile",))
    )
    np.testing.assert_allclose(compiled[0], plain[0], rtol=1e-3, atol=1e-4)
    for one, two in zip(compiled[2:], plain[2:]):
        np.testing.assert_array_equal(one, two)
    logits = encoder_logits(tiny_models[1], [images / path for path in plain[3]])
    for codes in (compiled[1], plain[1]):
        assert_codes(codes, logits)


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_neighbours(images, extract, rounded, tmp_path):
    """With two images of a batch of four broken, the third and fourth have the same bytes; and so the last of a shard
    with an image fewer."""
    flags = ("--batch-size", 4, "--dtype", "float32", "--flip", "both", "--posterior", "moments")
    whole = everything(extract(*flags)[0])
    fewer = tmp_path / "fewer"
    shutil.copytree(images, fewer)
    for name in ("cat/1.png", "cat/4.png", "cat/5.png"):  # 1, 4 and 5; the last shard is 12 to 14
        (fewer / name).write_text("not an image")
    (fewer / "dog/6.png").unlink()
    rows = everything(extract(*flags, data=fewer)[0])
    copies = len(whole[0]) // 14
    kept = np.array([index for index in range(14) if index not in (1, 4, 5, 13)])
    for one, two in zip(rows, whole):
        np.testing.assert_array_equal(one, two.reshape(14, copies, *two.shape[1:])[kept].reshape(one.shape))


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

    result = run("none")
    assert result.returncode == 2 and "Traceback" not in result.stderr and not path.exists()
    assert re.search("none of the 15 images of .* can be read, as 'cat/0.png': .*git lfs pull", result.stderr)
    assert "10 skipped" in run("cat/1", "cat/2", "dog/0", "dog/2", "dog/6").stderr
    result = run("cat/1", "cat/2", "dog/0", "dog/2", "dog/6")
    assert "nothing to do; 10 of 15 images were skipped" in result.stderr
    result = run("cat", flags=("--strict",))
    assert result.returncode == 2 and "cat/0.png" not in result.stderr and "or leave out --strict" in result.stderr
    result = run("cat", "dog")
    assert "4 shards, 4 to do" in result.stderr and contents(path) == contents(features)


def test_center_crop_is_adms():
    """ADM's crop: of a 300x200 image to 64, one halving to 150x100, then 96x64, then the middle."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    expected = image.resize((150, 100), Image.Resampling.BOX).resize((96, 64), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(center_crop(image, 64), expected.crop((16, 0, 80, 64)))
    for size in ((1, 500), (64, 64), (65, 640), (1000, 64)):
        assert center_crop(Image.new("RGB", size), 64).size == (64, 64)


@pytest.mark.slow
def test_without_an_encoder(features, images, tiny_models, tmp_path):
    """Latents and labels alone; and, the flips left out, every crop as it is."""
    flags = ("--encoder", "none", "--flip", "none", "--dtype", "float32")
    launch(extract_command("forked", 1, images, tmp_path, tiny_models, *flags), tmp_path)
    rows = Features(tmp_path)
    rows.validate()
    assert (rows.count, rows.codes, rows.L, rows.V) == (14, None, None, None)
    assert rows.latents.array(0).dtype == np.float32
    flipped = integers(0, Stream.FLIP, torch.arange(15), 2).numpy()[np.arange(15) != 9].astype(bool)  # 9 is broken
    same = [
        np.allclose(one, two, atol=2e-3, rtol=2e-3)
        for one, two in zip(rows.latents.gather(np.arange(14)), Features(features).latents.gather(np.arange(14)))
    ]
    assert 0 < flipped.sum() < 14 and same == (~flipped).tolist()
