"""The work that a config of `prepare` asks for: its inputs, their records, and which split each
goes to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from crysforge.datapipe.common.files import sha256
from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.crystals.cells import RULES, Cells, cells_of, extensive_of
from crysforge.datapipe.crystals.per_cell import of_the_cell
from crysforge.datapipe.preparing.config import PrepareConfig
from crysforge.datapipe.preparing.request import request_of
from crysforge.datapipe.preparing.splitting import splits
from crysforge.datapipe.preparing.splitting.balanced import MAX_CLASSES, classes_of
from crysforge.datapipe.sources import SOURCES, UNITS, Raw, Reading, read_raw, resolve
from crysforge.datapipe.sources.base import Options
from crysforge.datapipe.sources.files import Folder
from crysforge.datapipe.sources.read import AUTO, brings_splits
from crysforge.datapipe.storage.manifest import SPLITS, Manifest


@dataclass(frozen=True)
class Work:
    """A config, checked and completed."""

    config: PrepareConfig
    inputs: list[tuple[str | None, str, str]]
    """(split or None, path, format)."""
    rule: str
    labels: tuple[str, ...]
    """Targets, and what filters look at."""
    notes: list[str] = field(default_factory=list)
    """What there is to say of the inputs, once they are read."""

    @classmethod
    def of(cls, config: PrepareConfig) -> Work:
        """Raises ValueError for inputs that cannot be read, or settings that do not fit them."""
        files: dict[str | None, str] = {
            split: getattr(config, split) for split in SPLITS if getattr(config, split)
        }
        if bool(files) == bool(config.input):
            raise ValueError(
                "give either input=… or train=…, val=…, test=… (the last two optional)"
            )
        files = files or {None: config.input}
        output = Path(config.output).resolve()
        if config.labels and not Path(config.labels).is_file():
            raise ValueError(f"labels={config.labels} does not exist")
        for path in files.values() if config.output else ():
            if Path(path).is_dir() and Path(path).resolve() in (output, *output.parents):
                raise ValueError(
                    f"output {config.output} is inside the input {path}: give a directory elsewhere"
                )
        inputs: list[tuple[str | None, str, str]] = [
            (split, path, resolve(path, config.format)) for split, path in files.items()
        ]
        options = Options(labels=config.labels, follow_links=config.follow_links)
        kept = len(inputs) == 1 and brings_splits(*inputs[0][1:], options)
        rule = splits.choose_rule(vars(config), config.split, "keep" if kept else "ratio")
        if rule == "keep" and any(Manifest.load(p).folds for _, p, f in inputs if f == "shards"):
            raise ValueError(
                f"{inputs[0][1]} has folds, which split=keep cannot keep: give folds=…, or another "
                "split"
            )
        if not config.targets and inputs[0][2] == "shards":
            known = list(Manifest.load(inputs[0][1]).targets)
            config = replace(config, targets=known)
        if rule == "group" and config.split_by is None:
            config = replace(config, split_by="formula")
        asked = [config.stratify] if config.stratify not in (None, "none") else []
        labels = dict.fromkeys([*config.targets, *config.filters.labels, *asked])
        for setting in ("extensive", "intensive"):
            for name in getattr(config, setting):
                if name not in labels:
                    has = nearest(name, labels) if labels else "give targets=[…]"
                    raise ValueError(f"{setting}=[{name}]: no such target: {has}")
        return cls(config, inputs, rule, tuple(labels))

    def reading(self) -> Reading:
        """What is done to each of the records."""
        units = {**UNITS, **self.units()}
        known = {*self.extensive(), *self.config.intensive}
        doubtful = {
            name: why
            for name in self.labels
            if name not in known and (why := of_the_cell(name, units.get(name)))
        }
        return self.config.reading(self.labels, extensive=self.extensive(), doubtful=doubtful)

    def extensive(self) -> tuple[str, ...]:
        """The labels that go with the number of atoms, by the user's or a data set's word."""
        told = [name for m in self._manifests for name in extensive_of(m.provenance)]
        names = dict.fromkeys([*self.config.extensive, *told])
        return tuple(n for n in names if n in self.labels and n not in self.config.intensive)

    def cells(self) -> Cells:
        """The cell that all crystals are in when they have been read: that of data sets may be a
        smaller one than is asked for."""
        manifests = self._manifests
        if not manifests or len(manifests) < len(self.inputs):
            return self.config.cell_rule
        before = [cells_of(manifest.provenance) for manifest in manifests]
        least = max(before, key=lambda cells: RULES.index(cells.rule))
        asked = self.config.cell_rule
        return asked if RULES.index(asked.rule) <= RULES.index(least.rule) else least

    @cached_property
    def _manifests(self) -> list[Manifest]:
        return [Manifest.load(path) for _, path, format in self.inputs if format == "shards"]

    @property
    def stratify(self) -> str | None:
        """Label whose classes are to be alike everywhere, if it has classes."""
        config = self.config
        if config.stratify is not None:
            return None if config.stratify == "none" else config.stratify
        automatic = self.rule in ("group", "folds") and len(config.targets) == 1
        return config.targets[0] if automatic else None

    @property
    def folds(self) -> int:
        """Number of folds of the data set; 0: none."""
        if self.rule == "matbench":
            return splits.FOLDS if self.config.fold is None else 0
        return self.config.folds or 0

    def classes(self, labels: np.ndarray) -> np.ndarray | None:
        """Classes of the label to stratify by; None where there is none, or it has none.

        Raises:
            ValueError: it was asked for, and has none.
        """
        found = classes_of(labels) if self.stratify else None
        if found is None and self.config.stratify not in (None, "none"):
            raise ValueError(
                f"stratify={self.config.stratify}: its {len(np.unique(labels))} values are no "
                f"classes, which are 2 to {MAX_CLASSES} and occur often"
            )
        return found

    def split_settings(self) -> dict[str, Any]:
        """The rule and what it goes by, for a manifest."""
        config = self.config
        out = {s: getattr(config, s) for s in splits.RULES[self.rule] if s not in SPLITS}
        if self.rule in ("ratio", "count", "matbench", "group", "folds"):
            out["seed"] = config.seed
        if out.get("split_ids"):
            path = Path(config.split_ids or "")
            out["split_ids"] = {"name": path.name, "sha256": sha256(path)}
        if self.folds:
            out["folds"] = self.folds
        return {"rule": self.rule, **{k: v for k, v in out.items() if v is not None}}

    @property
    def needs_crystals(self) -> bool:
        """Whether the split depends on what the crystals and their labels are."""
        return self.rule in ("group", "folds") or (self.rule == "ratio" and bool(self.stratify))

    def codes(self, ids: Sequence[str], own: Sequence[int], labelled: Sequence[bool]) -> np.ndarray:
        """Split code of every record, [n] int8, by what is known of all records.

        Args:
            own: code of the split that a record brings along, or -1.
            labelled: whether it has the label that the published rule goes by.
        """
        config, n = self.config, len(ids)
        n_val, n_test = config.n_val or 0, config.n_test or 0
        if self.rule == "ratio":
            return splits.by_ratio(n, config.ratio or splits.usual_ratio(n), config.seed)
        if self.rule == "count":
            return splits.by_count(n, config.n_train, n_val, n_test, config.seed)
        if self.rule == "ids":
            assert config.split_ids is not None
            return splits.by_ids(ids, splits.read_ids(config.split_ids))
        if self.rule == "matbench":
            assert config.fold is not None
            return splits.by_fold(n, config.fold, config.seed)
        if self.rule == "published-123":
            if config.split_target is None and len(config.targets) != 1:
                raise ValueError(
                    "split=published-123 depends on which records have a label: name it with "
                    "split_target=…, one of "
                    + (", ".join(config.targets) or "the labels of the input")
                )
            counts = (config.n_train, n_val, n_test)
            given = any(c is not None for c in (config.n_train, config.n_val, config.n_test))
            return splits.published(np.array(labelled), counts if given else None)
        return np.array(own, dtype=np.int8)

    def records(self) -> Iterator[Raw]:
        """All records; those of a split's own file are marked with it."""
        for split, path, format in self.inputs:
            for raw in read_raw(path, format, self._options(split)):
                yield replace(raw, split=split) if split else raw

    def _options(self, split: str | None) -> Options:
        config = self.config
        goes_by = [config.split_target] if config.split_target else []
        return config.options(
            targets=tuple(config.targets),
            wanted=tuple(dict.fromkeys([*self.labels, *goes_by])),
            prefix=split,
            notes=self.notes,
        )

    def units(self) -> dict[str, str]:
        """Units of the targets: as the user says, else those of the source, else by name.

        Raises:
            ValueError: sources whose units of a target differ.
        """
        known: dict[str, str] = {}
        for _, path, format in self.inputs:
            targets = Manifest.load(path).targets if format == "shards" else {}
            for name, target in targets.items():
                unit = target.unit
                if unit and known.setdefault(name, unit) != unit and name in self.config.targets:
                    raise ValueError(
                        f"{name} is in {unit} in {path} and in {known[name]} before: convert one"
                    )
        known = {**UNITS, **known, **self.config.units}
        return {name: known[name] for name in self.config.targets if name in known}

    @cached_property
    def request(self) -> str:
        """Identifies what is asked for, by settings and the content of all files."""
        config, facts = self.config, {"sources": self.sources}
        lists = {"split_ids": sha256(Path(config.split_ids))} if config.split_ids else {}
        return request_of(config, {**facts, **lists, "dedup": [origin(p) for p in config.dedup]})

    @cached_property
    def sources(self) -> list[dict[str, Any]]:
        """What identifies each input, and the table of labels: name, format and hash. Paths stay
        out, for they say more of a machine than of data."""
        found = [self._source(*one) for one in self.inputs]
        if self.config.labels:
            table = Path(self.config.labels)
            found.append({"name": table.name, "format": "labels", "sha256": sha256(table)})
        return found

    def _source(self, split: str | None, path: str, format: str) -> dict[str, Any]:
        out: dict[str, Any] = {"name": Path(path).name, "format": format}
        if split:
            out["split"] = split
        if format == "prototypes":
            return out | {"size": self.config.size, "seed": self.config.seed}
        if format == "shards":
            return out | {"fingerprint": Manifest.load(path).fingerprint}
        digest = input_sha256(Path(path), self.config.follow_links)
        others = SOURCES[format].files(Path(path), self._options(split))
        if others:
            digests = "".join(f"{sha256(file)}\n" for file in sorted(set(others)))
            out["files_sha256"] = hashlib.sha256(digests.encode()).hexdigest()
        return out | {"sha256": digest}


def input_sha256(path: Path, follow_links: bool = False) -> str:
    """SHA-256 of a file; of a folder, that of the lines "<sha256>  <name>" of its files, without
    hidden ones."""
    if not path.is_dir():
        return sha256(path)
    lines = (f"{sha256(path / n)}  {n}\n" for n in Folder(path, follow_links).names)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def origin(path: str, format: str = AUTO) -> dict[str, Any]:
    """What identifies a data set, or a file that can be read, whatever it is called here."""
    if is_dataset(path):
        return {"fingerprint": Manifest.load(path).fingerprint}
    (source,) = Work.of(PrepareConfig(input=path, format=format)).sources
    return {key: value for key, value in source.items() if key != "name"}


def is_dataset(path: str) -> bool:
    """Whether a path or URL is that of a prepared data set."""
    return "://" in path or resolve(path) == "shards"
