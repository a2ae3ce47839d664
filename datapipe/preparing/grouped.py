"""Splits and folds that depend on what the crystals are: parsed first, then grouped, then written.

What is parsed and compared is kept in `.NAME.groups` beside the output until the data set is
complete, so that the same call goes on after a kill.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from crysforge.datapipe.common.journal import WorkDirectory
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.preparing.config import PrepareConfig
from crysforge.datapipe.preparing.splitting import splits
from crysforge.datapipe.preparing.splitting.balanced import Folds, balanced, make_folds
from crysforge.datapipe.preparing.splitting.clusters import groups_of, sizes
from crysforge.datapipe.preparing.work import Work
from crysforge.datapipe.storage.dataset import Dataset, DatasetWriter
from crysforge.datapipe.storage.manifest import MANIFEST, SPLITS, Manifest

_BESIDE = ("dedup.json", "matches.csv", "dropped.csv", "warnings.csv")
"""Files that lie beside the shards and come along."""


def prepare_grouped(config: PrepareConfig, make: Callable[[PrepareConfig], Manifest]) -> Manifest:
    """Writes the data set that a config asks for, its crystals split or folded by groups.

    Args:
        make: writes a data set without that: all crystals in train.

    Raises:
        ValueError: too few groups, a label that is to be stratified by has no classes; see `make`.
    """
    with DatasetWriter(config.output, config.targets):
        pass  # says so at once if the output cannot be written
    asked = Work.of(config)
    identity = {
        "request": asked.request,
        "versions": {n: version(n) for n in ("numpy", "pymatgen")},
    }
    with WorkDirectory(config.output, "groups", identity) as work:
        root = work.path / "input"
        if not (root / MANIFEST).is_file():
            make(_all_in_train(asked, root))
        data = Dataset.open(root)
        groups, undecided = groups_of(
            data,
            asked.config.split_by,
            asked.config.duplicates,
            work.path / "clusters.jsonl",
            config.workers,
            config.progress,
        )
        classes = asked.classes(data.targets_of(asked.stratify)) if asked.stratify else None
        told = sizes(groups) if asked.config.split_by else {}
        told |= {"stratified_by": asked.stratify} if classes is not None else {}
        told |= {"undecided": undecided} if undecided else {}
        if asked.folds:
            folds = make_folds(groups, asked.folds, config.seed, classes)
            codes = np.zeros(len(data), dtype=np.int8)
        else:
            folds = None
            codes = _split(groups, asked, classes)
        manifest = _write(data, asked, codes, folds, told)
        work.remove()
    return manifest


def _all_in_train(asked: Work, root: Path) -> PrepareConfig:
    """The config of all crystals, with the label to stratify by."""
    config = asked.config
    more = [asked.stratify] if asked.stratify and asked.stratify not in config.targets else []
    return replace(
        config,
        output=str(root),
        targets=[*config.targets, *more],
        split="ratio",
        ratio=[1.0, 0.0, 0.0],
        split_by=None,
        folds=None,
        stratify=None,
    )


def _split(groups: list[str], asked: Work, classes: np.ndarray | None) -> np.ndarray:
    """Split code of every crystal, [n] int8."""
    shares = splits.shares(asked.config.ratio or splits.usual_ratio(len(groups)))
    rest = 1 - sum(shares)
    codes = balanced(groups, [*shares, rest if rest > 1e-9 else 0.0], asked.config.seed, classes)
    return np.where(codes < len(SPLITS), codes, splits.NONE).astype(np.int8)


def _write(
    data: Dataset, asked: Work, codes: np.ndarray, folds: Folds | None, told: dict[str, Any]
) -> Manifest:
    config, before = asked.config, data.manifest.provenance
    dropped = Counter(before["dropped"])
    targets = [name for name in data.names if name in config.targets]
    units = {name: t.unit for name, t in data.manifest.targets.items() if t.unit}
    units = {name: unit for name, unit in units.items() if name in targets}
    left_out = io.StringIO()
    with DatasetWriter(config.output, targets, units, config.shard_size, asked.folds) as writer:
        for item, crystal in _crystals(data, config.progress):
            if codes[item] == splits.NONE:
                row = (crystal.id, data.where(item), "in no split", f"split {asked.rule}")
                csv.writer(left_out).writerow(row)
                dropped["in no split"] += 1
            else:
                fold = folds.at(item) if folds else None
                writer.add(SPLITS[codes[item]], crystal, fold=fold)
        for name in _BESIDE:
            if (Path(data.root) / name).is_file():
                shutil.copyfile(Path(data.root) / name, writer.directory / name)
        with open(writer.directory / "dropped.csv", "a", encoding="utf-8", newline="") as file:
            file.write(left_out.getvalue())
        provenance = {
            **before,
            "request": asked.request,
            "split": {**asked.split_settings(), **told},
            "kept": len(writer),
            "dropped": dict(sorted(dropped.items())),
        }
        return writer.finish(provenance)


def _crystals(data: Dataset, progress: bool) -> Iterator[tuple[int, Crystal]]:
    crystals = data.read(range(len(data)))
    for item, crystal in tqdm(
        crystals, "writing", len(data), unit=" crystals", disable=not progress
    ):
        if isinstance(crystal, BadCrystal):
            raise ValueError(f"{data.root}: {crystal}")
        yield item, crystal
