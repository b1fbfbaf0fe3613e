"""How codes are drawn from a prior: the flags, and the codes that are kept in part."""

import hashlib
import re
from dataclasses import dataclass, fields

import numpy as np
import torch

from diffusion.masked_samplers import SAMPLERS
from dlc.data.codes import CodeSpec, compare
from dlc.machine.cli import number
from dlc.machine.files import recorded_id
from dlc.machine.noise import Stream, random_words
from dlc.sampling.code_folder import open_codes

#################################################################################
#                                     Flags                                     #
#################################################################################


def _places(text):
    """The argparse type of --keep-places: a position, or a range such as 0-15."""
    match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", text)
    if not match or int(match[1]) > int(match[2] or match[1]):
        raise ValueError(text)
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def _class(text):
    """The argparse type of --class: a class's number, or "all"."""
    return text if text == "all" else number(int, 0)(text)


_places.__name__, _class.__name__ = "position or range", "class"


def add_prior_flags(add_flag, prefix: str = "") -> None:
    """How codes are drawn from a prior. Nothing has a default in the parser: see `PriorOptions`."""

    def add(name, *others, **kwargs):
        flags = [f"--{prefix}{one}" for one in (name, *others)]
        metavar = {} if "choices" in kwargs else dict(metavar=name.upper().replace("-", "_"))
        add_flag(*flags, dest=f"prior_{name.replace('-', '_')}", **{**metavar, **kwargs})

    add(
        "sampler",
        choices=SAMPLERS,
        help="; ".join(f"{name}: {spec.about}" for name, spec in SAMPLERS.items()) + " [first-hitting]",
    )
    defaults = ", ".join(f"{name}: {spec.default_steps or 'L'}" for name, spec in SAMPLERS.items())
    add(
        "steps",
        "calls",
        type=number(int, 1),
        help="calls of the network per code, or steps in time of the analytic sampler and the corrector, which call it "
        f"only where a token changes [{defaults}]",
    )
    add("temperature", type=number(float, 0), help="divide the logits by this; 0 takes the likeliest [1]")
    add("top-p", type=number(float, 1e-6, 1), help="draw from the likeliest tokens of this share [1]")
    add("eta", type=number(float, 0, 1), help="probability per step that the corrector masks a token again [0.01]")
    add(
        "class",
        type=_class,
        nargs="+",
        metavar="CLASS",
        help="of a prior with classes: class of sample i, by number, cycling through those given; all: every class in "
        "turn [none]",
    )
    add("cfg-scale", type=number(float, 1), help=f"guidance scale of --{prefix}class; 1 disables guidance [1]")
    add(
        "given",
        metavar="CODES",
        help="keep tokens of these codes and draw the others: a source as --dlc-dir takes it; sample i keeps some of "
        "row i, cycling [none]",
    )
    add("given-rows", type=number(int, 0), nargs="+", metavar="ROW", help="use these rows of them [all]")
    add(
        "keep-tokens",
        type=number(int, 0),
        metavar="N",
        help=f"keep N tokens of the --{prefix}given code, at places drawn for each sample",
    )
    add(
        "keep-places",
        type=_places,
        nargs="+",
        metavar="PLACE",
        help=f"keep the tokens of the --{prefix}given code at these positions, or ranges such as 0-15",
    )


@dataclass(frozen=True)
class PriorOptions:
    """The flags of `add_prior_flags`, with their defaults."""

    sampler: str = "first-hitting"
    steps: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    eta: float | None = None
    classes: list | None = None
    cfg_scale: float = 1.0
    given: str | None = None
    given_rows: list | None = None
    keep_tokens: int | None = None
    keep_places: list | None = None

    @classmethod
    def of(cls, args, prefix: str = "") -> "PriorOptions":
        """Those of parsed args. Raises ValueError for flags that do not go together."""
        values = dict(
            sampler=args.prior_sampler,
            steps=args.prior_steps,
            temperature=args.prior_temperature,
            top_p=args.prior_top_p,
            eta=args.prior_eta,
            classes=args.prior_class,
            cfg_scale=args.prior_cfg_scale,
            given=args.prior_given,
            given_rows=args.prior_given_rows,
            keep_tokens=args.prior_keep_tokens,
            keep_places=args.prior_keep_places,
        )
        options, flag = cls(**{name: value for name, value in values.items() if value is not None}), f"--{prefix}"
        if options.cfg_scale > 1 and options.classes is None:
            raise ValueError(f"{flag}cfg-scale {options.cfg_scale}: guidance needs a {flag}class")
        kept = [name for name in ("keep_tokens", "keep_places") if values[name] is not None]
        if options.given and len(kept) != 1:
            raise ValueError(f"{flag}given: say what to keep of it, by {flag}keep-tokens or {flag}keep-places")
        if not options.given and (kept or options.given_rows):
            name = (kept or ["given_rows"])[0].replace("_", "-")
            raise ValueError(f"{flag}{name} says what to keep of a code: name the codes with {flag}given")
        return options


# The name of each option's flag, without its prefix.
OPTIONS = [one.name.replace("classes", "class").replace("_", "-") for one in fields(PriorOptions)]


#################################################################################
#                               Codes to keep in part                           #
#################################################################################


class Given:
    """Codes that are kept in part: given(indices) is (N, L) int64, with V where tokens are to be drawn."""

    def __init__(self, options: PriorOptions, L: int, V: int, seed: int):
        codes = open_codes(options.given)
        compare(codes, CodeSpec(owner="the prior", L=L, V=V))
        self.codes, self.L, self.V, self.seed = codes, L, V, seed
        self.rows = np.array(options.given_rows or range(len(codes)), dtype=np.int64)
        if self.rows.max() >= len(codes):
            raise ValueError(f"row {self.rows.max()} is not in {options.given}, which has rows 0 to {len(codes) - 1}")
        self.tokens, self.places = options.keep_tokens, None
        if self.tokens is not None:
            self.kept = f"{self.tokens} tokens at random places"
            if self.tokens > L:
                raise ValueError(f"there are only {L} tokens to keep, not {self.tokens}")
        else:
            self.places = sorted({place for part in options.keep_places for place in part})
            if self.places[-1] >= L:
                raise ValueError(f"position {self.places[-1]} is not in a code, which has positions 0 to {L - 1}")
            self.kept = f"{len(self.places)} tokens at positions {_ranges(self.places)}"
        self.source = recorded_id(options.given)
        digest = hashlib.sha256()
        for part in np.array_split(self.rows, 1 + len(self.rows) // 4096):
            digest.update(self.codes.gather(part, V).astype("<u2").tobytes())
        self.sha256 = digest.hexdigest()

    def __call__(self, indices: torch.Tensor) -> torch.Tensor:
        rows = self.rows[indices.numpy() % len(self.rows)]
        codes = torch.from_numpy(self.codes.gather(rows, self.V))
        if self.places is not None:
            kept = torch.zeros(self.L, dtype=torch.bool).index_fill_(0, torch.tensor(self.places), True)
            return torch.where(kept, codes, self.V)
        order = random_words(self.seed, Stream.SAMPLE_KEEP, indices, self.L).argsort(dim=1, stable=True)
        return codes.scatter(1, order[:, self.tokens :], self.V)


def _ranges(places):
    """Ascending numbers as "0-15, 20"."""
    known = set(places)
    starts = [place for place in places if place - 1 not in known]
    ends = [place for place in places if place + 1 not in known]
    return ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends))
