"""A page to play with codes: mix those of images, vary one, draw new ones, and look at the pictures for them.

    pip install -r requirements-playground.txt
    python playground.py --ckpt results --encoder lavoies/SEM_dinov2_L512
    bash playground.sh                                  # what demo.sh trained; it runs demo.sh if that was not run

In: a DiTSEM, the encoder of its codes, and optionally a prior. The page shows pictures while they are denoised, the
share of each code that comes back, and the command that draws the same pictures: it calls the functions of
sample_ddp_computed_dlc.py. It listens on this machine alone, takes no path from the browser and uses no network.
"""

import argparse
import os
import shlex
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from compose_dlc import compose, read_logits
from diffusion.process_table import samplers_of
from dlc.data import code_dtype
from dlc.data.images import WHITE, image_grid, save_png
from dlc.machine.cli import ArgumentParser, number, one_line
from dlc.machine.processes import set_numerics, start_processes
from dlc.sampling.code_folder import open_codes
from dlc.sampling.conditions import ComputedCodes, compare_with_model
from dlc.sampling.latents import guidance, sampling_steps
from dlc.sampling.opening import open_model, open_sampler, open_vae
from dlc.sampling.pictures import Decoder
from dlc.sampling.prior_draw import PriorDraw
from dlc.sampling.prior_options import Given, PriorOptions
from dlc.sampling.sampling_flags import sampling_parser, settle_guidance
from dlc.weights.load import process_of
from dlc.weights.networks import DEFAULT_ENCODER, VAE_HELP, add_encoder_flags
from evaluation.tokens import EncoderNetwork, codes_of, encoder_of

if TYPE_CHECKING:
    import gradio

SOURCES, MOST_IMAGES, MOST_STEPS = 3, 8, 250
SHOWN = 5  # pictures of each image on its way
UPLOAD, WAITING = "16mb", 8  # the largest file, and requests that wait
NAMES = [*(f"source {i + 1}" for i in range(SOURCES)), "drawn"]  # where a token comes from
COLOURS = dict(orange=(230, 97, 0), violet=(93, 58, 155), green=(0, 140, 110), grey=(175, 175, 175))  # of NAMES
DRAWN = SOURCES  # in the place of a source's number: a prior drew the token, or the image's own distribution


def parse_args() -> tuple[ArgumentParser, argparse.Namespace]:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="draw from this DiTSEM, as sample_ddp_computed_dlc.py takes it")
    add_encoder_flags(add, None, f" of its codes [that of the features or of --ckpt, or {DEFAULT_ENCODER}]")
    add("--features-path", help="offer the codes of these features by row [those that the model was trained on]")
    add("--prior", metavar="CKPT", help="draw new codes and variations from this prior [none]")
    add("--vae", help=f"{VAE_HELP} [that of the checkpoint's features, or ema]")
    add("--no-ema", dest="ema", action="store_false", help="use the raw weights instead of the EMA weights")
    add("--port", type=number(int, 0, 65535), default=7860, help="listen on this port of 127.0.0.1; 0: any free one")
    add("--open", action="store_true", help="open the page in a browser [no]")
    return parser, parser.parse_args()


#################################################################################
#                                    Drawing                                    #
#################################################################################


class Studio:
    """What the page draws with. Raises ValueError for networks that do not belong together."""

    def __init__(self, args: argparse.Namespace):
        self.parser, self.state = sampling_parser("", ComputedCodes.script, ""), start_processes()
        self.parser.error = refuse
        flags = [*(["--vae", args.vae] if args.vae else []), *["--no-ema"] * (not args.ema)]
        drawn = self.parser.parse_args(["--ckpt", args.ckpt, *flags])
        path, self.model, self.meta = open_model(drawn, ComputedCodes.script, "")
        self.named = ["--ckpt", str(path), *flags]  # of a run that goes on, what is the newest now
        if self.model.conditioning != "codes":
            raise ValueError(f"--ckpt {args.ckpt} holds a {drawn.model}, which takes no codes: name a DiTSEM")
        self.vae, _, _ = open_vae(drawn, self.meta, self.model, self.state)
        theirs = self.meta.features_path
        known = args.features_path or (theirs if theirs and Path(theirs).is_dir() else None)
        self.rows = open_codes(known) if known else None
        self.encoder, _ = encoder_of(args, self.rows, str(path))
        compare_with_model(codes_of(self.encoder, f"the encoder {args.encoder}"), self.model, self.meta)
        self.read = EncoderNetwork(self.encoder, self.state.device)
        self.prior = PriorDraw(args.prior, args.ema, PriorOptions(), seed=0) if args.prior else None
        if self.prior:
            compare_with_model(self.prior.to(self.state.device).spec, self.model, self.meta)
        set_numerics(drawn.tf32)
        self.model.to(self.state.device)
        self.decoder = Decoder(self.vae)
        self.kept = tempfile.TemporaryDirectory(prefix="dlc-playground-")  # until the program ends

    def code_of(self, image: str | None, row: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The code (L,) of an image file, with its distributions (L, V), or of a row of the features, without."""
        if image is None:
            if not row.isdecimal() or int(row) >= len(self.rows or ()):
                raise ValueError(f"row {row}: the features have rows 0 to {len(self.rows or ()) - 1}")
            return torch.from_numpy(self.rows.gather(np.array([int(row)]), self.encoder.V))[0], None
        made = self.rows and self.rows.features and self.rows.features.manifest
        logits = read_logits(self.encoder, [image], (made and made.background) or WHITE)[0]
        return logits.argmax(dim=1), torch.softmax(logits / self.encoder.temperature, dim=1)

    @torch.inference_mode()
    def codes(self, do: str, sources: list, shares: list[float], keep: int, num: int, seed: int) -> tuple:
        """The codes (num, L) to draw, and where each token comes from, (num, L): a source's number, or DRAWN.

        Args:
            do: "mix": tokens of the sources by their shares, as compose_dlc.py; "vary": `keep` tokens of the first
                source, the others drawn around them by the prior or, without one, from the image's own distributions;
                "new": all drawn by the prior.
            sources: an image file or None, and what the field of a row says, of each.
        """
        there = [i for i, source in enumerate(sources) if any(source)]
        if do != "new" and len(there) < (2 if do == "mix" else 1):
            raise ValueError("upload images, or name rows: two or more to mix, one to vary")
        read = [self.code_of(*sources[i]) for i in there if do != "new"]
        if do == "mix":
            weights = torch.tensor([shares[i] for i in there])
            if not weights.sum() > 0:
                raise ValueError("all sources have the share 0: raise one")
            codes, taken = compose(torch.stack([code for code, _ in read]), weights, num, seed)
            return codes, torch.tensor(there)[taken]
        given, taken = None, torch.full((num, self.encoder.L), DRAWN)
        if do == "vary":  # as sample_prior.py --given keeps tokens
            (code, distributions), file = read[0], Path(self.kept.name) / "given.npy"
            np.save(file, code[None].numpy())
            given = Given(PriorOptions(given=str(file), keep_tokens=keep), len(code), self.encoder.V, seed)
            taken[given(torch.arange(num)) < self.encoder.V] = there[0]
        if self.prior:
            self.prior.seed, self.prior.given = seed, given
            codes = torch.from_numpy(self.prior.draw(np.arange(num)))
        elif do == "new":
            raise ValueError("there is no prior to draw new codes: start the page with --prior")
        elif distributions is None:
            raise ValueError("a row of features can be varied by a prior alone: upload the image, or name a --prior")
        else:
            drawn, _ = compose(distributions[None], torch.ones(1), num, seed)
            codes = torch.where(taken == DRAWN, drawn, code)
        return codes, taken

    def draw(self, codes: torch.Tensor, words: list[str]) -> Iterator[np.ndarray]:
        """The images (N, S, S, 3) uint8 that the model sees in some steps, and in the end those for codes (N, L) that
        the script draws by this command line."""
        args = self.parser.parse_args(words)
        settle_guidance(args)
        sampler = open_sampler(args, self.model, self.meta)
        shown = np.linspace(0, sampler.num_steps - 1, SHOWN + 1).round().astype(int).tolist()
        y, indices = (one.to(self.state.device) for one in (codes, torch.arange(len(codes))))
        steps = sampling_steps(self.model, sampler, y=y, seed=args.global_seed, indices=indices, **guidance(args))
        for step, (x, x_start) in enumerate(steps):
            if step in shown:
                yield self.decoder.images(x_start if step < shown[-1] else x)

    def answer(
        self,
        do: str,
        sources: list,
        shares: list,
        num: int,
        keep: int,
        sampler: str,
        steps: int,
        scale: float,
        seed: int,
    ) -> Iterator[dict]:
        """What the page shows of a request, as it goes: `images`, and in the end all of it."""
        num, keep, steps, seed = map(int, (num, keep, steps, seed))
        codes, taken = self.codes(do, sources, shares, keep, num, seed)
        words = [*self.named, "--dlc-dir", "codes.npy", "--dlc-order", "sequential", "--num-fid-samples", str(num)]
        words += ["--sampler", sampler, "--num-sampling-steps", str(steps)]
        words += ["--cfg-scale", str(scale), "--global-seed", str(seed)]
        strip = np.array([*COLOURS.values()], np.uint8)[taken.numpy()]
        strip = strip.repeat(max(1, 512 // strip.shape[1]), axis=1).repeat(12, axis=0)
        for images in self.draw(codes, words):
            yield dict(images=[(image, "") for image in images], strip=strip)
        back = (self.read(torch.from_numpy(images))["codes"] == codes).float().mean(dim=1).tolist()
        folder = Path(tempfile.mkdtemp(dir=self.kept.name))
        np.save(folder / "codes.npy", codes.numpy().astype(code_dtype(self.encoder.V)))
        save_png(folder / "images.png", image_grid(images, min(4, num)))
        of = torch.bincount(taken.flatten(), minlength=SOURCES + 1).tolist()
        parts = [f"{name} {tokens / taken.numel():.0%}" for name, tokens in zip(NAMES, of) if tokens]
        yield dict(
            images=[(image, f"{share:.2f}") for image, share in zip(images, back)],
            strip=strip,
            said=f"Tokens: {', '.join(parts)}. Code agreement {np.mean(back):.2f} on average.",
            files=[str(folder / "images.png"), str(folder / "codes.npy")],
            command=f"python {ComputedCodes.script} {shlex.join(words)}",
        )


def refuse(message: object) -> None:
    """In the place of a parser's `error`, which ends the program."""
    raise ValueError(message)


#################################################################################
#                                   The page                                    #
#################################################################################


def build_page(studio: Studio) -> "gradio.Blocks":
    """The page, which is not launched yet."""
    import gradio as gr

    samplers, rows = samplers_of(process_of(studio.meta)), len(studio.rows or ())
    legend = ", ".join(f"{name} {colour}" for name, colour in zip(NAMES, COLOURS))
    with gr.Blocks(title="DLC playground", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("## Discrete latent codes: mix, vary, draw")
        with gr.Row():
            with gr.Column(scale=3):
                images, numbers, shares = [], [], []
                with gr.Row():
                    for name in NAMES[:SOURCES]:
                        with gr.Column(min_width=120):
                            image = dict(type="filepath", image_mode=None, sources=["upload", "clipboard"], height=150)
                            images.append(gr.Image(label=name, elem_id=name.replace(" ", "-"), **image))
                            numbers.append(gr.Textbox(label=f"or row, 0 to {rows - 1}", visible=rows > 0))
                            shares.append(gr.Slider(0, 1, 1, label="share of tokens"))
                with gr.Row():
                    fast = "dpmsolver++" if "dpmsolver++" in samplers else next(iter(samplers))
                    sampler = gr.Dropdown([*samplers], value=fast, label="sampler")
                    steps = gr.Slider(2, MOST_STEPS, 10, step=1, label="steps")
                    scale = gr.Slider(1, 10, 1.5, step=0.1, label="guidance")
                with gr.Row():
                    num = gr.Slider(1, MOST_IMAGES, 4, step=1, label="pictures")
                    keep = gr.Slider(0, studio.encoder.L, studio.encoder.L // 2, step=1, label="tokens kept by Vary")
                    seed = gr.Number(0, precision=0, minimum=0, maximum=2**53, label="seed")
                with gr.Row():
                    buttons = dict(
                        mix=gr.Button("Mix", variant="primary"),
                        vary=gr.Button("Vary the first source"),
                        new=gr.Button("From nothing", visible=studio.prior is not None),
                    )
            with gr.Column(scale=2):
                gr.Markdown("Pictures, and the code agreement of each")  # labels would lie on the pictures
                look = dict(show_label=False, format="png")
                gallery = gr.Gallery(columns=4, height=300, object_fit="contain", buttons=["fullscreen"], **look)
                gr.Markdown(f"Where each token comes from, a row per picture: {legend}")
                outputs = dict(
                    images=gallery,
                    strip=gr.Image(height=130, buttons=["fullscreen", "download"], **look),
                    said=gr.Markdown(),
                    files=gr.File(label="picture and codes", file_count="multiple"),
                    command=gr.Textbox(label="the same from the command line", lines=3, elem_id="command"),
                )

        def handler(do, *values):
            files, numbers, shares = (values[i * SOURCES : (i + 1) * SOURCES] for i in range(3))
            sources = [(file, text.strip()) for file, text in zip(files, numbers)]
            try:
                for shown in studio.answer(do, sources, [*shares], *values[3 * SOURCES :]):
                    yield [shown.get(name, gr.skip()) for name in outputs]
            except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
                raise gr.Error(one_line(error) or "the memory is full", print_exception=False) from None

        inputs = [*images, *numbers, *shares, num, keep, sampler, steps, scale, seed]
        for do, button in buttons.items():
            button.click(partial(handler, do), inputs, [*outputs.values()], concurrency_limit=1, concurrency_id="draw")
    return page.queue(max_size=WAITING)


def launch(page: "gradio.Blocks", port: int, browser: bool = False) -> str:
    """Serve the page on 127.0.0.1, in a thread, and open it in a browser if wanted. Returns its address."""
    import gradio as gr

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none of a font server
    bounds = dict(max_file_size=UPLOAD, share=False, ssr_mode=False, mcp_server=False, footer_links=[], show_error=True)
    where = dict(server_name="127.0.0.1", server_port=port or None, inbrowser=browser)
    return page.launch(theme=theme, quiet=True, prevent_thread_lock=True, **where, **bounds)[1]


def main() -> None:
    parser, args = parse_args()
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")  # read at the import
    with parser.one_line_errors():
        try:
            import gradio  # noqa: F401
        except ImportError:
            raise ValueError("the page needs gradio: pip install -r requirements-playground.txt") from None
        studio = Studio(args)
        page = build_page(studio)
    print(f"the page is at {launch(page, args.port, args.open)}; Ctrl-C ends it", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
