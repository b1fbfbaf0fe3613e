"""What an evaluation prints and writes: the table, SAMPLES.metrics.json, and the line for a paper."""

import contextlib
import datetime
import sys
from pathlib import Path

from dlc.machine.files import DirectoryLock, read_json, recorded_id, wait_for_lock, write_json
from dlc.machine.processes import versions
from dlc.sampling.samples_record import guidance_of
from evaluation.comparison import Comparison
from evaluation.measuring import Measured
from evaluation.metrics import K_DENSITY, K_PRECISION, METRICS, SPLIT_SIZE, Metric
from evaluation.sets import ImageSet

FORMAT = 1
METRICS_FILE = "format_version", "samples"  # keys of every SAMPLES.metrics.json
LISTS = ("runs", "labels", "code_rows", "vector_rows")  # keys of samples.json that are lists as long as the samples


def metrics_path(samples: Path) -> Path:
    """SAMPLES.metrics.json beside SAMPLES, or beside SAMPLES.npz: the same for a folder and its .npz."""
    samples = Path(samples).resolve()
    return samples.with_name(samples.name.removesuffix(".npz") + ".metrics.json")


def printed(row: Metric, value: float, digits: int) -> str:
    """A value as it is printed: a distance of equal sets may be below 0 by rounding, and is shown as 0."""
    return f"{max(0.0, value) if row.needs == 'statistics' else value:.{digits}f}"


def metric_rows(values: dict[str, float]) -> dict[str, Metric]:
    """The metrics whose numbers are in a dict as metrics.json holds it, by key, in the order of METRICS."""
    return {row.key or name: row for name, row in METRICS.items() if (row.key or name) in values}


def table(values: dict[str, float]) -> list[str]:
    """The metrics, a line each."""
    rows = metric_rows(values)
    width = max(len(row.label) for row in rows.values())
    lines = []
    for key, row in rows.items():
        more = f" ± {values[f'{key}_std']:.5f}" if f"{key}_std" in values else ""
        lines.append(f"{row.label:<{width}}  {printed(row, values[key], max(4, row.digits)):>12}{more}")
    return lines


def compared_with(comparison: Comparison) -> str:
    """What the numbers compare the samples with, in words."""
    reference, parts = comparison.reference, []
    if any(reference.stored(*key) for key in comparison.needed("statistics")):
        parts.append("its stored statistics" + (f" of {reference.count:,} images" if reference.count else ""))
    if comparison.compared.count:
        parts.append(f"{comparison.compared.count:,} images")
    return " and ".join(parts)


def definitions(comparison: Comparison) -> str:
    """Whose definitions the numbers follow: ADM's, but for those that a flag changes or that ADM does not have."""
    rows, args = [METRICS[name] for name in comparison.wanted], comparison.args
    parts = [] if all(row.paper for row in rows) else ["ADM's definitions in PyTorch"]
    if args.pr_precision != "adm":
        parts.append("distances of precision and recall in float32")
    for paper in dict.fromkeys(row.paper for row in rows if row.paper):
        parts.append(f"{' and '.join(row.label for row in rows if row.paper == paper)} as in {paper}")
    untied = [row.label for row in rows if row.network is None]
    if len(comparison.networks) > 1 and untied:
        parts.append(f"{' and '.join(untied)} of {args.features}'s features")
    return ", ".join(parts)


def paper_line(comparison: Comparison) -> str:
    """One line with the numbers, both sets, the network, and what drew the samples."""
    values, samples, path = comparison.values, comparison.samples, comparison.reference.path
    numbers = [f"{row.label} {printed(row, values[key], row.digits)}" for key, row in metric_rows(values).items()]
    parts = [
        f"{', '.join(numbers)}: {samples.count:,} samples of {samples.size[1]} x {samples.size[0]}"
        + (f" against {path.name} ({compared_with(comparison)})" if path else ""),
        definitions(comparison),
        *(f"{one.name} {one.digest[:8]}" for one in comparison.networks.values()),
    ]
    if record := samples.record:
        parts.append(
            f"{record.get('model')}, step {record.get('step')}, {record.get('weights')} weights, "
            f"{record.get('sampler')} {record.get('num_sampling_steps')} steps, {guidance_of(record)}, "
            f"seed {record.get('global_seed')}"
        )
    return "; ".join(parts)


def metrics_json(comparison: Comparison, warnings: list[str]) -> dict:
    """What a comparison writes to SAMPLES.metrics.json; see `write_metrics`."""
    reference, compared, args = comparison.reference, comparison.compared, comparison.args
    return dict(
        metrics=comparison.values,
        reference=dict(
            path=recorded_id(str(reference.path)) if reference.path else None,
            count=compared.count or None,
            size=list(reference.images.size) if reference.images else None,
            sha256=compared.digest or None,
            statistics_sha256=reference.statistics_sha256(),
            statistics_count=reference.count,
        ),
        networks={
            one.name: dict(file=recorded_id(str(one.path)), sha256=one.digest) for one in comparison.networks.values()
        },
        definitions=dict(
            split_size=SPLIT_SIZE,
            k_precision_recall=K_PRECISION,
            k_density_coverage=K_DENSITY,
            pr_precision=args.pr_precision,
            seed=args.global_seed,
        ),
        warnings=warnings,
        command=sys.argv,
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        processes=comparison.state.num_processes,
        device=str(comparison.state.device.type),
        versions=versions(),
    )


def write_metrics(path: Path, samples: ImageSet, measured: Measured, content: dict) -> str:
    """Write numbers of samples to their .metrics.json, whole or not at all. Returns what was done, in words.

    Numbers that another command wrote stay if it measured the same images, which their digest tells.

    Raises OSError naming the file.
    """
    settings = {key: value for key, value in (samples.record or {}).items() if key not in LISTS}
    about = dict(
        path=recorded_id(str(samples.path)),
        count=samples.count,
        size=list(samples.size),
        sha256=measured.digest,
        equal_images=len(measured.twins),
        settings=settings or None,
    )
    with contextlib.ExitStack() as stack:  # another evaluation of the same samples may end at the same moment
        lock = DirectoryLock(path.parent, f".{path.name}.lock")
        wait_for_lock(path.parent, lock.attempt)
        stack.callback(lock.release)
        earlier = read_json(path) if path.is_file() else {}
        before = earlier.get("samples")
        same = isinstance(before, dict) and before.get("sha256") == about["sha256"]
        write_json(path, {**(earlier if same else {}), "format_version": FORMAT, "samples": about, **content})
    return f"written to {path}" + ("; its numbers of other images are gone" if earlier and not same else "")
