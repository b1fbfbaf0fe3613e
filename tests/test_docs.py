"""README.md and docs/: short enough, no dead links, no flag that does not exist, every key on disk described."""

import ast
import importlib
import json
import re

import pytest
from conftest import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md"])
SCRIPTS = """extract_features_withdlc train_diffusion sample_ddp sample_ddp_computed_dlc train_prior sample_prior
    compose_dlc evaluate evaluation.agreement evaluation.make_reference evaluation.reconstruction evaluation.sweep
    dlc.features dlc.checkpoints dlc.sampling.__main__""".split()
# of torchrun, accelerate launch, docker, pip and the benchmarks
OTHERS = set(
    """--nnodes --nproc_per_node --rdzv-endpoint --node-rank --master-addr --master-port --mixed_precision
    --multi_gpu --num_processes --num_machines --machine_rank --main_process_ip --main_process_port --config_file --cpu
    --batch --check --help --images --minutes --numa-binding --only --quiet --pr-rows --precisions
    --reference-rows --rows --shm-size --threads""".split()
)


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150 and "not measured yet" not in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """To files of this repository and to headings in them."""
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


def test_flags_exist(monkeypatch):
    """Every --flag that a page names is one of our scripts' or stands in OTHERS."""
    parsers = []

    def parse_args(parser, args=None):
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr("dlc.machine.cli.ArgumentParser.parse_args", parse_args)
    for script in SCRIPTS:
        with pytest.raises(SystemExit):
            importlib.import_module(script).main()
    known = OTHERS | {option for parser in parsers for option in options(parser)}
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", page.read_text()))
        assert named <= known, (page.name, named - known)


def test_messages_are_quoted_as_they_are():
    """What docs/troubleshooting.md quotes as a symptom is in the sources, but for values, for which … stands."""
    texts = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("dlc/**/*.py"), *ROOT.glob("evaluation/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts.add("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts))
    symptoms = re.findall(r"^\| (.*?) \|", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.MULTILINE)
    quotes = [quote for symptom in symptoms for quote in re.findall(r"`([^`]+ [^`]+)`", symptom)]
    assert len(quotes) > 20
    for quote in quotes:
        for part in filter(None, map(str.strip, quote.split("…"))):
            assert any(part in text for text in texts), quote


@pytest.mark.slow
def test_every_key_is_described(workplace):
    """docs/formats.md has each key of the files that a run of all stages writes."""
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
