"""What every benchmark shares: the machine it ran on, and its rows as a table and as a JSON file."""

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from dlc.machine.files import write_json
from dlc.machine.processes import versions

RESULTS = Path(__file__).parent / "results"


def machine():
    """Device, cores, memory, versions and commit; the commit ends in "+" where sources differ from it."""
    cpu = (
        [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        if Path("/proc/cpuinfo").exists()
        else [platform.processor()]
    )

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=RESULTS, capture_output=True, text=True).stdout.strip()

    written = [f":(top,exclude){path}" for path in ("benchmarks/results", "benchmarks/README.md", "README.md")]
    changed = git("status", "--porcelain", "-uno", ":/", *written)
    return dict(
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        cpu=cpu[0],
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        python=platform.python_version(),
        **versions(),
        commit=git("rev-parse", "--short", "HEAD") + ("+" if changed else ""),
    )


def result_path(name):
    """Where a benchmark's rows on this machine are written."""
    return RESULTS / f"{name}-{'gpu' if torch.cuda.is_available() else 'cpu'}.json"


def show(rows):
    """Print rows (dicts of one set of keys) as a table."""
    columns = list(rows[0])
    cells = [columns] + [
        [f"{row[key]:,.4g}" if isinstance(row[key], float) else str(row[key]) for key in columns] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def write(name, rows, **more):
    """Write rows, with what they were measured on, to results/{name}-{cpu or gpu}.json, whole. Returns that path."""
    path = result_path(name)
    path.parent.mkdir(exist_ok=True)
    write_json(
        path,
        dict(
            benchmark=name,
            command=" ".join(["python -m benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
            date=datetime.date.today().isoformat(),
            machine=machine(),
            **more,
            rows=rows,
        ),
    )
    return path


def record(name, rows, **more):
    """Print rows as a table and write them; see `show` and `write`. Returns the file's path."""
    show(rows)
    path = write(name, rows, **more)
    print(f"written to {path}")
    return path
