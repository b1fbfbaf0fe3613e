"""README.md and docs/: short enough, no dead links, no flag that does not exist, every key on disk described."""

import ast
import importlib
import json
import re
from dataclasses import fields
from functools import partial

import numpy as np
import pytest
from conftest import ROOT, save_images
from forked import Run
from tiny_networks import pixels

import evaluate
from diffusion.process_table import PROCESSES, SAMPLER_OPTIONS
from diffusion.schedules import named_betas
from dlc.machine.cli import NotHere
from dlc.sampling.prior_options import PriorOptions
from dlc.sampling.samples_record import SamplesRecord
from evaluation.sweep import SEEDS

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md"])
SOURCES = [path for place in ("*.py", "dlc/**/*.py", "evaluation/*.py", "demo/*.py") for path in ROOT.glob(place)]
SCRIPTS = """extract_features_withdlc train_diffusion sample_ddp sample_ddp_computed_dlc train_prior sample_prior
    compose_dlc playground evaluate dlc.features dlc.checkpoints dlc.sampling.__main__ demo.networks""".split()
# of torchrun, accelerate launch, docker, pip, hf and the benchmarks
OTHERS = set(
    """--nnodes --nproc_per_node --rdzv-endpoint --node-rank --master-addr --master-port --mixed_precision --cpu
    --multi_gpu --num_processes --num_machines --machine_rank --main_process_ip --main_process_port --config_file
    --batch --help --images --local-dir --minutes --numa-binding --only --quiet --rows --threads --array --gpus
    --gpus-per-task --wrap --parsable --time --dependency --turns --use-sem --in-dim --exit-after-save""".split()
)


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150 and "not measured yet" not in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        if "://" not in target:
            file = (page.parent / path) if path else page
            assert file.exists(), target
            headings = re.findall(r"^#+ +(.*)", file.read_text(), flags=re.MULTILINE) if heading else [""]
            anchors = [re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-") for text in headings]
            assert heading in anchors, target


def options(parser):
    """All flags of a parser, those of its subcommands included."""
    for action in parser._actions:
        yield from action.option_strings
        for one in action.choices.values() if isinstance(action.choices, dict) else ():
            if hasattr(one, "_actions"):
                yield from options(one)


def test_flags_exist_have_help_and_are_read(monkeypatch):
    parsers = []

    def parse_args(parser, args=None):
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr("dlc.machine.cli.ArgumentParser.parse_args", parse_args)
    mains = [importlib.import_module(script).main for script in SCRIPTS]
    for main in [*mains, *(partial(evaluate.main, [command]) for command in evaluate.COMMANDS)]:
        with pytest.raises(SystemExit):
            main()
    known = OTHERS | {option for parser in parsers for option in options(parser)}
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", page.read_text()))
        assert named <= known, (page.name, named - known)
    read = {
        node.attr
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and re.fullmatch(r"(\w+\.)?args", ast.unparse(node.value))
    }
    options_read = {f"{prefix}{one.name}" for one in fields(PriorOptions) for prefix in ("", "prior_")}
    read |= options_read | {*SamplesRecord.keys()}  # in a loop
    read |= {*SAMPLER_OPTIONS, SEEDS} | {name for row in PROCESSES.values() for name in row.options}
    actions = [action for parser in parsers for action in parser._actions if action.dest not in ("help", "command")]
    unread = {action.dest for action in actions if not isinstance(action, NotHere)} - read
    assert len(actions) > 200 and all(action.help for action in actions) and not unread, unread


def test_messages_are_quoted_as_they_are():
    """What two pages quote as a symptom is in the sources, but for values, for which … stands."""
    texts = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts.add("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts))
    pages = "".join((ROOT / f"docs/{name}.md").read_text() for name in ("troubleshooting", "own-images"))
    symptoms = re.findall(r"^\| (.*?) \|", pages, flags=re.MULTILINE)
    quotes = [quote for symptom in symptoms for quote in re.findall(r"`([^`]+ [^`]+)`", symptom)]
    assert len(quotes) > 20
    for quote in quotes:
        for part in filter(None, map(str.strip, quote.split("…"))):
            assert any(part in text for text in texts), quote


def test_noise_levels():
    text = (ROOT / "docs/sampling.md").read_text()
    rows = re.findall(r"^\| (t|sigma|flow's t) \| (.*) \|$", text, flags=re.MULTILINE)
    times, sigmas, of_flow = ([float(cell) for cell in cells.split(" | ")] for _, cells in rows)
    signal = (1 - named_betas("linear", 1000)).cumprod(0)[list(map(int, times))]
    exact = ((1 - signal) / signal).sqrt()
    np.testing.assert_allclose(sigmas, exact, rtol=4e-3, atol=5e-4)
    np.testing.assert_allclose(of_flow, exact / (1 + exact), atol=6e-4)


@pytest.mark.slow
def test_every_key_is_described(workplace):
    text = (ROOT / "docs/formats.md").read_text()
    sections = dict(re.findall(r"^### (\S+)\n(.*?)(?=^##|\Z)", text, flags=re.DOTALL | re.MULTILINE))
    files = {
        "manifest.json": "features/manifest.json",
        "config.json": "results*/checkpoints/*/config.json",
        "meta.json": "results*/checkpoints/*/meta.json",
        "metrics.jsonl": "results*/metrics.jsonl",
        "samples.json": "samples/*/samples.json",
    }
    for name, pattern in files.items():
        described = set(re.findall(r"`(\w+)`", sections[name]))
        assert (paths := list(workplace.glob(pattern)))
        for path in paths:
            for value in map(json.loads, path.read_text().splitlines() if "jsonl" in name else [path.read_text()]):
                keys = value.keys() | {key for run in value.get("runs", []) for key in run}
                assert keys <= described, (name, keys - described)


# ---------------------------------------------------------------------- the defaults chain

# what stands in for the placeholders of README's and docs/commands.md's tables; those without a stand-in are skipped
LEFT_OUT = ("OLD NEW", "--hf-dataset", "--nnodes=2", "fsdp.yaml", "DiTCONT", "sweep", "sbatch", "playground")
SMALL = {
    "extract_features_withdlc": "--vae vae --encoder sem --image-size 64 --num-workers 0",
    "train_diffusion": "--max-steps 2 --grad-accum 1 --global-batch-size 4 --num-workers 0",
    "train_prior": "--max-steps 2 --global-batch-size 4 --num-workers 0 --holdout 0.1",
    "sample_ddp_computed_dlc": "--num-fid-samples 4 --num-sampling-steps 2",
    "sample_prior": "--num-codes 4",
}
MODULES = {"evaluate.py": "tiny_networks", "dlc.sampling": "dlc.sampling.__main__"}
SMALL |= {"train": SMALL["train_diffusion"], "sample_ddp": SMALL["sample_ddp_computed_dlc"]}
SMALL["train_options.train_amp"] = f"{SMALL['train']} --vae vae --image-size 64"


def typed(page):
    """The commands of a page's tables, one after the other, each as a row has it or adds to an earlier one."""
    rows = re.findall(r"^\| ([^|`]*) \| (.*?) \|", page.read_text(), flags=re.MULTILINE)
    commands = []
    for job, cell in rows:
        spans = re.findall("`([^`]+)`", cell)
        if job == "fine-tune":
            commands.append(f"{next(one for one in commands if 'train_diffusion' in one)} {spans[0]}")
        elif spans and ".py" in spans[0] or "python" in cell:
            commands.append(spans[0])
        if job == "compose codes":
            commands.append(f"{next(one for one in commands if 'sample_ddp_computed' in one)} {spans[-1]}")
    return commands


@pytest.mark.slow
def test_the_defaults_chain(tmp_path, tiny_models):
    """README's table and then all commands, typed from top to bottom in one folder, with sizes for a laptop alone."""
    save_images(tmp_path / "train")
    for name, path in (("vae", tiny_models[0]), ("sem", tiny_models[1]), ("val", "train")):
        (tmp_path / name).symlink_to(path)
    np.savez(tmp_path / "reference.npz", arr_0=pixels(50, size=64))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints/tiny.bin").write_bytes(b"weights")
    words = {"/path/to/imagenet/": "", "/path/to/store/": "", "-XL/2": "-Ti/4", "DLCPrior-M": "DLCPrior-Ti"}
    words |= {"dog.jpg fern.jpg": "train/cat/0.png train/dog/1.png", "VIRTUAL_imagenet256_labeled": "reference"}
    words |= {"CHECKPOINT": "results", "207 360": "cat 1"}
    scripts = []
    pages = (ROOT / "README.md", ROOT / "docs/commands.md")
    for number, command in enumerate(dict.fromkeys(command for page in pages for command in typed(page))):
        if any(part in command for part in LEFT_OUT):
            continue
        for placeholder, stand_in in words.items():
            command = command.replace(placeholder, stand_in)
        if "samples/" in command:
            npz = min(tmp_path.glob("samples/*.npz"), key=lambda path: path.stat().st_mtime)  # the one for codes
            command = command.replace("samples/FILE.npz", str(npz)).replace("samples/FOLDER", str(npz.with_suffix("")))
        parts = command.split()
        place = next(i for i, part in enumerate(parts) if part == "-m" or part.endswith(".py"))
        script, *flags = parts[place + (parts[place] == "-m") :]
        script = MODULES.get(script, script.removesuffix(".py").replace("/", "."))
        environment, output = dict(TORCH_HOME=str(tmp_path)), tmp_path / f"{number}.txt"
        run = Run(script, [*flags, *SMALL.get(script, "").split()], output, cwd=tmp_path, environment=environment)
        assert run.wait(), f"{command}:\n{run.said()}"
        scripts.append(script)
    assert set(SMALL) < set(scripts) and len(scripts) > 20
    # for codes, of all classes and of some, for composed codes, for a prior's
    assert len(list(tmp_path.glob("samples/*.npz"))) == 5
