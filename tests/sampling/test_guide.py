"""Guidance by a weaker model or prior: its formula, where it acts, what is recorded, and which guides are refused."""

import json
import math

import pytest
import torch
from conftest import SAMPLE_FLAGS, L, V, launch, refusal, sample_folder, save_checkpoint
from tiny_prior import save_prior
from tiny_weights import tiny

from diffusion.masked import MaskedDiffusion
from diffusion.process_table import create_process
from diffusion.samplers import Sampler
from dlc.sampling.guide import open_guide, settle_guidance
from dlc.sampling.latents import Guide, sample_latents
from dlc.sampling.opening import open_model
from dlc.sampling.prior_draw import PriorDraw
from dlc.sampling.prior_engine import sample_codes
from dlc.sampling.prior_options import PriorOptions
from dlc.sampling.sampling_flags import sampling_parser
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
    sample_latents(sampler=Asking(), y=y, seed=0, indices=torch.arange(len(x)), latent_shape=x.shape[1:], **options)
    return predictions


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_a_guide_acts_at_its_times_in_all_channels(learn_sigma):
    """The variance is the model's, whether the guide has one or not; with cfg_scale each half is guided first."""
    model = tiny("DiTSEM-Ti/4", **CODES)
    weak = DiTSEM(input_size=8, patch_size=2, hidden_size=24, depth=1, num_heads=2, learn_sigma=learn_sigma, **CODES)
    for parameter in weak.eval().parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, y = torch.randn(3, 4, 8, 8), torch.randint(V, (3, L))
    guide, times = Guide(weak, 2.5, 200, 600), [100, 400, 800]

    def strong(time, y, model=model):
        with torch.no_grad():
            return model(x, torch.full((3,), time), y)

    def expected(time, y):
        out = strong(time, y)
        if time == 400:
            weaker = strong(time, y, weak)[:, :4]
            out[:, :4] = weaker + 2.5 * (out[:, :4] - weaker)
        return out

    for time, found in asked(times, x, y, model=model, guide=guide).items():
        torch.testing.assert_close(found, expected(time, y), atol=1e-5, rtol=1e-5)
    null = torch.full_like(y, V)
    for time, found in asked(times, x, y, model=model, guide=guide, cfg_scale=1.5, t_max=500).items():
        one, other = expected(time, y), expected(time, null)
        if time <= 500:
            one[:, :4] = other[:, :4] + 1.5 * (one[:, :4] - other[:, :4])
        torch.testing.assert_close(found, one, atol=1e-5, rtol=1e-5)

    def none(*args):
        raise AssertionError("the guide was called")

    unused = Guide(weak, 1.0, -math.inf, math.inf, denoise=none)
    assert torch.equal(asked(times, x, y, model=model, guide=unused)[400], asked(times, x, y, model=model)[400])


def test_a_head_guides_in_one_pass():
    """By the model's own early prediction, before the null condition does, if both do."""
    model = tiny("DiTSEM-Ti/4", intermediate_head=2, **CODES)
    x, y = torch.randn(3, 4, 8, 8), torch.randint(V, (3, L))

    def expected(y):
        with torch.no_grad():
            out, early = model(x, torch.full((3,), 400), y, head=True).split([8, 4], dim=1)
        return torch.cat([early + 2.5 * (out[:, :4] - early), out[:, 4:]], dim=1)

    calls, denoise = [], model.denoise
    model.denoise = lambda *args, **kwargs: calls.append(kwargs) or denoise(*args, **kwargs)
    guide = Guide(None, 2.5, 200, 600)
    found = asked([400, 800], x, y, model=model, guide=guide)
    assert calls == [dict(head=True), {}]
    torch.testing.assert_close(found[400], expected(y), atol=1e-5, rtol=1e-5)
    found = asked([400], x, y, model=model, guide=guide, cfg_scale=1.5)[400]
    one, other = expected(y), expected(torch.full_like(y, V))
    one[:, :4] = other[:, :4] + 1.5 * (one[:, :4] - other[:, :4])
    torch.testing.assert_close(found, one, atol=1e-5, rtol=1e-5)


@pytest.fixture
def opened(tmp_path):
    """opened(change…): what open_guide gives for a guide with another size, or with these changes."""
    known = dict(encoder_sha256="e", vae_sha256="v")
    checkpoint = save_checkpoint(tmp_path / "run/checkpoints/0000001", **known)

    def call(name="DiTSEM-Ti/2", sizes=CODES, flags=("--guide-scale", "2"), **changes):
        guide = save_checkpoint(tmp_path / "guide", name, sizes, **{**known, **changes})
        args = sampling_parser("", SCRIPT, "DiTSEM-XL/2").parse_args(["--guide-ckpt", str(guide), *flags])
        args.ckpt = str(checkpoint)
        settle_guidance(args)
        path, model, meta = open_model(args, SCRIPT, "DiTSEM-XL/2")
        return args, open_guide(args, path, model, meta)

    return call


def test_what_is_recorded_of_a_guide(opened, tmp_path):
    args, (guide, recorded, notes) = opened(flags=("--guide-scale", "2", "--guide-t-max", "600"))
    assert args.cfg_scale == 1 and not notes and guide.model.patch_size == 2
    assert (guide.acts(0), guide.acts(600), guide.acts(601)) == (True, True, False)
    known = dict(checkpoint=str(tmp_path / "guide"), model="DiTSEM-Ti/2", step=1, weights="ema")
    known |= dict(scale=2.0, t_min=None, t_max=600.0)
    assert known.items() <= recorded.items() and len(recorded["weights_sha256"]) == 64


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(sizes=dict(L=L, V=V - 1)), f"was not trained for the samples of .*: V {V - 1} there, {V} here"),
        (dict(name="DiT-Ti/4", sizes=dict(num_classes=3)), "conditioning 'labels' there, 'codes' here"),
        (dict(sizes=dict(in_channels=3, **CODES)), r"latents \[3, 8, 8\] there, \[4, 8, 8\] here"),
        (dict(vae_sha256="w"), "vae_sha256 'w' there, 'v' here"),
        (dict(encoder_sha256="f"), "encoder_sha256 'f' there, 'e' here"),
        (dict(flags=()), "say how strongly with --guide-scale"),
        (dict(flags=("--guide-scale", "2", "--cfg-scale", "1.5")), "in the place of --cfg-scale: give one of them"),
        (dict(flags=("--guide-scale", "2", "--guide-t-min", "9", "--guide-t-max", "8")), "9 is above"),
        (dict(flags=("--guide-scale", "2", "--t-max", "430")), "belongs to --cfg-scale, .*: give --guide-t-max"),
        (dict(flags=("--guide-scale", "2", "--cfg-channels", "3")), "not to --guide-ckpt: it guides all channels"),
    ],
)
def test_guides_that_are_refused(opened, change, message):
    refusal(opened, **change, words=message)


def test_a_guide_of_another_process_is_refused(opened, tmp_path):
    """But for how its times were drawn in training."""
    opened()

    def change(folder, process):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        (tmp_path / folder / "config.json").write_text(json.dumps({**config, "process": process.config}))

    def open_it():
        flags = ["--guide-ckpt", str(tmp_path / "guide"), "--guide-scale", "2"]
        args = sampling_parser("", SCRIPT, "").parse_args([*flags, "--ckpt", str(tmp_path / "run")])
        return open_guide(args, *open_model(args, SCRIPT, ""))

    change("guide", create_process("gaussian", predict_xstart=True))
    with pytest.raises(ValueError, match="process.arguments.predict_xstart True there, False here"):
        open_it()
    change("run/checkpoints/0000001", create_process("flow"))
    change("guide", create_process("flow", time_scale=1000.0))
    with pytest.raises(ValueError, match="process.arguments.time_scale 1000.0 there, 1.0 here"):
        open_it()
    change("guide", create_process("flow", time_distribution="lognormal", time_std=2.0))
    assert open_it()[0].scale == 2


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
    refusal(settle_guidance, args, words="in the place of --internal-scale: give one of them")


@pytest.mark.slow
def test_samples_of_a_guided_model(workplace, tmp_path):
    command = ("forked", 1, SCRIPT, "--model", "DiTSEM-Ti/4", *SAMPLE_FLAGS, "--sample-dir", tmp_path / "samples")
    flags = ("--guide-ckpt", workplace / "results/checkpoints/0000003/model.safetensors", "--guide-scale", 2)
    assert "cfg 1.0, guide" in launch((*command, *flags), workplace).stdout
    folder = sample_folder(tmp_path / "samples")
    assert "-cfg-1.0-guide-2.0-seed-0-" in folder.name
    record = json.loads((folder / "samples.json").read_text())
    assert (record["cfg_scale"], record["guide"]["scale"], record["guide"]["weights"]) == (1.0, 2.0, "raw")
    (tmp_path / "moved").mkdir()
    for name in ("model.safetensors", "config.json", "meta.json"):
        (tmp_path / "moved" / name).write_bytes((workplace / "results/checkpoints/0000003" / name).read_bytes())
    again = ("--guide-ckpt", tmp_path / "moved/model.safetensors", "--guide-scale", 2)
    assert "0 of 21 images to draw" in launch((*command, *again), workplace).stdout


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
        found.append(predict(masked, t, None).log_softmax(-1))
        yield codes

    sample_codes(strong, told, ask, seed=0, indices=torch.arange(2), guide=(weak, untold, 1.7))
    with torch.no_grad():
        log_p, log_weak = (
            one(masked, process.told(t))[..., :5].log_softmax(-1) for one, process in ((strong, told), (weak, untold))
        )
    torch.testing.assert_close(found[0], (log_weak + 1.7 * (log_p - log_weak)).log_softmax(-1), atol=1e-5, rtol=1e-5)

    main, other = save_prior(tmp_path / "main"), save_prior(tmp_path / "other", spread=0.2)
    options = PriorOptions(guide_ckpt=str(other), guide_scale=2.0, steps=2)
    record = PriorDraw(main, True, options, seed=0).record(4)
    assert record.guide == str(other) and len(record.options["guide_ckpt"]) == 64
    plain = PriorDraw(main, True, PriorOptions(steps=2), seed=0)
    assert plain.record(4).options["guide_ckpt"] is plain.record(4).options["guide_scale"] is None
    assert (plain.draw(torch.arange(4).numpy()) != PriorDraw(main, True, options, seed=0).draw(range(4))).any()
    small = save_prior(tmp_path / "small", V=V - 1)
    with pytest.raises(ValueError, match=f"have V={V - 1}, but those of the prior"):
        PriorDraw(main, True, PriorOptions(guide_ckpt=str(small), guide_scale=2.0), seed=0)
