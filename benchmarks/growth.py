"""How time and memory of each stage grow with its work: 1, 10 and 100 times as many rows, samples, tokens, pixels.

    python -m benchmarks.growth
    python -m benchmarks.growth --only "listing" "one file per image"     # rows whose name holds one of these

Each measurement runs the project's own functions in a process of its own, which does the same work at a tiny size
first. Seconds are the best of up to five; `MiB` is what the process's memory rises by at most, inputs included. An
exponent is the slope of log time, or of log memory, between the last two sizes: 1 where twice the work takes twice as
long. Above STEEP, the last column says why. The files lie in a temporary folder; most are links to a few.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

from benchmarks.growth_stage import Stage, in_a_process, measure, prepare, stages
from benchmarks.record import machine, record, result_path, write

STEEP = 1.15  # an exponent that wants a reason: caches and the first use of memory make up to 0.1
LEAST_MIB = 8  # of memory, below which an exponent says nothing


def exponent(sizes, values, least=0.0) -> float | None:
    """The slope of log value over log size between the last two sizes; None where a value is below `least`."""
    if min(values[-2:]) <= least:
        return None
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


def row_of(chosen: Stage, sizes, measured) -> dict:
    """A row of the table, of (seconds, MiB) at each size."""
    seconds, memory = zip(*measured)
    exponents = exponent(sizes, seconds), exponent(sizes, memory, LEAST_MIB)
    steep = any(one is not None and one > STEEP for one in exponents)
    return {
        "": chosen.name,
        "grows": chosen.grows,
        "from … to": " / ".join(f"{size:,}" for size in sizes),
        "seconds": " / ".join(f"{value:.2g}" if value < 100 else f"{value:.0f}" for value in seconds),
        "exponent": exponents[0],
        "MiB": " / ".join(f"{value:,.0f}" for value in memory),
        "memory exponent": exponents[1],
        "why": (chosen.why or "not known") if steep else None,
    }


def measured_before() -> dict[tuple[str, str], dict]:
    """The rows in the result's file, if this machine measured them: one that was disturbed can be measured again."""
    path = result_path("growth")
    result = json.loads(path.read_text()) if path.is_file() else dict(machine=None)
    if result["machine"] != {**machine(), "commit": (result["machine"] or {}).get("commit")}:
        return {}
    return {(row[""], row["grows"]): row for row in result["rows"]}


def in_order(rows: dict[tuple[str, str], dict]) -> list[dict]:
    return [rows[key] for key in stages() if key in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="WORDS",
        help="measure rows whose name holds one of these, and keep others of this machine [all]",
    )
    parser.add_argument("--tiny", action="store_true", help="try it out: sizes so small that they say nothing")
    parser.add_argument("--dir", help="folder for the temporary files [the system's]")
    args = parser.parse_args()
    rows = measured_before() if args.only else {}
    with tempfile.TemporaryDirectory(dir=args.dir) as root:
        for key, chosen in stages().items():
            if args.only and not any(words in chosen.name for words in args.only):
                continue
            sizes, measured = chosen.sizes_of(args.tiny), []
            for size in dict.fromkeys((chosen.tiny, *sizes)):
                in_a_process(prepare, key, Path(root), size)
            for size in sizes:
                measured.append(in_a_process(measure, key, Path(root), size))
            rows[key] = row_of(chosen, sizes, measured)
            print(rows[key], flush=True)
            write("growth", in_order(rows))
    record("growth", in_order(rows))


if __name__ == "__main__":
    main()
