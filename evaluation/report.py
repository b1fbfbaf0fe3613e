"""What an evaluation prints and writes: the table, SAMPLES.metrics.json, and the line for a paper."""

import contextlib
import datetime
import sys
from pathlib import Path

from dlc.machine.files import read_json, recorded_id, write_json
from dlc.machine.processes import versions
from evaluation.comparison import DISTANCES, K_DENSITY, K_PRECISION, SPLIT_SIZE, Comparison, Result
from evaluation.sets import ImageSet

FORMAT = 1
# key: the name in the table and the line, and digits after the point in the line
NAMES = {
    "fid": ("FID", 2),
    "fd_dinov2": ("FD-DINOv2", 1),
    "fd": ("Frechet distance", 3),
    "sfid": ("sFID", 2),
    "inception_score": ("IS", 1),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "kid": ("KID", 5),
    "density": ("density", 3),
    "coverage": ("coverage", 3),
}
# whose definition a number follows, where it is not ADM's
PAPERS = {
    "fd_dinov2": "Stein et al. 2023",
    "kid": "Binkowski et al. 2018",
    "density": "Naeem et al. 2020",
    "coverage": "Naeem et al. 2020",
}
MORE = {"kid": "kid_std"}  # printed after a value, with ±
LISTS = ("runs", "labels", "code_rows", "vector_rows")  # keys of samples.json that are lists as long as the samples


def metrics_path(samples: Path) -> Path:
    """SAMPLES.metrics.json beside SAMPLES, or beside SAMPLES.npz: the same for a folder and its .npz."""
    samples = Path(samples).resolve()
    return samples.with_name(samples.name.removesuffix(".npz") + ".metrics.json")


def shown(key: str, value: float) -> str:
    """A value as the table shows it: a distance of equal sets may be below 0 by rounding, and is shown as 0."""
    if key in DISTANCES.values() or key == "sfid":
        value = max(0.0, value)
    return f"{value:.{max(4, NAMES[key][1])}f}"


def table(values: dict[str, float]) -> list[str]:
    """The metrics, a line each."""
    width = max(len(NAMES[key][0]) for key in values if key in NAMES)
    lines = []
    for key, (name, _) in NAMES.items():
        if key in values:
            more = f" ± {values[MORE[key]]:.5f}" if key in MORE else ""
            lines.append(f"{name:<{width}}  {shown(key, values[key]):>12}{more}")
    return lines


def behind(comparison: Comparison) -> str:
    """What of the reference the numbers are of, in words."""
    reference, parts = comparison.reference, []
    if reference.statistics and any(reference.stored(*key) for key in comparison.distances()):
        parts.append("its stored statistics" + (f" of {reference.count:,} images" if reference.count else ""))
    if comparison.measured.count:
        parts.append(f"{comparison.measured.count:,} images")
    return " and ".join(parts)


def definitions(result: Result, comparison: Comparison) -> str:
    """Whose definitions the numbers follow: ADM's, but for those that a flag changes or that ADM does not have."""
    names = {key: name for key, (name, _) in NAMES.items() if key in result.values}
    parts = ["ADM's definitions in PyTorch"] if names.keys() - PAPERS.keys() else []
    if comparison.pr_precision != "adm" and {"precision", "recall"} & names.keys():
        parts.append("distances of precision and recall in float32")
    for paper in dict.fromkeys(PAPERS.values()):
        of_paper = [name for key, name in names.items() if PAPERS.get(key) == paper]
        parts += [f"{' and '.join(of_paper)} as in {paper}"] if of_paper else []
    return ", ".join(parts)


def paper_line(result: Result, comparison: Comparison, samples: ImageSet | None) -> str:
    """One line with the numbers, both sets, the network, and what drew the samples."""
    numbers = ", ".join(
        f"{name} {max(0.0, result.values[key]) if key != 'kid' else result.values[key]:.{digits}f}"
        for key, (name, digits) in NAMES.items()
        if key in result.values
    )
    size = f" of {samples.size[1]} x {samples.size[0]}" if samples else ""
    path = comparison.reference.path
    parts = [
        f"{numbers}: {result.samples.count:,} samples{size}"
        + (f" against {path.name} ({behind(comparison)})" if path else ""),
        definitions(result, comparison),
        *(
            f"{one.name} {one.digest[:8]}" if one.digest else f"features {one.path}"
            for one in comparison.networks.values()
        ),
    ]
    record = samples.record if samples else None
    if record:
        parts.append(
            f"{record.get('model')}, step {record.get('step')}, {record.get('weights')} weights, "
            f"{record.get('sampler')} {record.get('num_sampling_steps')} steps, cfg {record.get('cfg_scale')}, "
            f"seed {record.get('global_seed')}"
        )
    return "; ".join(parts)


def metrics_json(result: Result, comparison: Comparison, samples: ImageSet | None, self_check: dict) -> dict:
    """The whole of SAMPLES.metrics.json."""
    reference, measured = comparison.reference, comparison.measured
    settings = {key: value for key, value in ((samples.record if samples else None) or {}).items() if key not in LISTS}
    return dict(
        format_version=FORMAT,
        metrics=result.values,
        samples=dict(
            path=recorded_id(str(samples.path)) if samples else None,
            count=result.samples.count,
            size=list(samples.size) if samples else None,
            sha256=result.samples.digest or None,
            equal_images=len(result.samples.twins),
            settings=settings or None,
        ),
        reference=dict(
            path=recorded_id(str(reference.path)) if reference.path else None,
            count=measured.count or None,
            size=list(reference.images.size) if reference.images else None,
            sha256=measured.digest or None,
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
            pr_precision=comparison.pr_precision,
            seed=comparison.seed,
        ),
        self_check=self_check,
        warnings=result.warnings,
        command=sys.argv,
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        processes=comparison.state.num_processes,
        device=str(comparison.state.device.type),
        versions=versions(),
    )


def write_metrics(path: Path, content: dict) -> None:
    """Write these keys of SAMPLES.metrics.json, whole or not at all; those that another command wrote stay.

    Raises OSError naming it.
    """
    path, earlier = Path(path), {}
    if path.is_file():
        with contextlib.suppress(ValueError):  # a damaged file is replaced
            earlier = read_json(path)
    write_json(path, {**earlier, **content})
