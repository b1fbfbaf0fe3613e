"""What every benchmark shares: the machine it ran on, and its rows as a table and as a JSON file."""

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from dlc.runtime import versions

RESULTS = Path(__file__).parent / "results"


def machine():
    """Device, cores, memory, versions and commit; the commit ends in "+" where files differ from it."""
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

    changed = git("status", "--porcelain", "-uno", ":/", ":(top,exclude)benchmarks/results")
    return dict(
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        cpu=cpu[0],
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        python=platform.python_version(),
        **versions(),
        commit=git("rev-parse", "--short", "HEAD") + ("+" if changed else ""),
    )


def record(name, rows, **more):
    """Print rows (dicts of one set of keys) as a table, and write them to results/{name}-{cpu or gpu}.json.

    Returns that path.
    """
    here = machine()
    path = RESULTS / f"{name}-{'gpu' if here['gpu'] else 'cpu'}.json"
    columns = list(rows[0])
    cells = [columns] + [
        [f"{row[key]:,.4g}" if isinstance(row[key], float) else str(row[key]) for key in columns] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps(
            dict(
                benchmark=name,
                command=" ".join(["python -m benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
                date=datetime.date.today().isoformat(),
                machine=here,
                **more,
                rows=rows,
            ),
            indent=1,
        )
        + "\n"
    )
    print(f"written to {path}")
    return path
