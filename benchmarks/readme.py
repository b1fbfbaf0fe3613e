"""Writes what the benchmarks found into README.md and benchmarks/README.md, between their begin and end marks.

    python -m benchmarks.readme             # after a benchmark has written benchmarks/results/*.json
    python -m benchmarks.readme --check     # ends with 1 where the text is not what the results say

A new benchmark is an entry of REPORTS. A result that is not there reads "not measured yet". Figures of others stand in
benchmarks/published.json, rows with the same columns and one that says on what, and whose.
"""
import argparse
import json
import re
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

from benchmarks import sampling, train_options
from benchmarks.record import RESULTS

ROOT = Path(__file__).parents[1]
MISSING = "not measured yet"


@dataclass
class Report:
    """How a benchmark's results are told.

    Args:
        title: begins the paragraph in README.md.
        columns: of the table in README.md, headings to keys of the rows; empty: those of the rows. The whole table is
            in benchmarks/README.md.
        about: told after the title, a format string for the result of the first device that is measured.
        shares: keys whose values are shares of 1, told in percent.
        words: a function of one result that tells it in a sentence, in README.md in place of the table.
        unmeasured: a function of "cpu" or "gpu", the rows that are told as long as that is not measured.
        devices: "cpu" and "gpu", or the one that matters.
    """
    title: str
    columns: dict = field(default_factory=dict)
    about: str = ""
    shares: tuple = ()
    words: Callable = None
    unmeasured: Callable = lambda device: [{}]
    devices: tuple = ("cpu", "gpu")


def loading_words(result):
    rows = {(row["layout"], row["cache"]): row for row in result["rows"]}
    times = "times one file an image"
    warm, cold, loader = rows["shards", "warm"], rows["shards", "cold"], result["rows"][-1]
    return (f"packed, random rows come {warm[times]:.0f} times as fast as from one file an image out of the page cache "
            f"and {cold[times]:.0f} times off the disk; that is {rounded(warm['samples/s'])} samples/s by the gather "
            f"itself, and {rounded(loader['samples/s'])} out of training's loader with two workers")


def extraction_words(result):
    rates = {row["part"]: row["images/s"] for row in result["rows"]}
    return (f"{rates['the whole']:.2g} images/s with Stable Diffusion's VAE and a ViT-L/14, "
            f"{rates['the whole'] / rates['both networks']:.0%} of what both networks reach by themselves, which share "
            f"the device; the VAE alone reaches {rates['VAE']:.2g}. A reader decodes "
            f"{rates['decoding'] / result['num_workers']:.0f} images/s")


def npz_words(result):
    write, check = result["rows"]
    return (f"{write['images']:,} images of 256x256 are written at {write['images/s']:.0f} images/s in "
            f"{write['memory GiB']:.2f} GiB of memory, and checked at {check['images/s']:.0f}")


REPORTS = {
    "train_options": Report(
        "Training, option by option", {
            "": "", "model": "model", "batch": "batch", "data": "data", "checkpointing": "checkpointing",
            "precision": "precision", "compiled": "compiled", "steps/s": "steps/s", "images/s": "images/s",
            "MFU": "MFU", "memory, GiB": "memory GiB", "loss differs by": "loss differs by"},
        shares=("MFU",),
        unmeasured=lambda device: [train_options.described(row, device == "gpu") for row in train_options.ROWS]),
    "memory": Report("Memory of training by batch, computed from what autograd saves", devices=("cpu",),
                     about=" ({model}, bf16)"),
    "loading": Report("Loading features", words=loading_words),
    "extraction-fp32": Report("Extraction in fp32", words=extraction_words),
    "extraction-bf16": Report("Extraction in bf16", words=extraction_words),
    "sampling": Report(
        "Sampling", {
            "": "", "precision": "precision", "steps": "steps", "guided": "guided", "images/s": "images/s",
            "times the first": "times the first", "share of peak": "share of peak", "grey levels off": "differs by"},
        shares=("share of peak", "within 1"),
        unmeasured=lambda device: [{"": sampling.ANCESTORS, "precision": "fp32"}] + [
            {"": name, "precision": precision} for name, precision, flags, _ in sampling.ROWS
            if device == "gpu" or "--cuda-graphs" not in flags]),
    "npz": Report("The .npz for FID", words=npz_words, devices=("cpu",)),
}


def read_result(name, device):
    """A benchmark's JSON on a device, "cpu" or "gpu"; None where it is not measured."""
    path = RESULTS / f"{name}-{device}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def device_name(machine):
    """What a result was measured on, in short."""
    return machine["gpu"] or f"{machine['cores']} CPU cores"


def wrapped(paragraph):
    """Its lines, of the width of the page."""
    return textwrap.wrap(paragraph, 120, break_long_words=False, break_on_hyphens=False)


def rounded(value):
    """A number's three leading digits, without an exponent where it is large."""
    return f"{float(f'{value:.3g}'):,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cell(value, key, shares):
    """A value as a table shows it: three digits, shares in percent."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0%}" if key in shares else rounded(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(name, columns=None):
    """The rows of all devices and, last, of others, in Markdown: a list of lines.

    Args:
        columns: headings to keys; None for all keys of the rows.
    """
    report, results = REPORTS[name], {device: read_result(name, device) for device in REPORTS[name].devices}
    missing = {device: f"{device.upper()}: {MISSING}" for device, result in results.items() if not result}
    ours = [dict(row, on=device_name(result["machine"])) for result in results.values() if result
            for row in result["rows"]]
    theirs = json.loads((Path(__file__).parent / "published.json").read_text()).get(name, [])
    columns = columns or {key: key for row in ours + theirs for key in row if key != "on"}
    if not columns:
        return [", ".join(missing.values()) + "."]
    (heading, first), *others = columns.items()
    ours += [dict(row, on=words) for device, words in missing.items() for row in report.unmeasured(device)]
    on = [("on", "on")] if len(report.devices) > 1 else []
    columns = dict([(heading, first), *on, *others])
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in ours + theirs:
        lines.append(f"| {' | '.join(cell(row.get(key), key, report.shares) for key in columns.values())} |")
    return lines


def performance():
    """The README's section: a paragraph or table a benchmark."""
    lines = []
    for name, report in REPORTS.items():
        if report.words:
            told = []
            for device in report.devices:
                result = read_result(name, device)
                told.append(f"{device_name(result['machine'])}: {report.words(result)}." if result else
                            f"{device.upper()}: {MISSING}.")
            lines += [*wrapped(f"**{report.title}.** {' '.join(told)}"), ""]
        else:
            results = list(filter(None, (read_result(name, device) for device in report.devices)))
            about = report.about.format(**results[0]) if results else ""
            lines += [f"**{report.title}**{about}", "", *table(name, report.columns), ""]
    return lines[:-1]


def details(name):
    """One benchmark in benchmarks/README.md: on what it was measured, and the whole table."""
    lines = []
    for device in REPORTS[name].devices:
        result = read_result(name, device)
        if not result:
            continue                                            # its rows say so
        machine = result["machine"]
        device_words = f"{machine['gpu']}, " if machine["gpu"] else ""
        versions = ", ".join(f"{package} {machine[package]}" for package in machine if package not in (
            "gpu", "cpu", "cores", "memory_gib", "commit"))
        lines += [*wrapped(
            f"`{result['command']}`, {result['date']}, commit `{machine['commit']}`, on {device_words}"
            f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB; {versions}."), ""]
        picture = RESULTS / f"{name}-{device}.png"
        if picture.is_file():
            lines += [f"![{REPORTS[name].title}](results/{picture.name})", ""]
    return lines + table(name)


def filled(path):
    """A file's text with each marked block made anew. Raises ValueError for a block that nothing fills."""
    def block(match):
        name = match[2]
        if name != "performance" and name not in REPORTS:
            raise ValueError(f"{path} has a block {name!r}, which is no benchmark's")
        lines = performance() if name == "performance" else details(name)
        return "\n".join([match[1], *lines, match[3]])
    return re.sub(r"(<!-- begin (\S+) .*?-->)\n.*?(<!-- end \2 -->)", block, path.read_text(), flags=re.DOTALL)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; end with 1 where something would change")
    args = parser.parse_args()
    different = False
    for path in (ROOT / "README.md", ROOT / "benchmarks/README.md"):
        text = filled(path)
        if text != path.read_text():
            different = True
            print(f"{path.relative_to(ROOT)}: " + ("is not what the results say: run python -m benchmarks.readme"
                                                   if args.check else "written"))
            if not args.check:
                path.write_text(text)
    sys.exit(args.check and different)


if __name__ == "__main__":
    main()
