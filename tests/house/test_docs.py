"""What the documents tell users to type is what the scripts take: every command, setting and path
in README.md, docs/, the help texts and the comments of configs."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from crysforge.datapipe.common.config import configure
from crysforge.datapipe.preparing.config import PrepareConfig
from crysforge.datapipe.preparing.edit_configs import (
    InspectConfig,
    MergeConfig,
    ReshardConfig,
    SubsetConfig,
    VerifyConfig,
)
from crysforge.launch import analyse, demo, ensemble, export, leaderboard, prepare
from crysforge.launch.cluster.planning.request import Request
from crysforge.launch.cluster.planning.suite_config import SuiteConfig
from crysforge.trainer.base.command_line import from_sources, merge_sources, split_arguments
from crysforge.trainer.generation.config import GenerateConfig
from crysforge.trainer.jobs.schemas import FinetuneJob, pretrain_schema
from crysforge.trainer.judging.config import JudgeConfig
from crysforge.trainer.serving.config import PredictConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted(p for p in (ROOT / "launch").glob("*.py") if p.stem != "__init__")
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

PREPARE = {
    "verify": VerifyConfig,
    "inspect": InspectConfig,
    "merge": MergeConfig,
    "subset": SubsetConfig,
    "reshard": ReshardConfig,
    "bake": prepare.BakeEncodersConfig,
}
SCHEMAS = {
    "analyse": analyse.AnalyseConfig,
    "demo": demo.DemoConfig,
    "ensemble": ensemble.EnsembleConfig,
    "evaluate": JudgeConfig,
    "export": export.ExportConfig,
    "finetune": FinetuneJob,
    "generate": GenerateConfig,
    "leaderboard": leaderboard.LeaderboardConfig,
    "predict": PredictConfig,
    "pretrain": pretrain_schema(),
}


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Launch scripts and their arguments, of every command in a text."""
    text = re.sub(r"\\\\?\n[\s#]*", " ", text)  # continued lines
    found = []
    for line in text.splitlines():
        for script, rest in re.findall(r"launch/(\w+)\.py((?: +[^`]*)?)", line):
            rest = re.split(r" {3,}| #|; done|\*\*", rest)[0]  # remarks
            rest = re.sub(r"\$\(.*?\)|\$\w+|(?<==)N\b", "1", rest)  # what stands for something
            words = [w.rstrip(".,;") for w in shlex.split(rest)]
            words = [w for w in words if re.match(r"[\w.]+=.|--(config|dry-run)|configs/", w)]
            if words:
                found.append((script, words))
    return found


LEFT_OUT = {
    "pretrain": ["data=DIR", "run_dir=RUN", "encoder.name=cgcnn"],
    "finetune": ["data=DIR", "run_dir=RUN", "target=NAME"],
}
"""What remarks on `submit` that name no config take as given, by job."""


def check(script: str, words: list[str]) -> None:
    """Raises ValueError for a setting that the script does not have."""
    files, overrides = split_arguments(words)
    if script == "submit":
        given = dict(override.split("=", 1) for override in overrides)
        if not given.keys() & {"job", "suite", "status", "collect", "cancel"}:
            words = [*words, "status=DIR"]
        elif not files:
            words = [*LEFT_OUT.get(given.get("job", ""), []), *words]
        request = Request.parse(words, None)
        if request.config.suite:
            configure(SuiteConfig, merge_sources([request.config.suite, *files], request.overrides))
        elif request.config.job:
            request.runs()
        return
    schema = SCHEMAS.get(script)
    if script == "prepare":
        actions = {override.partition("=")[0] for override in overrides} & PREPARE.keys()
        schema = PREPARE[actions.pop()] if actions else PrepareConfig
    assert schema is not None, f"no such script: {script}"
    from_sources(schema, files, overrides)


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS, *CONFIGS], ids=lambda p: p.name)
def test_commands_are_what_the_scripts_take(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = importlib.import_module(f"crysforge.launch.{path.stem}").__doc__ or ""
    for script, words in commands(text):
        try:
            check(script, words)
        except ValueError as error:
            pytest.fail(f"launch/{script}.py {' '.join(words)}: {error}")


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_places_exist(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).exists(), target
    top = "benchmarks|configs|datapipe|docker|docs|launch|models|tests|trainer"
    for name in re.findall(rf"(?<![\w/.])(?:{top})/[\w./{{}},-]*\w[\w./{{}},-]*", text):
        for place in spread(name.rstrip(".,")):
            assert (ROOT / place).exists() or (ROOT / place).with_suffix(".py").exists(), place


def spread(name: str) -> list[str]:
    """`a/{b,c}` as `a/b` and `a/c`."""
    head, brace, rest = name.partition("{")
    middle, _, tail = rest.partition("}")
    return [head + part + tail for part in middle.split(",")] if brace else [name]


def test_the_commands_are_found():
    text = "```\na --x; python launch/export.py checkpoint=R \\\n    tag=newest   # it\n```"
    assert commands(text) == [("export", ["checkpoint=R", "tag=newest"])]
    assert len(commands((ROOT / "README.md").read_text(encoding="utf-8"))) > 10
    with pytest.raises(ValueError, match="unknown"):
        check("export", ["checkpiont=R"])
