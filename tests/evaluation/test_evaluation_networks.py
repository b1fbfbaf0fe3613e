"""The networks against other implementations, with seeded weights; their files, and the fetching of these."""

import functools
import hashlib
import http.server
import math
import struct
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from dlc.weights.foreign.safe import load_tensors
from dlc.weights.hub import fetch_file
from evaluation import networks
from evaluation.dinov2 import load_dinov2, preprocess, resample_positions
from evaluation.graph_def import read_constants
from evaluation.inception import InceptionV3
from evaluation.inception_weights import load_inception, tensorflow_names


@functools.cache
def seeded_inception():
    """Inception with random weights whose activations neither vanish nor explode."""
    torch.manual_seed(0)
    network = InceptionV3()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.normal_(0, 1.6 / math.sqrt(module.weight[0].numel()))
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.weight.normal_(1, 0.1)
            module.bias.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    network.fc.weight.normal_(0, 0.02)
    network.fc.bias.normal_()
    return network


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """The seeded weights as the published file has them: by torch before 1.6."""
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(seeded_inception().state_dict(), path, _use_new_zipfile_serialization=False)
    return path


def same(one, other):
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_inception_is_torch_fidelitys(inception_file):
    """Pool, spatial features (by a hook, flattened as TensorFlow lays them out) and the softmax without the bias."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    oracle = FeatureExtractorInceptionV3(
        "oracle", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file)
    )
    spatial = []
    oracle.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, inputs, output: spatial.append(output[:, :7].permute(0, 2, 3, 1).flatten(1))
    )
    images = torch.randint(0, 256, (1, 3, 64, 80), dtype=torch.uint8)
    with torch.inference_mode():
        pool, logits = oracle(images)
        network = load_inception(inception_file)
        found = network(images)
    assert found[0].shape == (1, 2048) and found[1].shape == (1, 2023) and found[1].std() > 0.01
    torch.testing.assert_close(found[0], pool, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], spatial[0], rtol=1e-5, atol=1e-5)
    probabilities = network.probabilities(found[0])
    assert probabilities.shape == (1, 1008)
    torch.testing.assert_close(probabilities, torch.softmax(logits, dim=1), rtol=1e-5, atol=1e-5)


def test_both_layouts_of_the_published_names(inception_file, tmp_path):
    """With and without num_batches_tracked, in torch's old and new format: 566 or 472 tensors."""
    network = seeded_inception()
    weights = network.state_dict()
    few = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    assert (len(weights), len(few)) == (566, 472)
    torch.save(few, tmp_path / "new.pth")
    for path in (inception_file, tmp_path / "new.pth"):
        assert same(load_inception(path), network), path


#################################################################################
#                              TensorFlow's graph                               #
#################################################################################


def varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def message(number, value):
    """A field of a protobuf message: an int, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def const_node(name, array, packed=True, dtype=1):
    """A NodeDef of a constant, its values in tensor_content, or in float_val one by one."""
    shape = b"".join(message(2, message(1, side)) for side in array.shape)
    values = array.astype("<f4")
    content = (
        message(4, values.tobytes())
        if packed
        else b"".join(varint(5 << 3 | 5) + struct.pack("<f", one) for one in values.ravel())
    )
    tensor = message(1, dtype) + message(2, shape) + content
    attributes = message(5, message(1, b"dtype") + message(2, message(6, dtype)))
    attributes += message(5, message(1, b"value") + message(2, message(8, tensor)))
    return message(1, name.encode()) + message(2, b"Const") + attributes


def save_graph(path, nodes):
    path.write_bytes(b"".join(message(1, node) for node in nodes) + message(4, message(1, 21)))  # versions last
    return path


def test_tensorflows_graph(tmp_path):
    """All 472 constants, laid out as TensorFlow has them, beside nodes of other kinds: the same weights."""
    network = seeded_inception()
    weights, nodes = network.state_dict(), [message(1, b"ExpandDims") + message(2, b"ExpandDims")]
    for theirs, ours in tensorflow_names().items():
        array = weights[ours].numpy()
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T if array.ndim == 2 else array
        nodes.append(const_node(theirs, np.ascontiguousarray(array), packed=array.ndim > 1 or "beta" not in theirs))
    nodes.append(const_node("pool_3/_reshape/shape", np.zeros(2), dtype=3))
    assert len(nodes) == 474
    path = save_graph(tmp_path / "classify_image_graph_def.pb", nodes)
    assert same(load_inception(path), network)
    save_graph(tmp_path / "less.pb", nodes[-2:])
    with pytest.raises(ValueError, match="less.pb is not of the 2015 Inception.*lacks"):
        load_inception(tmp_path / "less.pb")


def test_hostile_graphs(tmp_path):
    """Cut off, of another kind, or lying about lengths and shapes: one line, and no memory."""
    good = save_graph(tmp_path / "good.pb", [const_node("a", np.arange(6.0).reshape(2, 3))])
    assert read_constants(good)["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    whole = good.read_bytes()
    huge = message(2, message(2, message(1, 2**40)) * 3)
    for content in (
        whole[: len(whole) // 2],
        b"",
        b"not a graph at all" * 9,
        varint(1 << 3 | 2) + varint(2**60) + b"x",
        b"\xff" * 40,
        varint(1 << 3 | 3),
        message(1, message(2, b"Const") + message(5, message(1, b"value") + message(2, 7))),
        message(
            1, message(2, b"Const") + message(5, message(1, b"value") + message(2, message(8, message(1, 1) + huge)))
        ),
        message(1, message(1, b"\xff\xfe") + message(2, b"Const")),
    ):
        (tmp_path / "bad.pb").write_bytes(content)
        with pytest.raises(ValueError, match="bad.pb cannot be read as a TensorFlow graph: .+"):
            read_constants(tmp_path / "bad.pb")


#################################################################################
#                            torch before 1.6, and digests                      #
#################################################################################


class Call:
    def __reduce__(self):
        return print, ("called",)


def test_hostile_old_files(tmp_path, capsys):
    """No call, no memory, one line."""
    path = tmp_path / "old.pth"
    tensors = dict(a=torch.arange(6.0).reshape(2, 3).T, b=torch.zeros(3, dtype=torch.float16))
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    assert all(torch.equal(tensors[key], value) for key, value in load_tensors(path).items())
    whole = path.read_bytes()
    torch.save(dict(a=Call()), tmp_path / "call.pth", _use_new_zipfile_serialization=False)
    for content, words in (
        (whole[:-8], "cut off"),
        (whole[:40], "cut off or damaged"),
        (b"\x80\x02" + b"junk" * 50, "no file of torch.save"),
        (whole.replace(b"torch\nFloatStorage", b"builtins\ngetattr\x00"), "cut off or damaged|may only hold tensors"),
        ((tmp_path / "call.pth").read_bytes(), r"names (__builtin__|builtins)\.print, and may only hold tensors"),
        (whole.replace(struct.pack("<q", 6), struct.pack("<q", 2**50)), "cut off"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"old.pth cannot be read as weights: .*({words})"):
            load_tensors(path)
    assert "called" not in capsys.readouterr().out


def test_published_name_with_other_bytes(inception_file, tmp_path):
    """A file that calls itself the published one is compared with the digest in its name; of others it is said."""
    named = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    named.write_bytes(b"cut off")
    with pytest.raises(ValueError, match="SHA-256 .*…, wanted 6726825d…, as its name says"):
        networks.InceptionNetwork(named, "cpu")
    network = networks.InceptionNetwork(inception_file, torch.device("cpu"))
    assert "not the published file" in network.notes[0] and len(network.digest) == 64


#################################################################################
#                                   Fetching                                    #
#################################################################################


@pytest.fixture
def server():
    """A file server on this machine: server.content, and after how many bytes it stops. It counts requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(server.content)))
            self.end_headers()
            self.wfile.write(server.content[: server.stops_after])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.stops_after, server.requests = bytes(range(256)) * 40, None, 0
    server.url = f"http://127.0.0.1:{server.server_port}/weights.pth"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def digest_of(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def fetched(server, monkeypatch):
    """Fetch the server's file as Inception's published one, whose digest starts with the given digits."""

    def fetch(path, prefix=None):
        monkeypatch.setattr(networks.InceptionNetwork, "url", server.url)
        monkeypatch.setattr(networks.InceptionNetwork, "sha256_prefix", prefix or digest_of(server.content)[:8])
        return fetch_file(server.url, path, functools.partial(networks.check_digest, networks.InceptionNetwork))

    return fetch


def test_what_is_fetched_is_whole_and_the_published_file(server, fetched, tmp_path):
    path = tmp_path / "cache/weights.pth"
    for stops_after, prefix in ((1000, digest_of(server.content)[:8]), (None, "6726825d")):
        server.stops_after = stops_after
        with pytest.raises(ValueError, match=f"wanted {prefix}…: it is not the published file, and was removed"):
            fetched(path, prefix)
        assert not [one for one in path.parent.iterdir() if one.suffix != ".lock"]
    path.with_name(".weights.pth.part.0.partial").write_bytes(b"of a process that was killed")
    assert fetched(path).read_bytes() == server.content and server.requests == 3
    assert fetched(path) == path and server.requests == 3  # it is there
    assert [one for one in path.parent.iterdir() if one.suffix != ".lock"] == [path]


def test_where_weights_are_looked_for(server, tmp_path, monkeypatch):
    """The flag, then torch's hub cache, then the working directory, then the public address."""
    kind = networks.InceptionNetwork
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(kind, "url", server.url)
    cache = tmp_path / "hub/checkpoints"
    with pytest.raises(ValueError, match="not the published file.*put it into .*hub/checkpoints, or name.*--inception"):
        networks.find_weights(kind)
    monkeypatch.setattr(kind, "sha256_prefix", digest_of(server.content)[:8])
    assert networks.find_weights(kind) == cache / kind.files[0] and server.requests == 2
    assert networks.find_weights(kind) == cache / kind.files[0] and server.requests == 2
    (cache / kind.files[0]).rename(cache / kind.files[1])
    assert networks.find_weights(kind) == cache / kind.files[1]
    (cache / kind.files[1]).rename("classify_image_graph_def.pb")
    assert networks.find_weights(kind).name == "classify_image_graph_def.pb" and server.requests == 2
    with pytest.raises(ValueError, match="--inception nowhere.pth does not exist"):
        networks.find_weights(kind, "nowhere.pth")
    (tmp_path / "here/classify_image_graph_def.pb").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set.*fetch http.*put it into .*hub/checkpoints"):
        networks.find_weights(kind)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(kind, "url", "http://127.0.0.1:9/nothing")
    with pytest.raises(ValueError, match="out of reach .*fetch http.*put it into .*hub/checkpoints"):
        networks.find_weights(kind)


#################################################################################
#                                    DINOv2                                     #
#################################################################################


def tiny_dinov2(path, width=64, depth=2, side=37):
    """Seeded weights of a small ViT in DINOv2's names, with its mask token."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(1)
    module = VisionTransformer(
        img_size=side * 14, patch_size=14, embed_dim=width, depth=depth, num_heads=1, init_values=0.5, num_classes=0
    )
    weights = {key: torch.randn_like(value) * 0.1 for key, value in module.state_dict().items()}
    torch.save({**weights, "mask_token": torch.zeros(1, width)}, path)
    return weights


def cubic(x, a=-0.75):
    """Keys's kernel, as PyTorch's bicubic interpolation has it."""
    x = abs(x)
    inner, outer = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0))


def test_positions_are_resampled_as_dinov2_does():
    """By hand: output cell i lies at (i + 0.5) * 37 / 16.1 - 0.5, weighed by the kernel of 4 cells, edges repeated."""
    positions = torch.randn(1, 1 + 37 * 37, 5, generator=torch.Generator().manual_seed(0))
    places = (np.arange(16) + 0.5) * 37 / 16.1 - 0.5
    matrix = np.zeros((16, 37))
    for row, place in enumerate(places):
        for cell in range(math.floor(place) - 1, math.floor(place) + 3):
            matrix[row, min(max(cell, 0), 36)] += cubic(place - cell)
    grid = positions[0, 1:].reshape(37, 37, 5).double().numpy()
    wanted = np.einsum("ip,jq,pqd->ijd", matrix, matrix, grid).reshape(256, 5)
    found = resample_positions(positions)
    np.testing.assert_allclose(found[0, 1:], wanted, atol=2e-5)
    assert torch.equal(found[:, 0], positions[:, 0])
    assert torch.equal(resample_positions(found), found)  # of 16 x 16 already


def test_dinov2_class_token(tmp_path):
    """A ViT written out here gives the same, on images that Pillow resized."""
    weights = tiny_dinov2(tmp_path / "tiny.pth")
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 52, 3), dtype=np.uint8)
    network = networks.DINOv2Network(tmp_path / "tiny.pth", torch.device("cpu"))
    with torch.inference_mode():
        found = network(torch.from_numpy(images))["pool"]
    views = np.stack([np.asarray(Image.fromarray(one).resize((224, 224), Image.Resampling.BICUBIC)) for one in images])
    x = torch.from_numpy(views).float() / 255
    x = ((x - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])).permute(0, 3, 1, 2)
    torch.testing.assert_close(preprocess(torch.from_numpy(images)), x)
    F = torch.nn.functional
    x = F.conv2d(x, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=14).flatten(2).mT
    x = torch.cat([weights["cls_token"].expand(2, -1, -1), x], 1) + resample_positions(weights["pos_embed"])

    def norm(x, name):
        return F.layer_norm(x, (64,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    for i in range(2):
        block = f"blocks.{i}."
        q, k, v = linear(norm(x, block + "norm1"), block + "attn.qkv").chunk(3, dim=-1)
        attended = torch.softmax(q @ k.mT / 8, dim=-1) @ v
        x = x + weights[block + "ls1.gamma"] * linear(attended, block + "attn.proj")
        hidden = F.gelu(linear(norm(x, block + "norm2"), block + "mlp.fc1"))
        x = x + weights[block + "ls2.gamma"] * linear(hidden, block + "mlp.fc2")
    torch.testing.assert_close(found, norm(x, "norm")[:, 0], rtol=1e-4, atol=1e-5)
    assert "no ViT-L/14" in network.notes[0]


def test_files_that_are_no_dinov2(tmp_path, inception_file):
    weights = tiny_dinov2(tmp_path / "tiny.pth")
    for change, words in (
        (dict(register_tokens=torch.zeros(1, 4, 64)), "has registers"),
        (dict(pos_embed=torch.zeros(1, 7, 64)), "no class token and square grid"),
        (dict(other=torch.zeros(3)), "has unknown other"),
        ({"norm.bias": torch.full((64,), torch.nan)}, "norm.bias has values that are NaN"),
    ):
        torch.save({**weights, **change}, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=f"other.pth.*{words}"):
            load_dinov2(tmp_path / "other.pth")
