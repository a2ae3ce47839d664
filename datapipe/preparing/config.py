"""What `prepare` is asked for: its settings, checked, and the records of its inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from crysforge.datapipe.common.files import sha256
from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.common.safe_names import check_names
from crysforge.datapipe.crystals.cells import RULES, Cells, cells_of, extensive_of
from crysforge.datapipe.crystals.filters import Filters
from crysforge.datapipe.crystals.per_cell import of_the_cell
from crysforge.datapipe.preparing import splits
from crysforge.datapipe.preparing.dedup import Duplicates
from crysforge.datapipe.preparing.request import request_of
from crysforge.datapipe.sources import SOURCES, UNITS, Raw, Reading, read_raw, resolve
from crysforge.datapipe.sources.base import Options
from crysforge.datapipe.sources.files import Folder
from crysforge.datapipe.sources.options import ReadingConfig
from crysforge.datapipe.sources.read import AUTO, brings_splits
from crysforge.datapipe.storage.manifest import SPLITS, Manifest


@dataclass(kw_only=True)
class PrepareConfig(ReadingConfig):
    """Settings of `prepare`."""

    train: str = ""
    """Input of the training split, in place of `input`, where the splits are files."""
    val: str = ""
    """Input of the validation split."""
    test: str = ""
    """Input of the test split."""
    output: str = ""
    """Directory of the data set; new or empty."""
    labels: str | None = None
    """Table with labels of the crystals, where they are not in the input itself: a column of ids or
    file names, and one for each label."""
    targets: list[str] = field(default_factory=list)
    """Labels to keep, by their names in the input. None: those of a data set, else no labels, as
    pretraining needs none."""
    units: dict[str, str] = field(default_factory=dict)
    """Units of targets, where they are not known from their names."""
    extensive: list[str] = field(default_factory=list)
    """Labels of the whole cell that go with the number of its atoms: total energy, volume, total
    magnetization. Where a cell is reduced, they are divided by the number of its copies."""
    intensive: list[str] = field(default_factory=list)
    """Labels that are the same for any cell, though their names or units may not look like it."""
    split: str | None = None
    """ratio, count, ids, file, published-123, matbench, or keep (input is a data set); None: the
    one whose settings are given, else keep for a data set and ratio for anything else."""
    ratio: list[float] | None = None
    """Shares of train, val, test; None: [0.8, 0.1, 0.1], or as far as the crystals suffice."""
    n_train: int | None = None
    """Training records; None takes what val and test leave."""
    n_val: int | None = None
    """Validation records."""
    n_test: int | None = None
    """Test records."""
    split_ids: str | None = None
    """JSON file {train: [ids], val: …, test: …}, or folder of train.txt, val.txt, test.txt."""
    split_target: str | None = None
    """Label that published-123 goes by; None: the only target."""
    fold: int | None = None
    """Matbench's official fold to test on, 0 to 4."""
    seed: int = 123
    """Seed of the shuffle of ratio and count, of matbench's validation part, and of prototypes."""
    filters: Filters = field(default_factory=Filters)
    """Which crystals to keep, by the cell that they are brought to."""
    dedup: list[str] = field(default_factory=list)
    """Data sets, or files that can be read, whose crystals are left out."""
    duplicates: Duplicates = field(default_factory=Duplicates)
    """What counts as a duplicate of those, and whether to look for duplicates within."""
    shard_size: int = 1000
    """Crystals in a shard."""
    dry_run: bool = False
    """Only say what would be done."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split is not None and self.split not in splits.RULES:
            raise ValueError(f"unknown split {self.split!r}: {nearest(self.split, splits.RULES)}")
        if self.shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, got {self.shard_size}")
        check_names(self.targets)
        if repeated := sorted({n for n in self.targets if self.targets.count(n) > 1}):
            raise ValueError(f"targets names {', '.join(repeated)} more than once")
        for name in self.units:
            if name not in self.targets:
                has = nearest(name, self.targets) if self.targets else "give targets=[…]"
                raise ValueError(f"units.{name}: no such target: {has}")
        if both := set(self.extensive) & set(self.intensive):
            raise ValueError(f"{sorted(both)[0]} is in extensive and in intensive: which is it?")


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
        if not config.targets and inputs[0][2] == "shards":
            known = list(Manifest.load(inputs[0][1]).targets)
            config = replace(config, targets=known)
        labels = dict.fromkeys([*config.targets, *config.filters.labels])
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
        told = [name for m in self._manifests() for name in extensive_of(m.provenance)]
        names = dict.fromkeys([*self.config.extensive, *told])
        return tuple(n for n in names if n in self.labels and n not in self.config.intensive)

    def cells(self) -> Cells:
        """The cell that all crystals are in when they have been read: that of data sets may be a
        smaller one than is asked for."""
        manifests = self._manifests()
        if not manifests or len(manifests) < len(self.inputs):
            return self.config.cell_rule
        before = [cells_of(manifest.provenance) for manifest in manifests]
        least = max(before, key=lambda cells: RULES.index(cells.rule))
        asked = self.config.cell_rule
        return asked if RULES.index(asked.rule) <= RULES.index(least.rule) else least

    def _manifests(self) -> list[Manifest]:
        return [Manifest.load(path) for _, path, format in self.inputs if format == "shards"]

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
