"""Write the benchmarks' results into benchmarks/README.md (the tables) and README.md (five figures), between marks.

    python -m benchmarks.readme             # after a benchmark has written benchmarks/results/*.json

A block `<!-- begin NAME (…) -->` … `<!-- end NAME -->` holds the table of the benchmark NAME; the block `figures` holds
one line per entry of FIGURES. Published numbers to compare with are rows of benchmarks/published.json.
"""

import json
import re
import textwrap
from pathlib import Path

from benchmarks.record import OWN_RESULTS, RESULTS, ROOT

PAGES = ("README.md", "benchmarks/README.md")
BOTH = "train_options loading extraction-fp32 extraction-bf16 sampling steps prior evaluation growth".split()
ON_A_CPU = "steps-bf16 memory roofline sources".split()  # two are computed
DEVICES = dict.fromkeys(BOTH, ("cpu", "gpu")) | {"gpu": ("gpu",)} | dict.fromkeys(ON_A_CPU, ("cpu",))
PERCENT = ("MFU", "share of peak", "of the data sheet", "within 1")  # columns with shares of 1
NOT_VERSIONS = ("gpu", "cpu", "cores", "memory_gib", "commit")  # keys of a result's machine


def read_result(name: str, device: str) -> dict | None:
    """A benchmark's JSON for a device, "cpu" or "gpu"; None if it is not measured."""
    path = RESULTS / f"{name}-{device}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def on_what(result: dict) -> str:
    return result["machine"]["gpu"] or f"{result['machine']['cores']} CPU cores"


def cell(value: object, key: str = "") -> str:
    """A value as a table shows it: three digits, shares in percent."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if key in PERCENT:
            return f"{value:.0%}"
        return f"{float(f'{value:.3g}'):,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def wrapped(paragraph: str, indent: str = "") -> list[str]:
    return textwrap.wrap(paragraph, 120, break_long_words=False, break_on_hyphens=False, subsequent_indent=indent)


def details(name: str) -> list[str]:
    """One benchmark: how and on which machine it was measured, and the table, published rows last."""
    results, lines = {device: read_result(name, device) for device in DEVICES[name]}, []
    for device, result in results.items():
        if not result:
            lines += [f"{device.upper()}: not measured yet.", ""]
            continue
        machine = result["machine"]
        versions = ", ".join(f"{key} {value}" for key, value in machine.items() if key not in NOT_VERSIONS)
        where = f"{machine['gpu']}, {machine['cores']}" if machine["gpu"] else machine["cores"]
        lines += wrapped(
            f"`{result['command']}`, {result['date']}, commit `{machine['commit']}`, on {where} cores of "
            f"{machine['cpu']}, {machine['memory_gib']} GiB; {versions}."
        )
        lines.append("")
    rows = [dict(row, on=on_what(result)) for result in results.values() if result for row in result["rows"]]
    rows += json.loads((ROOT / "benchmarks/published.json").read_text()).get(name, [])
    first, *others = dict.fromkeys(key for row in rows for key in row if key != "on") or [""]
    columns = [first, *(["on"] if len(DEVICES[name]) > 1 else []), *others]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(cell(row.get(key), key) for key in columns)} |" for row in rows]


# One line each in README.md: a function of the result and of its rows, the measured values as text.
FIGURES = {
    "train_options": lambda result, rows: (
        f"Training: {rows[-1]['images/s']} images/s with `train_fast` ({rows[-1]['model']}, batch {rows[-1]['batch']}, "
        f"bf16, compiled), {rows[-1]['times the first']} times the rate of `train_original`, which encodes images at "
        "each step"
    ),
    "memory": lambda result, rows: (
        f"Training memory: {rows[-1]['model']} in bf16, compiled, takes {rows[-1]['GiB']} GiB for {result['batch']} "
        f"images at once. A GPU of {rows[-2]['card, GiB']} GiB holds {rows[-2]['images at once']} and one of "
        f"{rows[-3]['card, GiB']} GiB {rows[-3]['images at once']}: `{rows[-3]['flags']}`"
    ),
    "loading": lambda result, rows: (
        f"Loading features: the training loader delivers {rows[-1]['samples/s']} samples/s with two workers. Reading "
        f"random rows from shards is {rows[1]['times one file per image']} times as fast as from one file per image"
    ),
    "extraction-bf16": lambda result, rows: (
        f"Extraction: {rows[-1]['images/s']} images/s in bf16 with Stable Diffusion's VAE and a ViT-L/14. The two "
        f"networks alone, timed in a run of their own, reach {rows[-2]['images/s']}"
    ),
    "sampling": lambda result, rows: (
        f"Sampling: {rows[-1]['images/s']} images/s ({result['model']}, DPM-Solver++ with 25 steps, bf16), "
        f"{rows[-1]['times the first']} times the rate of the baseline (250 DDPM steps, fp32)"
    ),
}


def figures() -> list[str]:
    """The README's lines, each with the device it was measured on: a GPU if there is a result of one."""
    lines = []
    for name, words in FIGURES.items():
        result = next(filter(None, (read_result(name, device) for device in reversed(DEVICES[name]))))
        rows = [{key: cell(value, key) for key, value in row.items()} for row in result["rows"]]
        on = "computed" if name == "memory" else on_what(result)
        lines += wrapped(f"- {words(result, rows)} ({on}).", "  ")
    return lines


def filled(path: Path) -> str:
    """A page's text with each marked block filled in. Raises ValueError for a block without a benchmark."""

    def block(match):
        name = match[2]
        if name != "figures" and name not in DEVICES:
            raise ValueError(f"{path} has a block {name!r}, which is no benchmark's")
        return "\n".join([match[1], *(figures() if name == "figures" else details(name)), match[3]])

    return re.sub(r"(<!-- begin (\S+) .*?-->)\n.*?(<!-- end \2 -->)", block, path.read_text(), flags=re.DOTALL)


def outdated_pages() -> list[str]:
    """The pages that differ from the results."""
    return [page for page in PAGES if filled(ROOT / page) != (ROOT / page).read_text()]


def write_pages() -> list[str]:
    """Fill in all pages. Returns those that were out of date; none where BENCHMARK_RESULTS names another folder."""
    outdated = outdated_pages() if RESULTS == OWN_RESULTS else []
    for page in outdated:
        (ROOT / page).write_text(filled(ROOT / page))
    return outdated


if __name__ == "__main__":
    for page in write_pages():
        print(f"{page}: written")
