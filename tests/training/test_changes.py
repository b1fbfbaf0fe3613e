"""What a researcher changes, and how little: copies of the repository are patched, and their scripts run.

Each change touches no more files than CONTRIBUTING.md's table says. It trains, resumes, samples and is exported, and
the export samples again.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from forked import Run
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

# ---------------------------------------------------------------------- the changes

# (a) a block variant: one argument of the model, and its flag
BLOCKS = {
    "models.py": [
        (
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


class SwiGLU(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, x = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * x)


class ModernBlock(DiTBlock):
    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__(hidden_size, num_heads, mlp_ratio)
        self.attn = RopeAttention(hidden_size, num_heads)
        self.mlp = SwiGLU(hidden_size, int(hidden_size * mlp_ratio * 2 / 3))


class FinalLayer(nn.Module):''',
        ),
        ("head: int | None = None):", "head: int | None = None, modern: bool = False):"),
        ("nn.ModuleList([DiTBlock(hidden_size", "nn.ModuleList([(ModernBlock if modern else DiTBlock)(hidden_size"),
        (
            "        self.initialize_weights()\n\n    @property\n    def condition_embedder",
            '        self.register_buffer("feat_rope", torch.zeros(1))\n        self.initialize_weights()\n\n'
            "    @property\n    def condition_embedder",
        ),
    ],
    "train_diffusion.py": [
        (
            '    group = parser.add_argument_group("data")',
            '    parser.add_argument("--modern", action="store_true", help="QK-norm, RoPE and SwiGLU blocks")\n'
            '    group = parser.add_argument_group("data")',
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
        (
            "        self.initialize_weights()\n\n    @property\n    def condition_embedder",
            "        self.projectors = nn.ModuleList([nn.Linear(hidden_size, 8)]).requires_grad_(False)\n"
            "        self.head, self.unused = nn.Linear(hidden_size, 8), nn.Linear(2, 2)\n"
            '        self.register_buffer("seen", torch.zeros((), dtype=torch.long))\n'
            "        self.initialize_weights()\n\n    @property\n    def condition_embedder",
        ),
        (
            "        out = self.unpatchify(self.final_layer(x, c)) ",
            "        self.tap, self.seen = x, self.seen + self.training\n"
            "        out = self.unpatchify(self.final_layer(x, c)) ",
        ),
    ],
    "diffusion/distillation.py": [
        (
            None,
            "def distillation(model):\n"
            "    target = model.projectors[0](model.tap.detach())\n"
            "    return (model.head(model.tap) - target).square().mean(dim=(1, 2))\n",
        )
    ],
    "train_diffusion.py": [
        ("import numpy as np\n", "import numpy as np\nfrom diffusion.distillation import distillation\n"),
        (
            "            run.backward(terms, t, process.num_timesteps)",
            '            terms["distillation"] = distillation(model)\n'
            '            terms["loss"] = terms["loss"] + 0.5 * terms["distillation"]\n'
            "            run.backward(terms, t, process.num_timesteps)",
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
        (
            "@dataclass(frozen=True)\nclass ModelSpec:",
            '''class TextBlock(DiTBlock):
    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0):
        super().__init__(hidden_size, num_heads, mlp_ratio)
        self.cross = nn.MultiheadAttention(hidden_size, num_heads, batch_first=True)

    def forward(self, x, c, text):
        return super().forward(x + self.cross(x, text, text, need_weights=False)[0], c)


class DiTText(DiTSEM):
    """Conditioned on a code, and by cross-attention on text tokens (N, T, text_dim)."""
    conditioning = "codes and text"

    def __init__(self, *, text_dim=5, text_length=3, hidden_size=1152, num_heads=16, **kwargs):
        super().__init__(hidden_size=hidden_size, num_heads=num_heads, **kwargs)
        self.text_null = nn.Parameter(torch.zeros(1, text_length, text_dim))
        self.text_embedder = nn.Linear(text_dim, hidden_size)
        self.blocks = nn.ModuleList([TextBlock(hidden_size, num_heads) for _ in self.blocks])

    def null_condition(self, n):
        return dict(codes=super().null_condition(n), text=self.text_null.expand(n, -1, -1))

    def embed_condition(self, y, drop=None):
        text = y["text"] if drop is None else torch.where(drop.view(-1, 1, 1), self.text_null, y["text"])
        return dict(vector=super().embed_condition(y["codes"], drop), text=self.text_embedder(text))

    def denoise(self, x, t, condition):
        c, x = t + condition["vector"], self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, c, condition["text"])
        return self.unpatchify(self.final_layer(x, c))


@dataclass(frozen=True)
class ModelSpec:''',
        ),
        ("FAMILIES, CODE_INITS = (DiT, DiTSEM, DiTCONT)", "FAMILIES, CODE_INITS = (DiT, DiTSEM, DiTCONT, DiTText)"),
    ],
    "dlc/data/manifest.py": [
        (
            '    path=ArrayKind(0, "U"),',
            '    text=ArrayKind(2, "f"),  # text tokens (n, T, D)\n    path=ArrayKind(0, "U"),',
        )
    ],
    "dlc/data/inputs.py": [
        (
            "INPUTS = {",
            """def codes_and_text(features, args):
    inputs, text = codes(features, args), features.arrays["text"]
    T, D = text.array(0).shape[1:]
    arrays = dict(inputs.arrays, text=text)
    return Inputs(arrays, dict(inputs.sizes, text_dim=D, text_length=T), inputs.limits)


INPUTS = {"codes and text": codes_and_text, """,
        )
    ],
    "dlc/sampling/conditions.py": [
        (
            "# By a model's `conditioning`.\nCONDITIONINGS = {",
            '''class CodesAndText(ComputedCodes):
    """Codes of features, and their text."""

    def __init__(self, source, model, meta, order, seed):
        super().__init__(source, model, meta, order, seed)
        self.text = open_codes(source).features.arrays["text"]

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


class PredictionSampler(EulerSampler):
    def __init__(self, steps, process, learn_sigma=False, gain=1.0, **more):
        super().__init__(steps, process, **more)
        self.gain = gain

    def __call__(self, predict, x, noise):
        return super().__call__(lambda x, t: self.gain * (x - predict(x, t)) / t, x, noise)


LEAST = dict(least_time=Option("bound of the times in the loss", low=0.001, training_only=True))
GAIN = dict(SHIFT["options"], gain=Option("of each step", low=0, high=2))
ROW = (Prediction, "prediction", "predict x_0", FLOW_OPTIONS | LEAST,
       {"short": SamplerSpec("Euler's method", PredictionSampler, 2, 1, 4, GAIN)})
''',
        )
    ],
    "diffusion/process_table.py": [
        ("from .samplers import", "from .prediction import ROW\nfrom .samplers import"),
        ('    "masked": ', '    "prediction": ProcessRow(*ROW),\n    "masked": '),
    ],
}

# name: patch, model, flags of training, folders that the table of CONTRIBUTING.md allows beside the top level
CHANGES = {
    "blocks": (BLOCKS, "DiTSEM-Ti/4", ["--modern"], 2),
    "head": (HEAD, "DiTSEM-Ti/4", ["--grad-clip", "1"], 3),
    "sgd": (SGD, "DiTSEM-Ti/4", ["--lr", "0.01", "--warmup-steps", "3"], 1),
    "muon": (MUON, "DiTSEM-Ti/4", ["--precision", "bf16"], 1),
    "text": (TEXT, "DiTText-Ti/4", [], 4),
    "process": (PROCESS, "DiTSEM-Ti/4", "--objective prediction --time-scale 1000 --sample-every 2".split(), 2),
}


# ---------------------------------------------------------------------- tests


def patched_copy(root, patch):
    """The program, with `patch`: by file, pairs of a text that is there once and the one in its place."""
    root.mkdir()
    for name in ("dlc", "diffusion"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, root)
    for name, changes in patch.items():
        for before, after in changes:
            text = (root / name).read_text() if before else ""
            assert not before or text.count(before) == 1, (name, before)
            (root / name).write_text(text.replace(before, after) if before else after)
    return root


@pytest.fixture
def described_features(features, tmp_path):
    """The features, with text tokens beside each image."""
    shutil.copytree(features, tmp_path / "features")
    codes = sorted((tmp_path / "features/imagenet64_sem").glob("*.npy"))
    (tmp_path / "features/imagenet64_text").mkdir()
    for path in codes:
        rows = len(np.load(path))
        text = np.random.default_rng(rows).standard_normal((rows, 3, 5)).astype(np.float32)
        np.save(tmp_path / "features/imagenet64_text" / path.name, text)
    return tmp_path / "features"


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "muon" or hasattr(torch.optim, "Muon")])
def test_a_change_trains_resumes_samples_and_is_exported(name, described_features, tiny_models, tmp_path):
    patch, model, flags, files = CHANGES[name]
    assert len(patch) <= files
    root = patched_copy(tmp_path / "copy", patch)
    train = ["train_diffusion", "--model", model, "--features-path", described_features]
    train += ["--global-batch-size", 4, "--num-workers", 0, "--log-every", 1, "--no-compile", "--sample-every", 0]
    train += flags
    sample = ["sample_ddp_computed_dlc", "--vae", tiny_models[0], "--num-fid-samples", 3, "--num-sampling-steps", 2]
    sample += ["--no-compile", *(["--gain", 0.9] if name == "process" else ["--sampler", "dpmsolver++"])]
    outputs = []
    for number, (script, *words) in enumerate(
        (
            [*train, "--max-steps", 2],
            [*train, "--max-steps", 3],
            [*train, "--results-dir", "whole", "--max-steps", 3],
            [*sample, "--model", model],
            ["dlc.checkpoints", "export", "results", "exported", "--format", "safetensors"],
            [*sample, "--ckpt", "exported", "--sample-dir", "again"],
            ["dlc.checkpoints", "info", "exported"],
        )
    ):
        run = Run(script, words, tmp_path / f"{number}.txt", cwd=root, copy=root)
        assert run.wait(), run.said()
        outputs.append(run.said())
    assert "continued from results/checkpoints/0000002" in outputs[1]
    lines = list(map(json.loads, (root / "results/metrics.jsonl").read_text().splitlines()))
    if name == "head":
        added = [line["loss"] - line["mse"] - line["vb"] for line in lines]
        assert added == pytest.approx([0.5 * line["distillation"] for line in lines], rel=1e-4)
    if name == "sgd":  # half the learning rate at each step, beside the warm-up
        assert [line["lr"] for line in lines] == pytest.approx([0.01 / 6, 0.01 / 6, 0.01 / 8])
    for file in ("model.safetensors", "ema.safetensors"):
        resumed, straight = ((root / run / "checkpoints/0000003" / file).read_bytes() for run in ("results", "whole"))
        assert resumed == straight
        if name == "head":  # the EMA has the model's counts
            assert load_file(root / "results/checkpoints/0000003" / file)["seen"] == 3
    first, again = (sorted((root / folder).glob("*.npz")) for folder in ("samples", "again"))
    assert np.array_equal(np.load(first[0])["arr_0"], np.load(again[0])["arr_0"])
    assert model in outputs[-1]


def test_a_scheduler_that_the_run_would_overwrite_is_refused(features, tmp_path):
    loop = "        run.update(step)\n"
    patch = [
        (loop, f"{loop}        schedule.step()\n"),
        (
            "    run.optimize(",
            "    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizers, 0.9)\n    run.optimize(",
        ),
    ]
    root = patched_copy(tmp_path / "copy", {"train_diffusion.py": patch})
    words = ["--model", "DiTSEM-Ti/4", "--features-path", features, "--global-batch-size", 4, "--max-steps", 3]
    run = Run("train_diffusion", [*words, "--sample-every", 0], tmp_path / "said.txt", cwd=root, copy=root)
    assert not run.wait() and "error: something else than the run, such as a scheduler of torch" in run.said()
