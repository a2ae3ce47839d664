"""What a suite is: runs told apart by the values of factors.

    SUITE/suite.json   {"schema": 1, "title": …, "baseline": "pretraining=none", "factors": […],
                        "paper": … or null, "replicate": [factors], "runs": {name: {"path": path
                        below SUITE, "job": "finetune" or "pretrain",
                        "values": {factor: value}}}}

What only repeats (seeds, folds) is the replicate, which is called `seed` inside. Runs that lack a
factor are those that others start from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crysforge.datapipe.common.places import inside
from crysforge.datapipe.common.safe_read import read_mapping
from crysforge.trainer.runs.forms import SUITE as FORM

SCHEMA = 1
SUITE = "suite.json"
MAX_SUITE = 1 << 26
"""Bytes of the longest suite.json."""
SEED, TARGET, DATA = "seed", "target", "data"
FOLD = "fold"
REPLICATES = (FOLD, SEED)
"""Factors that repeat the same, unless a suite says otherwise."""

_LEADING = (TARGET, "targets", DATA, "label_fraction", "label_count", "encoder.name", "init_from")
"""Settings that come first among factors found in configs; later ones that they imply are none."""
_NO_FACTOR = ("run_dir", "resume", "dry_run", "loader.", "trainer.log_every", "trainer.keep")


def shown(value: Any) -> str:
    """A factor's value as text: the same text, the same value."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: ""}[value]
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, (str, int, float)) else json.dumps(value, sort_keys=True)


@dataclass(frozen=True)
class SuiteRun:
    """One run of a suite."""

    name: str
    path: Path
    job: str
    """`finetune` or `pretrain`."""
    values: Mapping[str, Any]
    """Value of each factor that applies."""


@dataclass
class Suite:
    """Runs, and what they are to show."""

    root: Path
    title: str
    factors: list[str]
    runs: list[SuiteRun]
    compared: str = ""
    """The factor whose values are compared; empty where there is nothing to compare."""
    baseline: str = ""
    """Its value that the others are compared with, as `shown`."""
    paper: str = ""
    """Published tables to set beside, see `trainer.evaluation.published`."""
    folds: bool = False
    """Whether replicates are folds of one data set, whose training crystals overlap."""

    @classmethod
    def read(cls, root: str | Path) -> Suite:
        """The suite that ROOT/suite.json describes.

        Raises:
            ValueError: no such file, or one that does not say what it must.
        """
        root = Path(root)
        record = read_suite(root / SUITE)
        try:
            alike = replicates_of(record.get("replicate"))
            runs = [
                SuiteRun(name, inside(root, c["path"]), c["job"], _replicated(c["values"], alike))
                for name, c in record["runs"].items()
            ]
            factors = list(_replicated(dict.fromkeys(record["factors"]), alike))
            suite = cls(root, record["title"], factors, runs)
            suite.compare_with(record["baseline"] or "")
            suite.paper = record.get("paper") or ""
            suite.folds = FOLD in alike and FOLD in record["factors"]
        except ValueError as error:
            raise ValueError(f"{root / SUITE} does not describe a suite: {error}") from None
        return suite

    @classmethod
    def of_values(cls, root: Path, runs: Iterable[SuiteRun]) -> Suite:
        """A suite of runs of a sweep: the factors are the settings in their values."""
        named = [SuiteRun(c.name, c.path, c.job, _named(c.values)) for c in runs]
        factors = list(dict.fromkeys(f for c in named for f in c.values))
        folds = FOLD in factors
        named = [replace(c, values=_replicated(c.values, REPLICATES)) for c in named]
        factors = list(_replicated(dict.fromkeys(factors), REPLICATES))
        suite = cls._of_factors(root, sorted(factors, key=_order), named)
        suite.folds = folds
        return suite

    @classmethod
    def of_runs(cls, root: Path, paths: Mapping[str, Path]) -> Suite:
        """A suite of run directories: the factors are the settings in which their configs differ,
        without those that an earlier one implies."""
        runs = []
        for name, path in paths.items():
            config = read_mapping(path / "config.yaml")
            job = "pretrain" if "stages" in config else "finetune"
            settings = dict(_flat(config))
            if settings.get(TARGET):
                settings.pop("targets", None)
            runs.append(SuiteRun(name, path, job, _named(settings)))
        folds = {shown(c.values.get(FOLD)) for c in runs if c.job == "finetune"} - {""}
        if len(folds) > 1:
            runs = [replace(c, values=_replicated(c.values, REPLICATES)) for c in runs]
        finetuned = [c for c in runs if c.job == "finetune"]
        keys = list(dict.fromkeys(f for c in finetuned for f in c.values))
        factors: list[str] = []
        for key in sorted(keys, key=_order):
            if key.startswith(_NO_FACTOR) or not all(key in c.values for c in finetuned):
                continue  # of an older version, or of one encoder
            texts = [shown(c.values[key]) for c in finetuned]
            if len(set(texts)) < 2:
                continue
            columns = [[shown(c.values[f]) for c in finetuned] for f in factors if f != SEED]
            if key == SEED or not any(_implies(column, texts) for column in columns):
                factors.append(key)
        suite = cls._of_factors(root, factors, runs)
        suite.folds = len(folds) > 1
        return suite

    @classmethod
    def _of_factors(cls, root: Path, factors: list[str], runs: list[SuiteRun]) -> Suite:
        """Finetunings get a value of every factor, be it none, and the natural baseline."""
        kept = []
        for run in runs:
            own = factors if run.job == "finetune" else [f for f in factors if f in run.values]
            values = {f: run.values.get(f) for f in own}
            kept.append(SuiteRun(run.name, run.path, run.job, values))
        suite = cls(root, root.resolve().name, factors, kept)
        for factor in ("pretraining", "init_from"):
            if any(c.values.get(factor) == "none" for c in suite.evaluated):
                suite.compare_with(f"{factor}=none")
                break
        return suite

    @property
    def evaluated(self) -> list[SuiteRun]:
        """The finetunings to compare; the others are what they start from."""
        return [c for c in self.runs if c.job == "finetune" and c.values.keys() >= {*self.factors}]

    def compare_with(self, baseline: str) -> None:
        """Sets what is compared, from `factor=value`; empty for nothing.

        Raises:
            ValueError: not of that form, or no run has that value.
        """
        self.compared, _, self.baseline = baseline.partition("=")
        if not baseline:
            return
        if self.compared == SEED:
            raise ValueError("seeds are replicates, and so are folds: compare another factor")
        runs = self.evaluated
        known = [shown(c.values[self.compared]) for c in runs if self.compared in c.values]
        if not known:
            raise ValueError(
                f"baseline {baseline!r} is not of the form factor=value with a factor of this "
                f"suite: {', '.join(f for f in self.factors if f != SEED) or 'it has none'}"
            )
        if self.baseline not in known:
            raise ValueError(
                f"no run has {baseline}; values of {self.compared}: "
                f"{', '.join(dict.fromkeys(known))}"
            )


def read_suite(path: Path) -> dict[str, Any]:
    """What a suite.json says. Raises ValueError for another schema, or one that does not say what
    it must."""
    return read_mapping(path, FORM, MAX_SUITE, SCHEMA)


def replicates_of(asked: str | Sequence[str] | None) -> list[str]:
    """Factors that only repeat: those asked for, one or several, else `REPLICATES`."""
    return [asked] if isinstance(asked, str) else list(asked or REPLICATES)


def _replicated(values: Mapping[str, Any], replicates: Sequence[str]) -> dict[str, Any]:
    """Values by factor, in which what only repeats is one factor, called seed. Of several its value
    is a text that names each: `fold 0, seed 1`."""
    own = [key for key in replicates if key in values]
    out = {key: value for key, value in values.items() if key not in own}
    if own:
        several = ", ".join(f"{key} {shown(values[key])}" for key in own)
        out[SEED] = several if len(own) > 1 else values[own[0]]
    return out


def _named(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with paths cut to what they end with; `none` for a start from scratch, and the
    stage behind the run that others start from."""
    values = dict(settings)
    stage = values.pop("init_stage", "")
    for key, value in values.items():
        if key in ("init_from", DATA) and isinstance(value, str):
            values[key] = value.rstrip("/").rsplit("/", 1)[-1] or "none"
    start = values.get("init_from", "none")
    if stage and isinstance(start, str) and start != "none":
        values["init_from"] = f"{start}/{stage}"
    return values


def _order(factor: str) -> tuple[int, str]:
    if factor == SEED:
        return len(_LEADING) + 1, ""
    return (_LEADING.index(factor), "") if factor in _LEADING else (len(_LEADING), factor)


def _implies(known: Sequence[str], other: Sequence[str]) -> bool:
    """Whether the first column of values determines the second."""
    return len(set(zip(known, other, strict=True))) == len(set(known))


def _flat(value: Mapping[Any, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
