"""Suites: pretraining runs and a grid of finetunings that start from them, as one submission.

A suite is a YAML file (configs/suites/, schema `SuiteConfig`):

    title: What a pretrained encoder is worth
    baseline: pretraining=none          # what `evaluate` compares with
    data:                               # prepared data sets that the suite needs, in data_dir
      corpus: {source: where it comes from and how it is prepared}
      mp20: {source: …}
    runs:                               # runs that others start from
      crysldnet: {job: pretrain, data: corpus, config: [configs/pretrain/small.yaml]}
    config: [configs/finetune/small.yaml]
    factors:                            # every combination is one finetuning, or run
      task:                             # name of each value → its settings
        formation energy: {data: mp20, target: formation_energy_per_atom}
      pretraining:
        none: {init_from: none}
        crysldnet: {init_from: crysldnet}
      seed: [0, 1, 2, 3, 4]             # a setting of the same name

In a suite `data` and `init_from` name one of its data sets and runs. A run with `per: [encoder]`
is made once for each value of that factor, with those of the value's settings that the run's job
has: what is pretrained on a data set with folds, `fold: [0, 1, 2]`, is made `per: [fold]`. In a
setting, `{fold}` stands for the value of that factor. `include: [FILE]` starts from other files.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from crysforge.datapipe.common.checked import Name, checked
from crysforge.datapipe.common.config import configure
from crysforge.datapipe.common.files import write_json
from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.storage.manifest import MANIFEST
from crysforge.datapipe.storage.remote import is_below, is_remote, local_path
from crysforge.launch.cluster.planning import sweep
from crysforge.launch.cluster.planning.jobs import JOBS, PlannedRun, check
from crysforge.launch.cluster.planning.suite_config import DataSource, StartRun, SuiteConfig
from crysforge.trainer.base.command_line import merge_sources, read_yaml, refuse_locations
from crysforge.trainer.evaluation.suite import SCHEMA, SUITE, read_suite, replicates_of

_NONE = "none"


def prepared(file: str, data_dir: str) -> dict[str, bool]:
    """The data sets of a suite's file, and whether each lies in a folder."""
    found = configure(SuiteConfig, merge_sources(_with_included(file))).data
    return {name: (Path(data_dir) / name / MANIFEST).is_file() for name in found}


class SuitePlan:
    """A suite as its runs.

    Attributes:
        config: its settings.
        runs: the runs to start from, then the finetunings; each after those it needs.
        missing: data sets that are not there, with what their absence costs.

    Raises:
        ValueError: an unknown key or name anywhere, a setting that a job would refuse, a factor
            without values, a data set that is not there.
    """

    def __init__(self, files: Sequence[str], overrides: Sequence[str]) -> None:
        included = [f for file in files for f in _with_included(file)]
        self.config: SuiteConfig = configure(SuiteConfig, sweep.with_overrides(included, overrides))
        if not self.config.output:
            raise ValueError("setting 'output' is required: give output=DIR for the suite's runs")
        self.output = Path(self.config.output)
        self._data = {k: configure(DataSource, v or {}) for k, v in self.config.data.items()}
        self._runs = {k: configure(StartRun, v or {}) for k, v in self.config.runs.items()}
        self._factors = {k: _values(k, v) for k, v in self.config.factors.items()}
        self._check()
        self._start: dict[str, PlannedRun] = {}
        runs = list(self._finetunings())
        self.missing = self._missing(runs)
        absent = {str(self.path(name)) for name in self.missing}
        gone = {c.name for c in [*self._start.values(), *runs] if c.config["data"] in absent}
        kept = [c for c in runs if not gone & {c.name, *self._needs(c)}]
        needed = {name for run in kept for name in self._needs(run)}
        self.runs = [c for c in self._start.values() if c.name in needed] + kept
        if not kept:
            raise ValueError("the suite has no run left")
        alike = {_checked(run): run for run in reversed(self.runs)}
        for run in reversed(alike.values()):
            try:
                check(JOBS[run.job], run.config)
            except ValueError as error:
                raise ValueError(f"{run.job} {run.name}: {error}") from None

    def path(self, data: str) -> str:
        """Where a data set lies."""
        if self._data[data].path:
            return self._data[data].path
        folder = self.config.data_dir
        if not is_remote(folder):
            return str(Path(folder) / data)
        path = f"{folder.rstrip('/')}/{data}"
        if not is_below(path, folder):
            raise ValueError(f"data: {data!r} is no plain name below {folder}: give its path")
        return path

    def write(self) -> None:
        """Writes what `evaluate` has to know; runs of earlier submissions stay."""
        path = self.output / SUITE
        known = read_suite(path)["runs"] if path.is_file() else {}
        found = {c.name: {"path": c.name, "job": c.job, "values": c.values} for c in self.runs}
        record = {
            "schema": SCHEMA,
            "title": self.config.title,
            "baseline": self.config.baseline,
            "factors": list(self._factors),
            "replicate": replicates_of(self.config.replicate),
            "paper": self.config.paper or None,
            "runs": {**known, **found},
        }
        self.output.mkdir(parents=True, exist_ok=True)
        write_json(path, record)

    def _finetunings(self) -> Iterator[PlannedRun]:
        """The finetunings; the runs they start from are noted on the way."""
        base = merge_sources(self._with_preset(self.config.config))
        combinations = list(itertools.product(*self._factors.values()))
        values = [dict(zip(self._factors, c, strict=True)) for c in combinations]
        values = [v for v in values if not any(v.items() >= x.items() for x in self.config.exclude)]
        for factor, some in self.config.only.items():
            values = [v for v in values if v[factor] in some]
        for name, chosen in zip(sweep.names(values), values, strict=True):
            settings = {**self.config.settings, **self._settings(chosen)}
            yield self._planned(name, "finetune", base, settings, chosen, chosen)

    def _planned(
        self,
        name: str,
        job: str,
        base: Mapping[str, Any],
        settings: Mapping[str, Any],
        chosen: Mapping[str, Any],
        values: Mapping[str, Any],
    ) -> PlannedRun:
        config = sweep.merge(base, dict(sweep.dotted(settings)))  # no more than they name
        if "data" not in config:
            raise ValueError(f"{name}: no factor or setting says which data set")
        refuse_locations(config)  # put together from parts, perhaps
        config["data"] = self.path(self._known("data", str(config["data"]), self._data))
        start = str(config.get("init_from") or _NONE)
        after: tuple[str, ...] = ()
        if start != _NONE:
            run = self._start_run(self._known("init_from", start, self._runs), chosen)
            config["init_from"], after = run.output, (run.name,)
        output = str(self.output / name)
        return PlannedRun(name, output, dict(values), {**config, "run_dir": output}, job, after)

    def _start_run(self, key: str, chosen: Mapping[str, Any]) -> PlannedRun:
        """A run that others start from."""
        run = self._runs[key]
        per = {factor: chosen[factor] for factor in run.per}
        name = ",".join([key, *(sweep.names([per]) if per else [])])
        if name in self._start:
            return self._start[name]
        valid = {f.name for f in fields(JOBS[run.job].schema())} - {"init_from"}
        theirs = self._settings(per).items()
        shared = {k: v for k, v in theirs if k.split(".")[0] in valid and k != "data"}
        base = {**merge_sources(self._with_preset(run.config)), "data": run.data}
        values = {
            factor: value
            for factor, names in self._factors.items()
            for value, given in names.items()
            if _filled(given.get("init_from"), chosen) == key
        }
        settings = {**shared, **run.settings}
        start = self._planned(name, run.job, base, settings, chosen, values | per)
        for other in self._start.values():  # trained once, whatever it is called
            if other.job == start.job and _alike(other) == _alike(start):
                return other
        self._start[name] = start  # after what it starts from itself
        return start

    def _with_preset(self, files: Sequence[str]) -> list[str]:
        """Config files of a run, and that of the hardware."""
        return [*files, *([f"hardware/{self.config.hardware}"] if self.config.hardware else [])]

    def _settings(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: _filled(value, chosen)
            for factor, name in chosen.items()
            for key, value in self._factors[factor][name].items()
        }

    def _needs(self, run: PlannedRun) -> set[str]:
        """All runs that have to be there before one."""
        names = set(run.after)
        return names.union(*(self._needs(self._start[n]) for n in names))

    def _missing(self, runs: Sequence[PlannedRun]) -> dict[str, str]:
        """Data sets that are not there → what they are.

        Raises:
            ValueError: there are some, and they are not to be skipped.
        """
        used = {c.config["data"] for c in [*self._start.values(), *runs]}
        missing = {}
        for name, data in self._data.items():
            path = self.path(name)
            here = local_path(path)
            if path in used and here and not (Path(here) / MANIFEST).is_file():
                missing[name] = f"{name} is not at {path} — {data.source or 'no source is given'}"
        if missing and not self.config.skip_missing:
            listed = "\n  ".join(" ".join(text.split()) for text in missing.values())
            raise ValueError(
                f"data sets are missing (say where with data.NAME.path=DIR, or leave their runs "
                f"out with skip_missing=true):\n  {listed}"
            )
        return missing

    def _check(self) -> None:
        if not self._factors:
            raise ValueError("a suite needs factors: what to compare")
        for key, run in self._runs.items():
            if run.job not in ("pretrain", "finetune"):
                raise ValueError(f"runs.{key}.job must be pretrain or finetune, got {run.job!r}")
            for factor in run.per:
                self._known(f"runs.{key}", factor, self._factors)
        factor, _, value = self.config.baseline.partition("=")
        if self.config.baseline:
            names = [str(v) for v in self._factors[self._known("baseline", factor, self._factors)]]
            self._known("baseline", value, names)
        for factor, some in self.config.only.items():
            there = self._factors[self._known("only", factor, self._factors)]
            if unknown := [str(value) for value in some if value not in there]:
                self._known(f"only.{factor}", unknown[0], [str(value) for value in there])
        for part in self.config.exclude:
            for key in part:
                self._known("exclude", key, self._factors)

    def _known(self, what: str, name: str, names: Collection[str]) -> str:
        if name not in names:
            raise ValueError(f"{what}: unknown name {name!r}: {nearest(name, names)}")
        return name


def _filled(value: Any, chosen: Mapping[str, Any]) -> Any:
    """A setting with the factors' values in the places of their names."""
    if isinstance(value, str):
        for factor, name in chosen.items():
            value = value.replace(f"{{{factor}}}", str(name))
    return value


def _alike(run: PlannedRun) -> dict[str, Any]:
    """What a run is, wherever it writes."""
    return {k: v for k, v in run.config.items() if k != "run_dir"}


def _checked(run: PlannedRun) -> str:
    """What the check of a run's config depends on."""
    config = {k: v for k, v in run.config.items() if k not in ("data", "init_from", "run_dir")}
    seed = {"seed": type(config.get("seed")).__name__}
    return json.dumps([run.job, bool(run.after), config | seed], sort_keys=True)


def _with_included(file: str, above: tuple[str, ...] = ()) -> list[str]:
    """The files that a suite's file includes, then itself."""
    if file in above or len(above) > 20:
        raise ValueError(f"suite file {file!r} includes itself, or too many others")
    names = checked(list[Name], read_yaml(file).get("include") or [], file, "include")
    included = [str(Path(file).parent / name) for name in names]
    return [f for path in included for f in _with_included(path, (*above, file))] + [file]


def _values(factor: str, values: Any) -> dict[Any, dict[str, Any]]:
    """A factor's values, each with its settings by dotted key."""
    if isinstance(values, list):
        values = checked(list[str | int | float | bool | None], values, "the suite", factor)
        found = {value: {factor: value} for value in values}
        if len(found) != len(values):
            raise ValueError(f"factor {factor!r} has a value twice: {values}")
    elif isinstance(values, dict):
        found = {str(k): dict(sweep.dotted(v or {})) for k, v in values.items()}
    else:
        raise ValueError(f"factor {factor!r} needs a list of values, or names with settings")
    if not found:
        raise ValueError(f"factor {factor!r} has no values")
    return found
