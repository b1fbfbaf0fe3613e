"""How codes are drawn from a prior: the flags, and the codes that are kept in part."""

import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
import torch

from diffusion.masked_samplers import CODE_SAMPLERS
from dlc.data.codes import CodeSpec, compare
from dlc.machine.cli import needs, number
from dlc.machine.noise import Stream, random_words
from dlc.sampling.code_folder import digest_of, open_codes


def _places(text):
    """The argparse type of --keep-places: a position, or a range such as 0-15."""
    match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", text)
    if not match or int(match[1]) > int(match[2] or match[1]):
        raise ValueError(text)
    return range(int(match[1]), int(match[2] or match[1]) + 1)


_places.__name__ = "position or range"


def class_number(asked: str | int, count: int, names: Sequence[str] = ()) -> int:
    """The number of one of `count` classes that a user names by number or by name. Raises ValueError for neither."""
    if str(asked).isdecimal() and int(asked) < count:
        return int(asked)
    if asked in names:
        return names.index(asked)
    known = f"or names such as {names[0]}" if names else "and their names are not known"
    raise ValueError(f"--class {asked}: the model's classes are 0 to {count - 1}, {known}")


def option(default: object, help: str, *names: str, **argument) -> Any:
    """A field of `PriorOptions`: its default; the help, names [the field's] and argparse's argument of its flag."""
    return field(default=default, metadata=dict(help=help, names=names, argument=argument))


COUNT, SCALE = number(int, 0), number(float, 1)
ABOUT = "; ".join(f"{name}: {spec.about}" for name, spec in CODE_SAMPLERS.items())
STEPS = ", ".join(f"{name}: {spec.default_steps or 'L'}" for name, spec in CODE_SAMPLERS.items())


def of_samplers(name: str, default: float | None) -> Any:
    """The field of an option that samplers have."""
    one = next(spec.options[name] for spec in CODE_SAMPLERS.values() if name in spec.options)
    return option(default, one.about, type=number(float, one.low, one.high))


@dataclass(frozen=True)
class PriorOptions:
    """How codes are drawn from a prior. Each field has a flag, see `prior_flags`, and a key in codes.json."""

    sampler: str = option("first-hitting", ABOUT, choices=CODE_SAMPLERS)
    steps: int | None = option(
        None,
        "call the network this many times per code; for the analytic sampler and the corrector: take this many steps "
        f"in time, which call it only where a token changes [{STEPS}]",
        *("steps", "calls"),
        type=number(int, 1),
    )
    temperature: float = of_samplers("temperature", 1.0)
    top_p: float = of_samplers("top_p", 1.0)
    eta: float | None = of_samplers("eta", None)
    classes: list | None = option(
        None,
        "with a class-conditional prior: draw codes of these classes in turn, by number; all: of every class [none]",
        "class",
        nargs="+",
    )
    cfg_scale: float = option(1.0, "set the guidance scale of --{prefix}class; 1 disables guidance", type=SCALE)
    guide_ckpt: str | None = option(
        None,
        "guide by this weaker prior over the same codes, an earlier checkpoint or a smaller model, instead of "
        "--{prefix}cfg-scale [none]",
        metavar="CKPT",
    )
    guide_scale: float | None = option(None, "set the scale of --{prefix}guide-ckpt; 1 disables it [none]", type=SCALE)
    given: str | None = option(
        None,
        "keep tokens of these codes and draw the others; takes what --dlc-dir takes; sample i keeps tokens of row i, "
        "cycling [none]",
        metavar="CODES",
    )
    given_rows: list | None = option(
        None, "use these rows of the given codes [all]", type=COUNT, nargs="+", metavar="ROW"
    )
    keep_tokens: int | None = option(
        None,
        "keep this many tokens of the --{prefix}given code, at places drawn for each sample [none]",
        type=COUNT,
        metavar="N",
    )
    keep_places: list | None = option(
        None,
        "keep the tokens of the --{prefix}given code at these positions, or ranges such as 0-15 [none]",
        type=_places,
        nargs="+",
        metavar="PLACE",
    )

    @classmethod
    def of(cls, args: Namespace, prefix: str = "") -> "PriorOptions":
        """Those of parsed `prior_flags`. Raises ValueError for flags that do not go together."""
        p = prefix.replace("-", "_")
        needs(args, p + "guide_ckpt", p + "guide_scale")
        needs(args, p + "guide_scale", p + "guide_ckpt")
        needs(args, p + "given", p + "given_rows", p + "keep_tokens", p + "keep_places")
        values = {one.name: getattr(args, p + one.name) for one in fields(cls)}
        if values["keep_places"]:
            values["keep_places"] = sorted({place for part in values["keep_places"] for place in part})
        options, flag = cls(**{name: value for name, value in values.items() if value is not None}), f"--{prefix}"
        kept = [name for name in ("tokens", "places") if values[f"keep_{name}"] is not None]
        if len(kept) > 1:  # also of 0 tokens
            raise ValueError(f"{flag}keep-tokens does not go with {flag}keep-places: leave one of them out")
        if options.given and not kept:
            raise ValueError(f"{flag}given: say what to keep of it, by {flag}keep-tokens or {flag}keep-places")
        if options.cfg_scale > 1 and options.classes is None:
            raise ValueError(f"{flag}cfg-scale {options.cfg_scale}: guidance needs a {flag}class")
        if options.guide_ckpt and options.cfg_scale > 1:
            raise ValueError(f"{flag}guide-ckpt guides in the place of {flag}cfg-scale: give one of them")
        return options


def prior_flags(prefix: str = "") -> dict[str, dict]:
    """A flag for each field of `PriorOptions`: the arguments of `add_argument` by names. Their defaults are None."""
    flags = {}
    for one in fields(PriorOptions):
        names = one.metadata["names"] or [one.name.replace("_", "-")]
        help = one.metadata["help"].format(prefix=prefix) + ("" if one.default is None else f" [{one.default}]")
        argument = dict(one.metadata["argument"], dest=f"{prefix}{one.name}".replace("-", "_"), help=help)
        flags[" ".join(f"--{prefix}{name}" for name in names)] = argument
    return flags


class Given:
    """Codes that are kept in part: given(indices) is (N, L) int64, with V where tokens are to be drawn.

    Raises ValueError where the source has no codes of this L and V, or lacks the rows, tokens or places to keep.
    """

    def __init__(self, options: PriorOptions, L: int, V: int, seed: int):
        codes = open_codes(options.given)
        compare(codes, CodeSpec(owner="the prior", L=L, V=V))
        self.codes, self.L, self.V, self.seed = codes, L, V, seed
        self.rows = np.array(options.given_rows or range(len(codes)), dtype=np.int64)
        if self.rows.max() >= len(codes):
            raise ValueError(f"row {self.rows.max()} is not in {options.given}, which has rows 0 to {len(codes) - 1}")
        self.tokens, self.places = options.keep_tokens, options.keep_places
        if (self.tokens or 0) > L or self.places and self.places[-1] >= L:
            what = f"keep {self.tokens} tokens" if self.places is None else f"keep the token at {self.places[-1]}"
            raise ValueError(f"cannot {what} of codes of {L} tokens, at positions 0 to {L - 1}")
        self.sha256 = digest_of(partial(codes.gather, V=V), self.rows)

    def __call__(self, indices: torch.Tensor) -> torch.Tensor:
        rows = self.rows[indices.numpy() % len(self.rows)]
        codes = torch.from_numpy(self.codes.gather(rows, self.V))
        if self.places is not None:
            kept = torch.zeros(self.L, dtype=torch.bool).index_fill_(0, torch.tensor(self.places), True)
            return torch.where(kept, codes, self.V)
        order = random_words(self.seed, Stream.SAMPLE_KEEP, indices, self.L).argsort(dim=1, stable=True)
        return codes.scatter(1, order[:, self.tokens :], self.V)
