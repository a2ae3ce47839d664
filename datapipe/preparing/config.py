"""What `prepare` is asked for: its settings, checked, and the records of its inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.crystals.filters import Filters
from crysforge.datapipe.crystals.limits import Limits
from crysforge.datapipe.preparing import splits
from crysforge.datapipe.preparing.dedup import Duplicates
from crysforge.datapipe.preparing.request import request_of
from crysforge.datapipe.sources import UNITS, Options, Raw, read_raw, resolve
from crysforge.datapipe.sources.read import AUTO
from crysforge.datapipe.storage.manifest import SPLITS, Manifest


@dataclass(kw_only=True)
class PrepareConfig:
    """Settings of `prepare`."""

    input: str = ""
    """File, archive, folder or data set with the crystals; or "prototypes" (synthetic)."""
    train: str = ""
    """Input of the training split, in place of `input`, where the splits are files."""
    val: str = ""
    """Input of the validation split."""
    test: str = ""
    """Input of the test split."""
    output: str = ""
    """Directory of the data set; new or empty."""
    format: str = "auto"
    """Reader or data set by name; "auto" goes by what the input looks like."""
    targets: list[str] = field(default_factory=list)
    """Labels to keep, by their names in the input. None: those of a data set, else no labels, as
    pretraining needs none."""
    units: dict[str, str] = field(default_factory=dict)
    """Units of targets, where they are not known from their names."""
    id_column: str | None = None
    """Column or field of the id; None guesses."""
    structure_column: str | None = None
    """Column or field of the structure; None guesses."""
    size: int = 2000
    """Number of crystals with input=prototypes."""
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
    """Which crystals to keep."""
    limits: Limits = field(default_factory=Limits)
    """What one crystal may cost while it is read."""
    dedup: list[str] = field(default_factory=list)
    """Data sets, or files that can be read, whose crystals are left out."""
    duplicates: Duplicates = field(default_factory=Duplicates)
    """What counts as a duplicate of those, and whether to look for duplicates within."""
    on_bad: str = "drop"
    """drop: leave bad crystals out and list them in dropped.csv; error: stop at the first."""
    shard_size: int = 1000
    """Crystals in a shard."""
    workers: int = 0
    """Processes that parse; 0: one for each core."""
    progress: bool = True
    """Whether to show progress bars."""
    dry_run: bool = False
    """Only say what would be done."""

    def __post_init__(self) -> None:
        if self.on_bad not in ("drop", "error"):
            raise ValueError(f"on_bad must be drop or error, got {self.on_bad!r}")
        if self.split is not None and self.split not in splits.RULES:
            raise ValueError(f"unknown split {self.split!r}: {nearest(self.split, splits.RULES)}")
        for name in ("shard_size", "size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in self.units:
            if name not in self.targets:
                has = nearest(name, self.targets) if self.targets else "give targets=[…]"
                raise ValueError(f"units.{name}: no such target: {has}")


@dataclass(frozen=True)
class Work:
    """A config, checked and completed."""

    config: PrepareConfig
    inputs: list[tuple[str | None, str, str]]
    """(split or None, path, format)."""
    rule: str
    labels: tuple[str, ...]
    """Targets, and what filters look at."""

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
        for path in files.values() if config.output else ():
            if Path(path).is_dir() and Path(path).resolve() in (output, *output.parents):
                raise ValueError(
                    f"output {config.output} is inside the input {path}: give a directory elsewhere"
                )
        inputs: list[tuple[str | None, str, str]] = [
            (split, path, resolve(path, config.format)) for split, path in files.items()
        ]
        default = "keep" if inputs[0][2] == "shards" else "ratio"
        rule = splits.choose_rule(vars(config), config.split, default)
        if not config.targets and inputs[0][2] == "shards":
            known = list(Manifest.load(inputs[0][1]).targets)
            config = replace(config, targets=known)
        labels = dict.fromkeys([*config.targets, *config.filters.labels])
        return cls(config, inputs, rule, tuple(labels))

    def records(self) -> Iterator[Raw]:
        """All records; those of a split's own file are marked with it."""
        config = self.config
        for split, path, format in self.inputs:
            options = Options(
                id_column=config.id_column,
                structure_column=config.structure_column,
                targets=tuple(config.targets),
                prefix=split,
                max_atoms=config.limits.atoms,
                size=config.size,
                seed=config.seed,
            )
            for raw in read_raw(path, format, options):
                yield replace(raw, split=split) if split else raw

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
        """What identifies each input: name, format and hash. Paths stay out, for they say more of
        a machine than of data."""
        return [self._source(*one) for one in self.inputs]

    def _source(self, split: str | None, path: str, format: str) -> dict[str, Any]:
        out: dict[str, Any] = {"name": Path(path).name, "format": format}
        if split:
            out["split"] = split
        if format == "prototypes":
            return out | {"size": self.config.size, "seed": self.config.seed}
        if format == "shards":
            return out | {"fingerprint": Manifest.load(path).fingerprint}
        return out | {"sha256": sha256(Path(path))}


def origin(path: str, format: str = AUTO) -> dict[str, Any]:
    """What identifies a data set, or a file that can be read, whatever it is called here."""
    if is_dataset(path):
        return {"fingerprint": Manifest.load(path).fingerprint}
    (source,) = Work.of(PrepareConfig(input=path, format=format)).sources
    return {key: value for key, value in source.items() if key != "name"}


def is_dataset(path: str) -> bool:
    """Whether a path or URL is that of a prepared data set."""
    return "://" in path or resolve(path) == "shards"


def sha256(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of the lines "<sha256>  <name>" of its files."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{sha256(file)}  {file.relative_to(path).as_posix()}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
