"""Tiny models and images, and the launching of the real scripts."""

import importlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

TESTS = Path(__file__).parent
ROOT, HELPERS = TESTS.parent, TESTS / "helpers"
sys.path[:0] = [str(ROOT), str(HELPERS)]
os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it once, at its import

IMAGE_SIZE, L, V = 64, 6, 300  # V above 256: codes are stored in 16 bits
SAMPLE_FLAGS = ("--num-fid-samples", 21, "--num-sampling-steps", 3)


running = []  # the test that is


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    running[:] = [item]


def check_marked():
    """Fail a test that starts a script's processes, by itself or by a fixture, and is not marked slow."""
    assert not running or running[0].get_closest_marker("slow"), "it starts processes: mark it with @pytest.mark.slow"


def golden(name):
    """A file of reference values as tensors, text as the JSON or the list of names that it is; its weights apart."""

    def read(value):
        if value.dtype.kind != "U":
            return torch.from_numpy(value)
        return value.tolist() if value.ndim else json.loads(str(value))

    values = {key: read(value) for key, value in np.load(ROOT / "tests/goldens" / f"{name}.npz").items()}
    weights = {key[2:]: values.pop(key) for key in list(values) if key.startswith("w/")}
    return values, weights


ACCELERATE = "-m accelerate.commands.launch --main_process_port {port} --num_processes {processes}"
LAUNCHERS = {
    "python": "",
    "torchrun": "-m torch.distributed.run --nnodes=1 --nproc_per_node={processes} --master_port={port}",
    "accelerate": f"{ACCELERATE} --mixed_precision fp16",
    "fsdp": f"{ACCELERATE} --mixed_precision no --config_file {{root}}/train_options/fsdp.yaml",
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(command, cwd, check=True, fault=None):
    """Run "LAUNCHER N script.py flags", scripts named from the root, by one of LAUNCHERS. Gives the ended process.

    The launcher "forked" is forked.Run, which is seconds faster; there standard output and error are one, and the
    script may have a fault.
    """
    check_marked()
    launcher, processes, script, *flags = command
    if launcher == "forked":
        from forked import Run

        output = Path(cwd) / f"output_{time.time_ns()}.txt"
        run = Run(Path(script).stem, flags, output, processes, cwd, fault=fault)
        if not run.wait() and check:
            pytest.fail(f"{script} failed:\n{run.said()}")
        return types.SimpleNamespace(returncode=run.ranks[0].exitcode, stdout=run.said(), stderr=run.said())
    words = dict(port=free_port(), processes=processes, root=ROOT)
    prefix = [word.format(**words) for word in LAUNCHERS[launcher].split()]
    prefix += ["--multi_gpu"] if launcher == "accelerate" and processes > 1 else []
    result = subprocess.run(
        [sys.executable, *prefix, str(ROOT / script), *map(str, flags)],
        timeout=600,
        cwd=cwd,
        env={key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"},
        text=True,
        capture_output=True,
    )
    if check and result.returncode:
        pytest.fail(f"{script} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result


def save_images(folder, per_class=7, classes=("cat", "dog"), seed=0):
    """Noise images, larger than the crop and of several shapes, in class folders."""
    generator = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            shape = (70 + index, 150 - index, 3)
            Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(folder / name / f"{index}.png")


def tiny_vae(blocks=2, **config):
    """An untrained VAE of 4 channels that halves the image blocks - 1 times."""
    from diffusers import AutoencoderKL

    kinds = dict(down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks)
    sizes = dict(block_out_channels=(8,) * blocks, norm_num_groups=4, latent_channels=4, layers_per_block=1)
    return AutoencoderKL(**{**kinds, **sizes, **config}).eval()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Paths of an untrained VAE (8x, 4 channels) and an untrained SEM encoder at 32x32."""
    from dlc.nets.encoder import SEMEncoder, save_encoder

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tiny_vae(4).save_pretrained(root / "vae")
    backbone = dict(embed_dim=24, depth=1, num_heads=2, reg_tokens=2)
    save_encoder(SEMEncoder("vit_tiny_patch16_224", 32, L, V, backbone_args=backbone), root / "sem")
    return root / "vae", root / "sem"


def encoder_logits(encoder, paths):
    """Of images, all in one batch: (n, L, V)."""
    from dlc.data.images import center_crop, load_rgb
    from dlc.weights.networks import load_encoder

    encoder = load_encoder(encoder)
    views = np.stack([np.array(center_crop(load_rgb(path), encoder.image_size)) for path in paths])
    with torch.inference_mode():
        return encoder.encode_pixels(torch.from_numpy(views))


def assert_codes(codes, logits):
    """Codes (n, L) of other batches than the logits (n, L, V): where two logits nearly tie, either is right."""
    chosen = logits.gather(2, torch.from_numpy(np.asarray(codes).astype(np.int64)).unsqueeze(2)).squeeze(2)
    assert (chosen > logits.amax(dim=2) - 1e-4).all()


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """14 images in 2 classes, and in their midst, the tenth in order, one file that is no image."""
    root = tmp_path_factory.mktemp("images")
    save_images(root)
    (root / "dog/1_broken.jpg").write_text("not an image")
    return root


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub, empty, that this process's huggingface_hub talks to; its cache is empty, too."""
    from hub_standin import Hub, point_at

    with Hub() as standin:
        point_at(standin.url, monkeypatch, tmp_path / "cache")
        for module in ("utils._http", "file_download"):
            monkeypatch.setattr(f"huggingface_hub.{module}.time.sleep", lambda _: None)
        monkeypatch.chdir(tmp_path)
        yield standin


@pytest.fixture
def rounded(monkeypatch):
    """Networks round otherwise in other batches, in this process and in those that forked.Run starts: see rounding."""
    import rounding

    rounding.change_networks(monkeypatch.setattr)
    monkeypatch.setenv("ROUNDED", "1")


@pytest.fixture(autouse=True)
def whole_process_state():
    """Forget processes that a test's variables kept from being joined: accelerate would take them for joined."""
    yield
    state = sys.modules.get("accelerate.state")
    if state and state.PartialState._shared_state and "num_processes" not in state.PartialState._shared_state:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def call(monkeypatch, capsys):
    """call(module, flags…): a program's main in this process; gives how it ended, and its standard output and error."""

    def run(module, *flags):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [f"{module}.py", *map(str, flags)])
        status, module = 0, importlib.import_module(module)
        try:
            module.main(**getattr(module, "OPTIONS", {}))
        except SystemExit as end:
            status = end.code
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def said_by(call):
    """said_by(…): as call(…), but ended well; gives its standard output."""

    def run(*words):
        status, said, error = call(*words)
        assert status == 0, error
        return said

    return run


@pytest.fixture
def tool(call):
    """call(…) of dlc.features."""
    return lambda *flags: call("dlc.features", *flags)


@pytest.fixture
def error_of(call, monkeypatch, tmp_path):
    """Call a script's main with flags in an empty directory; gives its one line of complaint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refused(script, *flags):
        status, _, error = call(script, *flags)
        assert status == 2, error
        assert re.fullmatch(rf"{script}\.py( [\w-]+)?: error: .*\n", error), error
        return error

    return refused


def close(actual, expected, tolerance=1e-5):
    """Assert that tensors agree, whatever their precision."""
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=tolerance)


def refusal(function, *args, words=None, error=ValueError, **kwargs):
    """The line by which a call refuses a file, which has these words in it, a pattern."""
    with pytest.raises(error, match=words) as raised:
        function(*args, **kwargs)
    line = str(raised.value)
    assert len(re.sub(r"/\S*/", "/", line)) < 320 and "\n" not in line and "\x1b" not in line, line
    assert "weights_only=False" not in line and "trust" not in line, line
    return line


def fails(monkeypatch, name, number, when=lambda *arguments: True):
    """A function, such as os.replace, raises the OSError of that number where when(arguments) holds."""
    module, _, attribute = name.rpartition(".")
    works = getattr(importlib.import_module(module), attribute)

    def call(*arguments, **options):
        if when(*arguments):
            raise OSError(number, os.strerror(number))
        return works(*arguments, **options)

    monkeypatch.setattr(name, call)


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def extract_command(launcher, processes, images, features, tiny_models, *flags):
    return (
        *(launcher, processes, "extract_features_withdlc.py", "--data-path", images, "--features-path", features),
        *("--vae", tiny_models[0], "--encoder", tiny_models[1], "--image-size", IMAGE_SIZE, "--model", "DiT-S/2"),
        *("--batch-size", 2, "--shard-size", 4, "--num-workers", 1, *flags),
    )


@pytest.fixture(scope="session")
def both_data(tiny_models, tmp_path_factory):
    """14 images, and features that hold all that training on them sees: unflipped moments in float32, and tokens."""
    root = tmp_path_factory.mktemp("data")
    exact = ("--posterior", "moments", "--dtype", "float32", "--flip", "none", "--store-tokens")
    save_images(root / "images")
    launch(extract_command("forked", 1, root / "images", root / "features", tiny_models, *exact), root)
    return root


def save_untrained(path, name, model, process, settings, notes, weights=("ema",), **counts):
    """A checkpoint with these files of weights, alike; counts: of its meta.json."""
    from safetensors.torch import save_file

    from dlc.machine.files import write_json
    from dlc.weights.meta import RunMeta, config_of

    path.mkdir(parents=True)
    for one in weights:
        save_file(model.state_dict(), path / f"{one}.safetensors")
    write_json(path / "config.json", config_of(name, model, process).to_json())
    meta = RunMeta.of_run(settings, notes, **dict(step=1, place=4, logged=0, skipped=0) | counts)
    write_json(path / "meta.json", meta.to_json())
    return path


def save_checkpoint(path, name="DiTSEM-Ti/4", sizes=None, settings=None, **meta):
    """A checkpoint of an untrained model, EMA weights alone, whose meta.json has these keys."""
    from diffusion.process_table import create_process
    from models import DiT_models

    model = DiT_models[name](input_size=IMAGE_SIZE // 8, **(sizes or dict(L=L, V=V)))
    process, notes = create_process("gaussian", timestep_respacing=""), {key: str(value) for key, value in meta.items()}
    return save_untrained(path, name, model, process, settings or {}, notes)


@pytest.fixture
def train(features, tmp_path):
    """train(name, flags…, processes=N, fault=…): a started run on the features, into that folder of tmp_path."""
    from forked import Run
    from training_runs import train_flags

    def start(name, *flags, **options):
        flags = train_flags(features, tmp_path / name, *flags)
        return Run("train_diffusion", flags, tmp_path / f"{time.time_ns()}.txt", **options)

    return start


@pytest.fixture
def refused(error_of, features, tmp_path):
    """refused(…): as train(…), in this process; gives the one line by which the run is refused."""
    from training_runs import train_flags

    return lambda name, *flags: error_of("train_diffusion", *train_flags(features, tmp_path / name, *flags))


@pytest.fixture
def trained(train):
    """trained(…): as train(…), which some modules have of their own, but ended well; gives what it said."""

    def run(*args, **kwargs):
        process = train(*args, **kwargs)
        assert process.wait(), process.said()
        return process.said()

    return run


@pytest.fixture(scope="session")
def features(tmp_path_factory, images, tiny_models):
    """Features of the images, extracted by one process."""
    path = tmp_path_factory.mktemp("features")
    launch(extract_command("forked", 1, images, path, tiny_models), path)
    return path


@pytest.fixture(scope="session")
def workplace(images, tiny_models, tmp_path_factory):
    """A directory with features/ and, trained on them for a few steps, results/ and results_dit/."""
    root = tmp_path_factory.mktemp("workplace")
    launch(extract_command("forked", 1, images, "features", tiny_models), root)
    common = ("--max-steps", 3, "--global-batch-size", 4, "--lr", 0.01, "--ema-decay", 0.5, "--num-workers", 0)
    common += ("--log-every", 1)
    launch(("forked", 1, "train_diffusion.py", "--model", "DiTSEM-Ti/4", *common), root)
    launch(("forked", 1, "train.py", "--model", "DiT-Ti/4", "--results-dir", "results_dit", *common), root)
    launch(("forked", 1, "sample_ddp_computed_dlc.py", "--model", "DiTSEM-Ti/4", *SAMPLE_FLAGS), root)
    return root


def sample_folder(root):
    (folder,) = (path for path in root.iterdir() if path.is_dir())
    return folder


@pytest.fixture
def evaluation_place(tmp_path, monkeypatch):
    """A directory with samples.npz, reference.npz and the weights of a small network, which is in Inception's place."""
    import tiny_networks

    from evaluation.feature_networks import NETWORKS

    monkeypatch.setitem(NETWORKS, "inception", tiny_networks.TinyInception)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.bin").write_bytes(b"weights")
    np.savez(tmp_path / "samples.npz", arr_0=tiny_networks.pixels(40))
    np.savez(tmp_path / "reference.npz", arr_0=tiny_networks.pixels(50, seed=1))
    return tmp_path


@pytest.fixture
def evaluate(evaluation_place, said_by):
    """Call evaluate.py in that directory; gives what it printed."""
    return lambda *flags: said_by("evaluate", *flags)
