"""Guidance by a weaker model or prior: its formula, where it acts, what is recorded, and which guides are refused."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import L, V, change_json, refusal, sample_folder, save_checkpoint
from tiny_prior import save_prior
from tiny_weights import tiny

from diffusion.masked import MaskedDiffusion
from diffusion.process_table import create_process
from diffusion.samplers import Sampler
from dlc.sampling.latents import Guide, sample_latents
from dlc.sampling.opening import open_guide, open_model
from dlc.sampling.prior_draw import PriorDraw, sample_codes
from dlc.sampling.prior_options import PriorOptions
from dlc.sampling.sampling_flags import sampling_parser, settle_guidance
from models import DiTSEM
from prior import DLCPrior

SCRIPT = "sample_ddp_computed_dlc.py"
CODES = dict(L=L, V=V)


def asked(times, x, y, **options):
    """What sample_latents predicts of x at these times."""
    predictions = {}

    class Asking(Sampler):
        num_steps = 1

        def __call__(self, predict, start, noise):
            predictions.update({time: predict(x, time) for time in times})
            yield start, start

    Asking.times = times
    sample_latents(sampler=Asking(), y=y, seed=0, indices=torch.arange(len(x)), **options)
    return predictions


@torch.no_grad()
@pytest.mark.parametrize("kind", ["with a variance", "without", "head"])
def test_a_guide_acts_at_its_times_in_all_channels(kind):
    """A weaker model, or the model's own early prediction. The variance is the model's; with cfg_scale each half is
    guided first; a head costs no call of its own."""
    model, weak = tiny("DiTSEM-Ti/4", intermediate_head=2 if kind == "head" else None, **CODES), None
    if kind != "head":
        sizes = dict(input_size=8, patch_size=2, hidden_size=24, depth=1, num_heads=2, learn_sigma=kind != "without")
        weak = DiTSEM(**sizes, **CODES).eval()
        for parameter in weak.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    x, y = torch.randn(3, 4, 8, 8), torch.randint(V, (3, L))
    guide, times, calls, denoise = Guide(weak, 2.5, 200, 600), [100, 400, 800], [], model.denoise

    def expected(time, y):
        t = torch.full((3,), time)
        out = model(x, t, y, **dict(head=True) if kind == "head" else {})
        early = weak(x, t, y)[:, :4] if weak else out[:, 8:]
        if time == 400:
            out[:, :4] = early + 2.5 * (out[:, :4] - early)
        return out[:, :8]

    model.denoise = lambda *args, **kwargs: calls.append(kwargs) or denoise(*args, **kwargs)
    found = asked(times, x, y, model=model, guide=guide)
    assert calls == [{}, dict(head=True) if kind == "head" else {}, {}]
    for time in times:
        torch.testing.assert_close(found[time], expected(time, y), atol=1e-5, rtol=1e-5)
    for time, found in asked(times, x, y, model=model, guide=guide, cfg_scale=1.5, t_max=500).items():
        one, other = expected(time, y), expected(time, torch.full_like(y, V))
        if time <= 500:
            one[:, :4] = other[:, :4] + 1.5 * (one[:, :4] - other[:, :4])
        torch.testing.assert_close(found, one, atol=1e-5, rtol=1e-5)
    unused = Guide(weak, 1.0, -math.inf, math.inf)
    if weak:
        weak.denoise = lambda *_: pytest.fail("the guide was called")
    assert torch.equal(asked(times, x, y, model=model, guide=unused)[400], asked(times, x, y, model=model)[400])


@pytest.fixture
def opened(tmp_path):
    """opened(change…): what open_guide gives for a guide with another size, or with these changes."""
    known = dict(encoder_sha256="e", vae_sha256="v")
    checkpoint = save_checkpoint(tmp_path / "run/checkpoints/0000001", **known)

    def call(name="DiTSEM-Ti/2", sizes=CODES, flags="--guide-scale 2", processes=(None, None), **changes):
        shutil.rmtree(tmp_path / "guide", ignore_errors=True)
        guide = save_checkpoint(tmp_path / "guide", name, sizes, **{**known, **changes})
        for path, process in zip((checkpoint, guide), processes):
            if process:
                change_json(path / "config.json", process=process.config)
        args = sampling_parser("", SCRIPT, "").parse_args(["--guide-ckpt", str(guide), *flags.split()])
        args.ckpt = str(checkpoint)
        settle_guidance(args)
        return args, open_guide(args, *open_model(args, SCRIPT, ""))

    return call


def test_what_is_recorded_of_a_guide(opened, tmp_path):
    args, (guide, recorded, notes) = opened(flags="--guide-scale 2 --guide-t-max 600")
    assert args.cfg_scale == 1 and not notes and guide.model.patch_size == 2
    assert (guide.acts(0), guide.acts(600), guide.acts(601)) == (True, True, False)
    known = dict(checkpoint=str(tmp_path / "guide"), model="DiTSEM-Ti/2", step=1, weights="ema")
    known |= dict(scale=2.0, t_min=None, t_max=600.0)
    assert known.items() <= recorded.items() and len(recorded["weights_sha256"]) == 64
    # its times in training may have been drawn otherwise
    other = create_process("flow", time_distribution="lognormal", time_std=2.0)
    assert opened(processes=(create_process("flow"), other))[1][0].scale == 2


def test_guides_that_are_refused(opened):
    for change, message in (
        (dict(sizes=dict(L=L, V=V - 1)), f"was not trained for the samples of .*: V {V - 1} there, {V} here"),
        (dict(name="DiT-Ti/4", sizes=dict(num_classes=3)), "conditioning 'labels' there, 'codes' here"),
        (dict(sizes=dict(in_channels=3, **CODES)), r"latents \[3, 8, 8\] there, \[4, 8, 8\] here"),
        (dict(vae_sha256="w"), "vae_sha256 'w' there, 'v' here"),
        (dict(encoder_sha256="f"), "encoder_sha256 'f' there, 'e' here"),
        (dict(flags=""), "--guide-ckpt goes with --guide-scale: give that as well"),
        (dict(flags="--guide-scale 2 --cfg-scale 1.5"), "in the place of --cfg-scale: give one of them"),
        (dict(flags="--guide-scale 2 --guide-t-min 9 --guide-t-max 8"), "9 is above"),
        (dict(flags="--guide-scale 2 --t-max 430"), "--t-max does not go with --guide-ckpt: leave one of them out"),
        (dict(flags="--guide-scale 2 --cfg-channels 3"), "--cfg-channels does not go with --guide-ckpt"),
        (dict(processes=(None, create_process("gaussian", predict_xstart=True))), "predict_xstart True there, False"),
    ):
        refusal(opened, **change, words=message)


def test_whether_there_is_a_head(tmp_path):
    args = sampling_parser("", SCRIPT, "").parse_args(["--internal-scale", "2", "--guide-t-min", "300"])
    settle_guidance(args)
    assert args.cfg_scale == 1.5
    args.ckpt = str(save_checkpoint(tmp_path / "without"))
    with pytest.raises(ValueError, match="--internal-scale 2.0: .*without has no intermediate head"):
        open_guide(args, *open_model(args, SCRIPT, ""))
    args.ckpt = str(save_checkpoint(tmp_path / "with", sizes=dict(intermediate_head=2, **CODES)))
    guide, recorded, _ = open_guide(args, *open_model(args, SCRIPT, ""))
    assert recorded == dict(scale=2.0, t_min=300, t_max=None, intermediate_head=2)
    assert guide.model is None and guide.acts(300) and not guide.acts(299)
    args.guide_ckpt, args.guide_scale, args.cfg_scale = args.ckpt, 2.0, None
    refusal(settle_guidance, args, words="--internal-scale does not go with --guide-ckpt")


@pytest.mark.slow
def test_samples_of_a_guided_model(workplace, said_by, monkeypatch, tmp_path):
    monkeypatch.chdir(workplace)
    run, draw = workplace / "results/checkpoints/0000003", ("--num-fid-samples", 2, "--num-sampling-steps", 2)
    moved = shutil.copytree(run, tmp_path / "moved", ignore=shutil.ignore_patterns("ema*", "optimizer*"))
    for guide, words in ((run, "cfg 1.0, guide"), (moved, "0 of 2 images to draw")):
        flags = ("--guide-scale", 2, "--guide-ckpt", guide / "model.safetensors", "--sample-dir", tmp_path / "samples")
        assert words in said_by(SCRIPT.removesuffix(".py"), "--model", "DiTSEM-Ti/4", *draw, *flags)
    folder = sample_folder(tmp_path / "samples")
    assert "-cfg-1.0-guide-2.0-seed-0-" in folder.name
    record = json.loads((folder / "samples.json").read_text())
    assert (record["cfg_scale"], record["guide"]["scale"], record["guide"]["weights"]) == (1.0, 2.0, "raw")


@torch.no_grad()
def test_a_prior_that_guides(tmp_path):
    """log p_weak + W (log p - log p_weak), up to a constant per place; and what PriorDraw makes of the flags."""
    torch.manual_seed(0)
    sizes = dict(L=3, V=5, hidden_size=16, num_heads=2)
    strong, weak = DLCPrior(depth=2, **sizes), DLCPrior(depth=1, scale_by_sigma=False, **sizes)
    for one in (strong, weak):
        for parameter in one.eval().parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    told, untold = (MaskedDiffusion(5, time_conditioning=told) for told in (True, False))
    masked, t, found = torch.full((2, 3), 5), torch.tensor([0.4, 0.8]), []

    def ask(predict, codes, uniforms):
        found.append(predict(masked, t).log_softmax(-1))
        yield codes

    sample_codes(strong, told, ask, seed=0, indices=torch.arange(2), guide=(weak, untold, 1.7))
    pairs = ((strong, told), (weak, untold))
    log_p, log_weak = (one(masked, process.told(t))[..., :5].log_softmax(-1) for one, process in pairs)
    torch.testing.assert_close(found[0], (log_weak + 1.7 * (log_p - log_weak)).log_softmax(-1), atol=1e-5, rtol=1e-5)

    main, other = save_prior(tmp_path / "main"), save_prior(tmp_path / "other", spread=0.2)
    guided, plain = (
        PriorDraw(main, True, PriorOptions(steps=2, **options), seed=0)
        for options in (dict(guide_ckpt=str(other), guide_scale=2.0), {})
    )
    record = guided.record(4)
    assert record.guide == str(other) and len(record.options["guide_ckpt"]) == 64
    assert plain.record(4).options["guide_ckpt"] is plain.record(4).options["guide_scale"] is None
    assert (plain.draw(np.arange(4)) != guided.draw(np.arange(4))).any()
    options = PriorOptions(guide_ckpt=str(save_prior(tmp_path / "small", V=V - 1)), guide_scale=2.0)
    refusal(PriorDraw, main, True, options, seed=0, words=f"have V={V - 1}, but those of the prior")
