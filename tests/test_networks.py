"""demo.networks: a VAE and an encoder for any folder, that our loaders take, and that a stop does not change."""

import json

import pytest
import torch
from conftest import save_images

from demo import networks
from dlc.weights.networks import load_encoder, load_vae

FLAGS = """--image-size 16 --factor 2 --vae-width 4 --vae-steps 20 --vae-batch 4 --L 3 --V 4 --patch 8 --sem-width 6
    --sem-depth 1 --thumbnail 4 --sem-steps 20 --sem-batch 4""".split()


def build(folder, out, *more):
    networks.main(["--data-path", str(folder), "--out", str(out), *FLAGS, *more])


def weights_of(out):
    vae, encoder = load_vae(str(out / "vae")), load_encoder(out / "sem")
    return {**vae.state_dict(), **encoder.state_dict()}


def test_networks_of_a_folder(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "images"
    save_images(folder, per_class=4)
    build(folder, tmp_path / "whole")
    numbers = json.loads((tmp_path / "whole/quality.json").read_text())
    assert numbers["images"] == len(list(folder.rglob("*.png"))) and 0 < numbers["PSNR of reconstructions, dB"] < 60
    assert 0 <= numbers["dead tokens, share"] < 1 and f"{numbers['distinct codes']}\n" in capsys.readouterr().out
    vae = load_vae(str(tmp_path / "whole/vae"))
    assert networks.encode(vae, torch.zeros(1, 3, 16, 16)).shape == (1, 4, 8, 8)

    written, write_whole = [], networks.write_whole

    def write_and_stop(path, write):
        write_whole(path, write)
        written.append(path.name)
        if len(written) in (4, 17):  # within either training
            raise KeyboardInterrupt

    monkeypatch.setattr(networks, "write_whole", write_and_stop)
    for status in (130, 130):
        with pytest.raises(SystemExit) as stopped:
            build(folder, tmp_path / "stopped")
        assert stopped.value.code == status
    build(folder, tmp_path / "stopped")
    whole, continued = weights_of(tmp_path / "whole"), weights_of(tmp_path / "stopped")
    assert len(written) == 20 and all(torch.equal(continued[name], whole[name]) for name in whole)

    build(folder, tmp_path / "encoder", "--vae", str(tmp_path / "whole/vae"), "--sem-steps", "21")
    assert not (tmp_path / "encoder/vae").exists() and load_encoder(tmp_path / "encoder/sem").L == 3

    for more, message in (
        (["--L", "5"], "L 3 there, 5 here"),
        (["--patch", "7"], "--image-size 16 is not a multiple of 7 (--patch)"),
        (["--out", str(folder / "networks")], "networks lies in --data-path"),
        (["--heldout-path", str(tmp_path / "whole")], "--heldout-path"),
    ):
        with pytest.raises(SystemExit):
            build(folder, tmp_path / "whole", *more)
        assert message in capsys.readouterr().err
    (tmp_path / "stopped/vae.training.pt").write_bytes(b"garbage")
    with pytest.raises(SystemExit):
        build(folder, tmp_path / "stopped")
    assert "vae.training.pt cannot be read as weights" in capsys.readouterr().err
    (folder / "cat/broken.png").write_bytes(b"")
    assert len(networks.load_images(str(folder), 16, "--data-path")[0]) == 8
    assert "1 of 9 images cannot be read, as cat/broken.png (" in capsys.readouterr().out
    monkeypatch.setattr(networks.Views, "load", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="cannot read .*cat/0.png' .*: fix the file"):  # may be readable at the next try
        networks.load_images(str(folder), 16, "--data-path")


def test_what_moves_into_a_picture_has_its_edges_colour():
    """White pictures stay white, whichever way they are turned, but for the brightness."""
    distort = networks.Distortion(torch.full((3, 16, 16, 3), 255, dtype=torch.uint8))
    moved = distort(torch.ones(8, 3, 16, 16), torch.Generator().manual_seed(0))
    assert (moved.flatten(1).max(dim=1).values - moved.flatten(1).min(dim=1).values).max() < 1e-5
