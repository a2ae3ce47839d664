"""New data sets from old ones: merge, subset, reshard. Labels, splits and history come along."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.crystals.filters import Filters, describe
from crysforge.datapipe.preparing.edit_configs import MergeConfig, ReshardConfig, SubsetConfig
from crysforge.datapipe.preparing.request import made_before, request_of
from crysforge.datapipe.storage.dataset import Dataset, DatasetWriter
from crysforge.datapipe.storage.manifest import SPLITS, Manifest


def merge(config: MergeConfig) -> Manifest:
    """Writes the crystals of several data sets to one.

    Raises:
        ValueError: fewer than two sets, units of a label that differ, an id in two of them with
            `same_id=error`, a crystal that cannot be read.
    """
    if len(config.merge) < 2:
        raise ValueError("merge=[DIR,DIR,…] needs two data sets or more")
    sets = [Dataset.open(path) for path in config.merge]
    if with_folds := next((dataset for dataset in sets if dataset.folds), None):
        raise ValueError(f"{with_folds.root} has folds, which are of that set alone: merge others")
    request = request_of(config, [dataset.manifest.fingerprint for dataset in sets])
    if done := made_before(config.output, request):
        return done
    names = list(dict.fromkeys(name for dataset in sets for name in dataset.names))
    if config.targets == "intersection":
        names = [name for name in names if all(name in dataset.names for dataset in sets)]
    units = _common_units(sets, names, config.units)
    owner: dict[str, int] = {}
    left: Counter[str] = Counter()
    renamed = 0
    with DatasetWriter(config.output, names, units, config.shard_size) as writer:
        for number, dataset in enumerate(sets):
            label = _name(dataset)
            for _, split, crystal in _crystals(dataset, range(len(dataset)), config.progress):
                first = owner.setdefault(crystal.id, number)
                if first != number and config.same_id == "error":
                    raise ValueError(
                        f"id {crystal.id!r} is in {sets[first].root} and in {dataset.root}: give "
                        "same_id=first to keep the first, or same_id=rename to keep both"
                    )
                if first != number and config.same_id == "first":
                    left["id in an earlier set"] += 1
                    continue
                if first != number:
                    crystal = replace(crystal, id=f"{label}/{crystal.id}")
                    renamed += 1
                writer.add(split, crystal)
        settings = {"targets": config.targets, "same_id": config.same_id}
        more = {"renamed": renamed, "request": request}
        return writer.finish(_provenance("merge", sets, settings, left, more))


def subset(config: SubsetConfig) -> Manifest:
    """Writes some of the crystals of a data set to another.

    Raises:
        ValueError: an id that the set lacks, `count` beyond what is left, nothing left, a label
            that the set lacks, a crystal that cannot be read.
    """
    dataset = Dataset.open(config.subset)
    ids = sorted(_read_ids(config.ids)) if config.ids else []
    request = request_of(config, [dataset.manifest.fingerprint, ids])
    if done := made_before(config.output, request):
        return done
    left: Counter[str] = Counter()
    items = np.concatenate([dataset.stored_items(s) for s in SPLITS if s in config.splits])
    left["split"] = len(dataset) - len(items)
    for name in config.labelled:
        known = ~np.isnan(dataset.targets_of(name)[items])
        left[f"no {name}"] += int((~known).sum())
        items = items[known]
    for name in config.filters.labels:
        dataset.targets_of(name)  # says so if there is no such label
    if config.ids or config.filters != Filters():
        items = _chosen(dataset, items, config, left)
    if config.count is not None:
        if config.count > len(items):
            raise ValueError(f"count={config.count}, but only {len(items)} crystals are left")
        left["not drawn"] = len(items) - config.count
        items = np.sort(random.Random(config.seed).sample(items.tolist(), config.count))
    settings: dict[str, Any] = {
        "splits": list(config.splits),
        "labelled": list(config.labelled),
        "filters": dict(describe(config.filters)) if config.filters != Filters() else {},
        "ids": Path(config.ids).name or None,
        "count": config.count,
        "seed": None if config.count is None else config.seed,
    }
    settings = {k: v for k, v in settings.items() if v not in (None, [], {})}
    provenance = _provenance("subset", [dataset], settings, left, {"request": request})
    return _copy(dataset, items, config, provenance)


def reshard(config: ReshardConfig) -> Manifest:
    """Writes a data set with another number of crystals per shard, in the same order.

    Raises:
        ValueError: a crystal that cannot be read.
    """
    dataset = Dataset.open(config.reshard)
    request = request_of(config, dataset.manifest.fingerprint)
    if done := made_before(config.output, request):
        return done
    settings = {"shard_size": config.shard_size}
    provenance = _provenance("reshard", [dataset], settings, Counter(), {"request": request})
    return _copy(dataset, np.arange(len(dataset)), config, provenance)


def _chosen(
    dataset: Dataset, items: np.ndarray, config: SubsetConfig, left: Counter[str]
) -> np.ndarray:
    """Those of the items whose id is listed and that pass the filters."""
    wanted = _read_ids(config.ids) if config.ids else None
    missing = set(wanted or ())
    chosen = []
    for item, _, crystal in _crystals(dataset, items.tolist(), config.progress):
        if wanted is not None and crystal.id not in wanted:
            left["id not listed"] += 1
            continue
        missing.discard(crystal.id)
        reason = _rejected(crystal, config.filters)
        if reason:
            left[reason] += 1
        else:
            chosen.append(item)
    if missing:
        some = ", ".join(sorted(missing)[:10]) + (", …" if len(missing) > 10 else "")
        raise ValueError(
            f"{config.ids}: {len(missing)} ids are not in {', '.join(config.splits)} of "
            f"{dataset.root}: {some}"
        )
    return np.array(chosen, dtype=np.int64)


def _rejected(crystal: Crystal, filters: Filters) -> str | None:
    if filters == Filters():
        return None
    try:
        rejected = filters.check(crystal)
    except BadCrystal as error:
        return error.reason
    return rejected[0] if rejected else None


def _read_ids(path: str) -> set[str]:
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"ids={path} cannot be read: {error}") from None
    ids = {line.strip() for line in lines if line.strip()}
    if not ids:
        raise ValueError(f"ids={path} holds no ids: give one a line")
    return ids


def _copy(
    dataset: Dataset,
    items: np.ndarray,
    config: SubsetConfig | ReshardConfig,
    provenance: Mapping[str, Any],
) -> Manifest:
    """A data set of ascending items of another."""
    units = _common_units([dataset], dataset.names, {})
    with DatasetWriter(
        config.output, dataset.names, units, config.shard_size, dataset.folds
    ) as writer:
        for item, split, crystal in _crystals(dataset, items.tolist(), config.progress):
            writer.add(split, crystal, fold=dataset.fold_of(item))
        return writer.finish(provenance)


def _crystals(
    dataset: Dataset, items: Sequence[int], progress: bool
) -> Iterator[tuple[int, str, Crystal]]:
    """Item, split and crystal of each.

    Raises:
        ValueError: one cannot be read.
    """
    splits = [s for s in SPLITS for _ in range(dataset.manifest.splits[s])]
    bar = tqdm(
        total=len(items), desc=f"reading {_name(dataset)}", unit=" crystals", disable=not progress
    )
    with bar:
        for item, crystal in dataset.read(items):
            if isinstance(crystal, BadCrystal):
                raise ValueError(f"{dataset.root}: {crystal}; see all with verify={dataset.root}")
            yield item, splits[item], crystal
            bar.update()


def _common_units(
    sets: Sequence[Dataset], names: Sequence[str], given: Mapping[str, str]
) -> dict[str, str]:
    """Units of labels, on which the sets must agree."""
    for name in given:
        if name not in names:
            raise ValueError(f"units.{name}: there is no such label: {', '.join(names) or 'none'}")
    out = {}
    for name in names:
        told = {s.root: s.manifest.targets[name].unit for s in sets if name in s.names}
        known = {root: unit for root, unit in told.items() if unit}
        if name in given:
            known["units." + name] = given[name]
        elif known and len(known) < len(told):
            unknown = next(root for root, unit in told.items() if not unit)
            raise ValueError(
                f"the unit of {name} is not known in {unknown} and {next(iter(known.values()))} "
                f"elsewhere: if it is the same, give units.{name}=…"
            )
        if len(set(known.values())) > 1:
            each = ", ".join(f"{unit} in {root}" for root, unit in known.items())
            raise ValueError(f"the units of {name} differ: {each}; convert one of the sets")
        if known:
            out[name] = next(iter(known.values()))
    return out


def _name(dataset: Dataset) -> str:
    return Path(dataset.root.rstrip("/")).name


def _provenance(
    action: str,
    sets: Sequence[Dataset],
    settings: Mapping[str, Any],
    left: Mapping[str, int],
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What was done, to which data sets, and their own history."""
    return {
        "action": action,
        "settings": dict(settings),
        "dropped": {reason: count for reason, count in left.items() if count},
        **{key: value for key, value in (more or {}).items() if value},
        "sources": [
            {
                "name": _name(dataset),
                "format": "shards",
                "fingerprint": dataset.manifest.fingerprint,
                "provenance": dataset.manifest.provenance,
            }
            for dataset in sets
        ],
    }
