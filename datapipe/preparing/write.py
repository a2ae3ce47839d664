"""Crystals to shards: splits, labels, provenance, and what was left out."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from crysforge.datapipe.common.files import replacing
from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.common.tables import row_writer
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.crystals.filters import describe
from crysforge.datapipe.preparing.config import PrepareConfig
from crysforge.datapipe.preparing.splitting import splits
from crysforge.datapipe.preparing.splitting.balanced import Folds
from crysforge.datapipe.preparing.splitting.clusters import in_words
from crysforge.datapipe.preparing.work import Work
from crysforge.datapipe.sources import Failure, Raw
from crysforge.datapipe.sources.join import remedy
from crysforge.datapipe.sources.values import is_labelled, is_number
from crysforge.datapipe.storage.dataset import DatasetWriter
from crysforge.datapipe.storage.manifest import SPLITS, Manifest

DROPPED = "dropped.csv"
WARNINGS = "warnings.csv"
"""What readers had to say of crystals that they read."""


_LOOKED_AT = 1000
"""Records whose fields are listed when a target is unknown."""


_SHOWN = 10
"""Examples shown of a long list."""


def write(config: PrepareConfig) -> Manifest:
    """`prepare` without a search for duplicates."""
    work = Work.of(config)
    config = work.config
    with (  # processes first: they must not hold the writer's lock
        work.reading().workers(config.workers) as workers,
        DatasetWriter(
            config.output, config.targets, work.units(), config.shard_size, work.folds
        ) as writer,
    ):
        scan = _scan(work)
        codes, folds = _assign(work, scan)
        raws = _in_splits(work, scan, codes)
        results = enumerate(workers.map(raws))
        bar = tqdm(results, "preparing", len(codes), unit=" crystals", disable=not config.progress)
        counts = _write(writer, bar, codes, folds, config)
        return writer.finish(_provenance(work, scan, writer, counts))


def plan(config: PrepareConfig) -> str:
    """What `prepare` would do, in words: the rule and the records of each split. Parses nothing."""
    work = Work.of(config)
    config = work.config
    scan = _scan(work)
    told = f"{work.folds} folds" if work.folds else "made when the crystals are read"
    if not work.folds and not work.needs_crystals:
        codes, _ = _assign(work, scan)
        counts = [f"{int((codes == code).sum())} {split}" for code, split in enumerate(SPLITS)]
        told = f"{', '.join(counts)}, {int((codes == splits.NONE).sum())} in none"
    notes = "".join(f"\nnote: {note}" for note in work.notes)
    return (
        f"{len(scan.ids)} records in {', '.join(f'{i} ({f})' for _, i, f in work.inputs)}\n"
        f"split {work.rule}: {told}\n"
        f"cells: {config.cell_rule}"
        + (f"\nleaving out duplicates of {', '.join(config.dedup)}" if config.dedup else "")
        + ("\nleaving out duplicates within" if config.duplicates.within else "")
        + notes
    )


@dataclass
class _Scan:
    """What the first pass learns."""

    ids: list[str] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    """Code of the split a record brings along, or -1."""
    labelled: list[bool] = field(default_factory=list)
    """Whether a record has the label that the published rule goes by."""
    duplicates: dict[int, int] = field(default_factory=dict)
    """Number of a record whose id occurred before: number of the first with it."""


def _scan(work: Work) -> _Scan:
    """Looks at ids and labels of all records.

    Raises:
        ValueError: a target that no record has; duplicate ids with `on_bad=error`.
    """
    config, scan = work.config, _Scan()
    goes_by = config.split_target or next(iter(config.targets), None)
    wanted = {*work.labels, *([config.split_target] if config.split_target else [])}
    first: dict[str, int] = {}
    fields: Counter[str] = Counter()
    records = tqdm(work.records(), "scanning", unit=" records", disable=not config.progress)
    for number, raw in enumerate(records):
        if raw.id and first.setdefault(raw.id, number) != number:
            scan.duplicates[number] = first[raw.id]
        scan.ids.append(raw.id)
        scan.own.append(SPLITS.index(raw.split) if raw.split else splits.NONE)
        scan.labelled.append(goes_by is not None and is_labelled(raw.labels.get(goes_by)))
        wanted = {w for w in wanted if w not in raw.labels} if wanted else wanted
        if number < _LOOKED_AT:
            fields.update(k for k, v in raw.labels.items() if k and _may_be_label(v))
    for name in sorted(wanted):
        raise ValueError(_without_target(work, name, fields))
    if scan.duplicates and config.on_bad == "error":
        ids = list(dict.fromkeys(scan.ids[n] for n in scan.duplicates))
        more = ", …" if len(ids) > _SHOWN else ""
        raise ValueError(
            f"{len(ids)} ids occur more than once: {', '.join(ids[:_SHOWN])}{more}; make them "
            "unique, or give on_bad=drop to keep the first of each"
        )
    return scan


def _may_be_label(value: Any) -> bool:
    if not isinstance(value, str):
        return isinstance(value, int | float)
    return is_number(value) or value.startswith("computed")


def _assign(work: Work, scan: _Scan) -> tuple[np.ndarray, Folds | None]:
    """Split code of every record, [n] int8, and folds if there are any."""
    n = len(scan.ids)
    if work.folds:
        return np.zeros(n, dtype=np.int8), splits.matbench_folds(n, work.config.seed)
    return work.codes(scan.ids, scan.own, scan.labelled), None


def _in_splits(work: Work, scan: _Scan, codes: np.ndarray) -> Iterator[Raw | Failure]:
    """The records again, for parsing; those that are left out for sure are failures already."""
    number = -1
    for number, raw in enumerate(work.records()):
        if number >= len(codes) or raw.id != scan.ids[number]:
            raise ValueError(f"the input changed while it was read: {raw.where} is new")
        if number in scan.duplicates:
            message = f"the id of record {scan.duplicates[number] + 1}, which comes first"
            yield Failure(raw.id, raw.where, "duplicate id", message)
        elif codes[number] == splits.NONE and raw.payload[0] != "skip":
            yield Failure(raw.id, raw.where, "in no split", f"split {work.rule}", bad=False)
        else:
            labels = {name: raw.labels[name] for name in work.labels if name in raw.labels}
            yield replace(raw, labels=labels)
    if number + 1 < len(codes):
        raise ValueError(f"the input changed while it was read: {scan.ids[number + 1]!r} is gone")


@dataclass
class _Counts:
    """What became of the crystals."""

    reduced: int = 0
    """Those that are written in a smaller cell than they came in."""
    warned: int = 0
    """Those whose reader had something to say (warnings.csv)."""
    dropped: Counter[str] = field(default_factory=Counter)
    """By reason."""


def _write(
    writer: DatasetWriter,
    results: Iterable[tuple[int, Crystal | Failure]],
    codes: np.ndarray,
    folds: Folds | None,
    config: PrepareConfig,
) -> _Counts:
    """Writes crystals to shards, failures to `dropped.csv` and notes to `warnings.csv`."""
    counts = _Counts()
    examples: list[str] = []
    with ExitStack() as files:
        file = files.enter_context(replacing(writer.directory / DROPPED))
        drop = row_writer(file)
        drop(["id", "source", "reason", "message"])
        for number, result in results:
            if isinstance(result, Crystal):
                fold = folds.at(number) if folds else None
                writer.add(SPLITS[codes[number]], result, fold=fold)
                counts.reduced += result.copies > 1
                if result.notes:
                    if not counts.warned:
                        note = row_writer(
                            files.enter_context(replacing(writer.directory / WARNINGS))
                        )
                        note(["id", "message"])
                    counts.warned += 1
                    for text in result.notes:
                        note([result.id, text])
                continue
            if result.ends:
                raise ValueError(str(result))
            if result.bad and config.on_bad == "error":
                raise ValueError(f"{result}; mend it, or give on_bad=drop to leave it out")
            drop([result.id, result.where, result.reason, result.message])
            counts.dropped[result.reason] += 1
            if len(examples) < 3:
                examples.append(str(result))
    if not len(writer):
        dropped = counts.dropped
        raise ValueError(
            f"all {dropped.total()} crystals were dropped ({reasons(dropped)}), for example "
            + "; ".join(examples)
        )
    return counts


def _provenance(work: Work, scan: _Scan, writer: DatasetWriter, counts: _Counts) -> dict[str, Any]:
    config = work.config
    return {
        "request": work.request,
        "sources": work.sources,
        "split": work.split_settings(),
        "cell": {**work.cells().describe(), "reduced": counts.reduced},
        **({"extensive": list(extensive)} if (extensive := work.extensive()) else {}),
        "checks": config.checks,
        "filters": dict(describe(config.filters)),
        "records": len(scan.ids),
        "kept": len(writer),
        "dropped": dict(sorted(counts.dropped.items())),
        "warned": counts.warned,
        "notes": list(work.notes),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("ase", "numpy", "pymatgen")},
        },
    }


def reasons(dropped: Counter[str] | dict[str, int]) -> str:
    """Counts of dropped crystals as text, the most frequent reason first."""
    ordered = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered)


def summary(manifest: Manifest, output: str) -> str:
    """What a data set holds, in a few lines."""
    from ase.data import chemical_symbols

    sizes = ", ".join(f"{manifest.splits[s]} {s}" for s in SPLITS)
    if manifest.folds:
        sizes = f"{manifest.folds['count']} folds (fold=0 to {manifest.folds['count'] - 1})"
    symbols = " ".join(chemical_symbols[z] for z in manifest.elements)
    lines = [
        f"{sum(manifest.splits.values())} crystals: {sizes}",
        f"{len(manifest.elements)} elements: {symbols}",
    ]
    for name, target in manifest.targets.items():
        count = sum(target.labelled.values())
        text = f"target {name}: {count} labelled, "
        text += f"{sum(manifest.splits.values()) - count} unlabelled"
        if target.mean is not None:
            unit = f" {target.unit}" if target.unit else " (unit unknown: give units.NAME=…)"
            text += f"; train mean {target.mean:.4g}, std {target.std:.4g}{unit}"
        lines.append(text)
    lines += in_words(manifest.provenance.get("split", {}))
    if reduced := manifest.provenance.get("cell", {}).get("reduced"):
        lines.append(f"cells reduced to primitive ones: {reduced}")
    dropped = manifest.provenance.get("dropped", {})
    lines.append(
        f"dropped {sum(dropped.values())}: {reasons(dropped)}"
        + (f" (see {DROPPED})" if "action" not in manifest.provenance else "")
        if dropped
        else "dropped 0"
    )
    if warned := manifest.provenance.get("warned"):
        lines.append(f"{warned} read with a warning (see {WARNINGS})")
    lines += [f"note: {note}" for note in manifest.provenance.get("notes", [])]
    lines.append(f"written to {output}")
    return "\n".join(lines)


def _without_target(work: Work, name: str, fields: Iterable[str]) -> str:
    """What to do about a target that no record has."""
    where = ", ".join(path for _, path, _ in work.inputs)
    fields = list(fields)
    text = f"{where} has no target {name!r}: "
    text += f"{nearest(name, fields)}; " if fields else "its records have no labels; "
    if work.config.labels:
        return text + f"nor has labels={work.config.labels}"
    for _, path, _ in work.inputs:
        if beside := remedy(name, Path(path)):
            return text + beside
    text += "if it is in a table of its own, give labels=TABLE"
    return text if fields else f"{text} (a column of ids or file names, and one called {name!r})"
