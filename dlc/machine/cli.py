"""The command line: flags, errors in one line, warnings printed once, and progress. Imports nothing heavy."""

import argparse
import atexit
import contextlib
import functools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NoReturn, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

    from diffusion.options import Option

LONGEST_LINE = 500  # characters of an error
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"  # of fractions
PLAIN_SECONDS = 30  # between two lines of progress where standard error is no terminal
WARNED = set()  # subjects that this process has warned of
# what torch's and Triton's errors say where a kernel cannot be built
NO_COMPILER = r"C(\+\+)? compiler|C\+\+ compile error|Python\.h|\bgcc\b"


def printable(text: object) -> str:
    """The text without control characters, with which a file's name or content could steer the terminal."""
    return "".join(
        character if character.isprintable() else "?" if character > " " else " "
        for character in re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", str(text))
    )


def one_line(text: object, limit: int = LONGEST_LINE) -> str:
    """The text as one printable line; of one that is too long, the middle is left out."""
    line = " ".join(printable(text).split())
    return line if len(line) <= limit else f"{line[: limit * 3 // 5]} … {line[-limit * 2 // 5 + 3 :]}"


def shortened(message: object) -> str:
    """A message as one line of about LONGEST_LINE characters: its long values, such as paths, lose their middle, its
    sentences stay."""
    line = one_line(message, 10**9)
    for most in (200, 100, 50, 25):
        if len(line) > LONGEST_LINE:
            values = rf"'[^']{{{most},}}'|\[[^][]{{{most},}}\]|[^\s'\[\]]{{{most},}}"
            line = re.sub(values, lambda value, most=most: one_line(value[0], most), line)
    return one_line(line, 10 * LONGEST_LINE)  # text of a file that is nothing but words


def say(text: str) -> None:
    """Print a line to standard error. Where nothing takes it any more, as a reader that is gone, the work goes on."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        drop_at_exit(sys.stderr)


@functools.cache
def drop_at_exit(stream: TextIO) -> None:
    """Of a stream that failed, drop at the end what it still holds: Python would exit with status 120 for it."""

    def drop():
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    atexit.register(drop)


def warn_once(subject: str, message: str) -> None:
    """Print a warning to standard error: on rank 0 only, and only the first one on its subject."""
    if subject not in WARNED and os.environ.get("RANK", "0") == "0":
        WARNED.add(subject)
        say(f"warning: {shortened(message)}")


#################################################################################
#                                     Flags                                     #
#################################################################################


def number(kind: Callable[[str], float], low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: an int or float from low to high, never infinite or NaN (which no comparison holds for)."""

    def parse(text):
        value = kind(text)
        if not (low <= value <= high and value != math.inf):
            raise argparse.ArgumentTypeError(
                f"{text}: must be {'at least ' + str(low) if high == math.inf else f'{low} to {high}'}"
            )
        return value

    parse.__name__ = kind.__name__  # argparse names it where text is no number at all
    return parse


def whole_or_float(text: str) -> float:
    """A number, an int where it is whole."""
    value = float(text)
    return int(value) if value.is_integer() else value


def add_option(add: Callable, name: str, uses: "Mapping[tuple[Option, object], list[str]]", words: str) -> None:
    """Add the flag of an `Option`, None where it is not given.

    uses: who has it, by the option and its default: several may have one of this name, and the flag takes what one of
        them does. words: before its help, with {} for who has it.
    """
    about = "; ".join(f"{words.format(', '.join(had))}{one.about} [{default}]" for (one, default), had in uses.items())
    choices = [choice for option, _ in uses for choice in option.choices]
    lowest, highest = min(option.low for option, _ in uses), max(option.high for option, _ in uses)
    taken = dict(choices=[*dict.fromkeys(choices)]) if choices else dict(type=number(float, lowest, highest))
    add(f"--{name.replace('_', '-')}", help=about, **taken)


def needs(args: argparse.Namespace, other: str, *names: str) -> None:
    """Raise ValueError for the first of these flags that is given without the other one, with which it goes."""
    for name in names:
        if getattr(args, name) is not None and not getattr(args, other):
            raise ValueError(f"{flag(name)} goes with {flag(other)}: give that as well, or leave it out")


def excludes(args: argparse.Namespace, other: str, *names: str, free: tuple = (None,)) -> None:
    """Raise ValueError for the first of these flags that is given beside the other one, but as one of `free`."""
    for name in names:
        if getattr(args, name) not in free and getattr(args, other):
            raise ValueError(f"{flag(name)} does not go with {flag(other)}: leave one of them out")


def flag(name: str) -> str:
    """The flag of a name in parsed arguments."""
    return f"--{name.replace('_', '-')}"


SEED = number(int, 0, 2**63 - 1)  # the argparse type of --global-seed


def path_or_name(text: str) -> str:
    """The argparse type of every flag without another: ~ expanded, which shells leave alone in --flag=~/x.

    An empty value, which an unset shell variable gives, would mean the current folder: it is refused.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: give a value (is a shell variable unset?)")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise argparse.ArgumentTypeError(f"{text}: no such user's home folder (write ./{text} for a file of that name)")
    return expanded


class NotHere(argparse.Action):
    """A flag of the reference's scripts that has no use here. Its help, as an error, says what to do without it."""

    def __init__(self, **kwargs):
        super().__init__(**dict(kwargs, nargs="?", default=argparse.SUPPRESS))

    def __call__(self, parser: argparse.ArgumentParser, *args) -> NoReturn:
        parser.error(f"{args[-1]} is a flag of the reference's scripts: {self.help}")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds each flag's default in brackets, unless its help ends with one, such as one that depends on the data."""

    def _get_help_string(self, action):
        text = action.help
        stated = action.default is None or action.default is False or text.endswith("]") or not action.option_strings
        return text if stated or action.default == argparse.SUPPRESS else f"{text} [%(default)s]"


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line on standard error, once for all ranks, and exit status 2."""

    def __init__(self, doc: str, **kwargs):
        super().__init__(description=doc, formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)
        self.register("type", None, path_or_name)

    def add_subparsers(self, **kwargs) -> argparse.Action:
        """As argparse; the words after a command have the types that its own flags say."""
        commands = super().add_subparsers(**kwargs)
        commands.type = str
        return commands

    def error(self, message: object) -> NoReturn:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            # A launcher stops all ranks when the first one ends: if rank 0 finds the same mistake, only it prints it.
            time.sleep(10)
        if str(message).endswith(("expected one argument", "expected at least one argument")):
            message = f"{message} (of a value that begins with -, write --flag=-value)"
        where = self.prog if rank == "0" else f"{self.prog}, rank {rank}"
        self.exit(2, f"{where}: error: {shortened(message)}\n")

    @contextlib.contextmanager
    def one_line_errors(
        self,
        kept: str = "nothing was begun",
        lower: str = "",
        mistakes: tuple[type[Exception], ...] = (ValueError, OSError),
    ) -> Iterator[None]:
        """Report what ends the work within in one line that says what is kept: a mistake, full disk or memory, Ctrl-C.

        Args:
            kept: what that is, as "what is drawn is kept".
            lower: the flag that makes the work need less memory; without it, these are the checks before the work.
            mistakes: exceptions whose own message is the line.
        """
        again = f"; {kept}: run the same command again" if lower else ""
        try:
            yield
        except KeyboardInterrupt:
            if os.environ.get("RANK", "0") == "0":
                say(f"stopped{again or f'; {kept}'}")
            self.exit(130)
        except (*mistakes, RuntimeError, MemoryError) as error:
            text = str(error)
            if isinstance(error, mistakes):
                message = text
            elif not lower:
                raise
            elif isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
                message = f"the memory is full: lower {lower}"
            elif re.search(NO_COMPILER, text):
                message = (
                    f"torch.compile needs a C and C++ compiler and Python.h ({one_line(text, 200)}): install gcc, "
                )
                message += "g++ and python3-dev, or give --no-compile"
            elif "by peer" in text:  # gloo's message when a process is gone
                message = "another process failed, see its message"
            else:
                raise
            self.error(message + again)


#################################################################################
#                                   Progress                                    #
#################################################################################


class Lines:
    """A file for tqdm where there is no terminal: what would redraw the bar is a line on standard error."""

    def write(self, text: str) -> None:
        if line := printable(text).strip():
            say(line)

    def flush(self) -> None:
        pass


def progress(iterable: Iterable | None = None, *, disable: bool = False, **kwargs) -> "tqdm":
    """tqdm, in rank 0 alone. Where standard error is no terminal it prints a line every 30 s, and one at each end.

    Takes tqdm's arguments: total, initial, desc, unit, bar_format, delay (seconds; shorter work shows nothing).
    """
    from tqdm import tqdm  # not every command imports it

    if not sys.stderr.isatty():
        kwargs.update(file=Lines(), mininterval=PLAIN_SECONDS, miniters=0)
    return tqdm(iterable, disable=disable or os.environ.get("RANK", "0") != "0", **kwargs)
