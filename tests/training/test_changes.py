"""What a researcher changes, and how little: copies of the repository are patched, and their scripts run.

Each change touches no more files than CONTRIBUTING.md's table says. They train, resume, sample and are exported two by
two, and the export samples again.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from forked import Run
from safetensors.torch import load_file
from training_runs import train_flags

from dlc.training.run import Run as RealRun

pytestmark = pytest.mark.slow
INIT_END = "        self.initialize_weights()\n\n    @property\n    def condition_embedder"


def before(there, text):
    """A text in front of one that is there."""
    return there, text + there


# ---------------------------------------------------------------------- the changes

# (a) a block variant: one argument of the model, and its flag
BLOCKS = {
    "models.py": [
        before(
            "class FinalLayer(nn.Module):",
            '''class RopeAttention(nn.Module):
    """Attention with normalised queries and keys, and rotary positions."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads, width = num_heads, hidden_size // num_heads
        self.qkv, self.proj = nn.Linear(hidden_size, 3 * hidden_size), nn.Linear(hidden_size, hidden_size)
        self.q_norm, self.k_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.register_buffer("frequencies", 1 / 100 ** (torch.arange(0, width, 2) / width), persistent=False)

    def turn(self, x):
        angles = torch.outer(torch.arange(x.shape[2], device=x.device), self.frequencies)
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(self.turn(self.q_norm(q)), self.turn(self.k_norm(k)), v)
        return self.proj(x.transpose(1, 2).flatten(2))


class ModernBlock(DiTBlock):
    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__(hidden_size, num_heads, mlp_ratio)
        self.attn = RopeAttention(hidden_size, num_heads)


''',
        ),
        ("head: int | None = None):", "head: int | None = None, modern: bool = False):"),
        ("nn.ModuleList([DiTBlock(hidden_size", "nn.ModuleList([(ModernBlock if modern else DiTBlock)(hidden_size"),
        before(INIT_END, '        self.register_buffer("feat_rope", torch.zeros(1))\n'),
    ],
    "train_diffusion.py": [
        before(
            '    group = parser.add_argument_group("data")',
            '    parser.add_argument("--modern", action="store_true", help="blocks of QK-norm and RoPE")\n',
        ),
        (
            "given = dict(code_init=args.code_init) if issubclass(DiT_models[args.model].family, DiTSEM) else {}",
            "given = dict(code_init=args.code_init, modern=args.modern)",
        ),
    ],
}

# (b) a loss on hidden tokens: a tap and a head, a file for the loss, and the trainer; the projector is frozen
HEAD = {
    "models.py": [
        before(
            INIT_END,
            "        self.projectors = nn.ModuleList([nn.Linear(hidden_size, 8)]).requires_grad_(False)\n"
            "        self.head, self.unused = nn.Linear(hidden_size, 8), nn.Linear(2, 2)\n"
            '        self.register_buffer("seen", torch.zeros((), dtype=torch.long))\n',
        ),
        before(
            "        out = self.unpatchify(self.final_layer(x, c)) ",
            "        self.tap, self.seen = x, self.seen + self.training\n",
        ),
    ],
    "diffusion/distillation.py": [
        (
            None,
            "def distillation(model):\n    target = model.projectors[0](model.tap.detach())\n"
            "    return (model.head(model.tap) - target).square().mean(dim=(1, 2))\n",
        )
    ],
    "train_diffusion.py": [
        before("import numpy as np\n", "from diffusion.distillation import distillation\n"),
        before(
            "            run.backward(terms, t, process.num_timesteps)",
            '            terms["distillation"] = distillation(model)\n'
            '            terms["loss"] = terms["loss"] + 0.5 * terms["distillation"]\n',
        ),
    ],
}

# (c) other optimizers: build_optimizer alone
ADAMW = "return torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=True)"
SGD = {
    "train_diffusion.py": [
        (ADAMW, "return torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, nesterov=True)"),
        ("(optimizers, warmup)", "(optimizers, lambda args, step: warmup(args, step) * np.float64(0.5) ** step)"),
    ]
}
MUON = {
    "train_diffusion.py": [
        (
            ADAMW,
            "matrices = [one for one in model.blocks.parameters() if one.ndim == 2]\n"
            "    others = [one for one in model.parameters() if not any(one is matrix for matrix in matrices)]\n"
            # one of Newton and Schulz's steps, whose bf16 products take minutes on a CPU that has no bf16
            "    muon = torch.optim.Muon(matrices, lr=20 * args.lr, ns_steps=1)\n"
            "    return [muon, torch.optim.AdamW(others, lr=args.lr)]",
        )
    ]
}

# (d) text tokens beside the code: the model, the array on disk, and what samples are drawn for
TEXT = {
    "models.py": [
        before(
            "@dataclass(frozen=True)\nclass ModelSpec:",
            '''class DiTText(DiTSEM):
    """Conditioned on a code, and by cross-attention on text tokens (N, T, text_dim)."""
    conditioning = "codes and text"

    def __init__(self, *, text_dim=5, text_length=3, hidden_size=1152, num_heads=16, **kwargs):
        super().__init__(hidden_size=hidden_size, num_heads=num_heads, **kwargs)
        self.text_null = nn.Parameter(torch.zeros(1, text_length, text_dim))
        self.text_embedder = nn.Linear(text_dim, hidden_size)
        self.cross = nn.MultiheadAttention(hidden_size, num_heads, batch_first=True)

    def null_condition(self, n):
        return dict(codes=super().null_condition(n), text=self.text_null.expand(n, -1, -1))

    def embed_condition(self, y, drop=None):
        text = y["text"] if drop is None else torch.where(drop.view(-1, 1, 1), self.text_null, y["text"])
        return dict(vector=super().embed_condition(y["codes"], drop), text=self.text_embedder(text))

    def denoise(self, x, t, condition):
        c, text, x = t + condition["vector"], condition["text"], self.x_embedder(x) + self.pos_embed
        x = x + self.cross(x, text, text, need_weights=False)[0]
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))


''',
        ),
        ("FAMILIES, CODE_INITS = (DiT, DiTSEM, DiTCONT)", "FAMILIES, CODE_INITS = (DiT, DiTSEM, DiTCONT, DiTText)"),
    ],
    "dlc/data/manifest.py": [
        before('    path=ArrayKind(0, "U"),', '    text=ArrayKind(2, "f"),  # text tokens (n, T, D)\n')
    ],
    "dlc/data/inputs.py": [
        (
            "INPUTS = {",
            """def codes_and_text(features, args):
    inputs, text = codes(features, args), features.arrays["text"]
    T, D = text.array(0).shape[1:]
    arrays = dict(inputs.arrays, text=text)
    return Inputs(arrays, dict(inputs.sizes, text_dim=D, text_length=T))


INPUTS = {"codes and text": codes_and_text, """,
        )
    ],
    "dlc/sampling/conditions.py": [
        (
            "# By a model's `conditioning`.\nCONDITIONINGS = {",
            '''class CodesAndText(ComputedCodes):
    """Codes of features, and their text."""

    def __init__(self, args, model, meta):
        super().__init__(args, model, meta)
        self.text = self.features.arrays["text"]

    def __call__(self, indices):
        text = self.text.gather(self.values(indices)).astype(np.float32)
        return dict(codes=super().__call__(indices), text=torch.from_numpy(text))


CONDITIONINGS = {"codes and text": CodesAndText, ''',
        )
    ],
}

# (e) a process that shares its base's options, with a sampler of few steps, which previews take too
PROCESS = {
    "diffusion/prediction.py": [
        (
            None,
            '''from .flow import FLOW_OPTIONS, SHIFT, EulerSampler, Flow
from .likelihoods import mean_flat
from .options import Option
from .samplers import SamplerSpec


class Prediction(Flow):
    """A flow whose model predicts x_0."""

    def __init__(self, least_time=0.05, **kwargs):
        super().__init__(**kwargs)
        self.least_time = least_time

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        out = model(self.q_sample(x_start, t, noise), self.told(t), **model_kwargs).float()
        return dict(loss=mean_flat((out - x_start) ** 2) / t.clamp(min=self.least_time) ** 2)


LEAST = dict(least_time=Option("bound of the times in the loss", low=0.001, training_only=True))
SHORT = SamplerSpec("Euler's method, as of a velocity", EulerSampler, 2, most_steps=4, **SHIFT)
ROW = (Prediction, "prediction", "predict x_0", FLOW_OPTIONS | LEAST, {"short": SHORT})
''',
        )
    ],
    "diffusion/process_table.py": [
        before("from .samplers import", "from .prediction import ROW\n"),
        before('    "masked": ', '    "prediction": ProcessRow(*ROW),\n'),
    ],
}

# the folders or files that the table of CONTRIBUTING.md allows
ALLOWED = [(BLOCKS, 2), (HEAD, 3), (SGD, 1), (MUON, 1), (TEXT, 4), (PROCESS, 2)]
# name: two changes that are made together, model, flags of training
CHANGES = {
    "blocks and sgd": ([BLOCKS, SGD], "DiTSEM-Ti/4", "--modern --lr 0.01 --warmup-steps 3"),
    "head and muon": ([HEAD, MUON], "DiTSEM-Ti/4", "--grad-clip 1 --precision bf16"),
    "text and process": ([TEXT, PROCESS], "DiTText-Ti/4", "--objective prediction --time-scale 1000 --sample-every 2"),
}


# ---------------------------------------------------------------------- tests


def patched_copy(root, *patches):
    """The program with patches: by file, pairs of a text that is there once and the one in its place."""
    root.mkdir()
    for name in ("dlc", "diffusion"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, root)
    for name, changes in (one for patch in patches for one in patch.items()):
        for there, here in changes:
            text = (root / name).read_text() if there else ""
            assert not there or text.count(there) == 1, (name, there)
            (root / name).write_text(text.replace(there, here) if there else here)
    return root


@pytest.fixture
def described_features(features, tmp_path):
    """The features, with text tokens beside each image."""
    copy = shutil.copytree(features, tmp_path / "features")
    (copy / "imagenet64_text").mkdir()
    for path in (copy / "imagenet64_sem").glob("*.npy"):
        text = np.random.default_rng(0).standard_normal((len(np.load(path)), 3, 5)).astype(np.float32)
        np.save(copy / "imagenet64_text" / path.name, text)
    return copy


@pytest.mark.parametrize("name", [name for name in CHANGES if "muon" not in name or hasattr(torch.optim, "Muon")])
def test_changes_train_resume_sample_and_are_exported(name, described_features, tiny_models, tmp_path):
    patches, model, flags = CHANGES[name]
    assert all(len(patch) <= files for patch, files in ALLOWED)
    root = patched_copy(tmp_path / "copy", *patches)
    train = ["train_diffusion", "--model", model, "--features-path", described_features]
    train += ["--global-batch-size", 4, "--num-workers", 0, "--log-every", 1, "--no-compile", "--sample-every", 0]
    train += flags.split()
    sample = ["sample_ddp_computed_dlc", "--vae", tiny_models[0], "--num-fid-samples", 3, "--num-sampling-steps", 2]
    sample += ["--no-compile", "--sampler", "short" if "process" in name else "dpmsolver++"]
    for number, (script, *words) in enumerate(
        (
            [*train, "--max-steps", 2],
            [*train, "--max-steps", 3],
            [*train, "--results-dir", "whole", "--max-steps", 3],
            [*sample, "--model", model],
            ["dlc.checkpoints", "export", "results", "exported", "--format", "safetensors"],
            [*sample, "--ckpt", "exported", "--sample-dir", "again"],
        )
    ):
        run = Run(script, words, tmp_path / f"{number}.txt", cwd=root, copy=root)
        assert run.wait(), run.said()
        assert number != 1 or "continued from results/checkpoints/0000002" in run.said()
    lines = list(map(json.loads, (root / "results/metrics.jsonl").read_text().splitlines()))
    if "head" in name:
        added = [line["loss"] - line["mse"] - line["vb"] for line in lines]
        assert added == pytest.approx([0.5 * line["distillation"] for line in lines], rel=1e-4)
    if "sgd" in name:  # half the learning rate at each step, beside the warm-up
        assert [line["lr"] for line in lines] == pytest.approx([0.01 / 6, 0.01 / 6, 0.01 / 8])
    for file in ("model.safetensors", "ema.safetensors"):
        resumed, straight = (root / run / "checkpoints/0000003" / file for run in ("results", "whole"))
        assert resumed.read_bytes() == straight.read_bytes()
        assert "head" not in name or load_file(resumed)["seen"] == 3  # the EMA has the model's counts
    first, again = (sorted((root / folder).glob("*.npz")) for folder in ("samples", "again"))
    assert np.array_equal(np.load(first[0])["arr_0"], np.load(again[0])["arr_0"])


def test_a_scheduler_that_the_run_would_overwrite_is_refused(call, features, monkeypatch, tmp_path):
    optimize, update, begun = RealRun.optimize, RealRun.update, []

    def scheduled(self, optimizers, *more):
        begun.extend([self, torch.optim.lr_scheduler.ExponentialLR(optimizers, 0.9)])
        optimize(self, optimizers, *more)

    monkeypatch.setattr(RealRun, "optimize", scheduled)
    monkeypatch.setattr(RealRun, "update", lambda self, step: update(self, step) or begun[1].step())
    status, _, error = call("train_diffusion", *train_flags(features, tmp_path / "run", "--max-steps", 3))
    begun[0].bar.close()
    assert status == 2 and "error: something else than the run, such as a scheduler of torch" in error
