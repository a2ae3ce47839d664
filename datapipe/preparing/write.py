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

from crysforge.datapipe.common.files import replacing, sha256
from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.common.tables import row_writer
from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.crystals.filters import describe
from crysforge.datapipe.preparing import splits
from crysforge.datapipe.preparing.config import PrepareConfig, Work
from crysforge.datapipe.sources import Failure, Raw
from crysforge.datapipe.sources.join import tables_with
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
        DatasetWriter(config.output, config.targets, work.units(), config.shard_size) as writer,
    ):
        scan = _scan(work)
        codes = _assign(work, scan)
        raws = _in_splits(work, scan, codes)
        results = zip(codes.tolist(), workers.map(raws), strict=True)
        bar = tqdm(results, "preparing", len(codes), unit=" crystals", disable=not config.progress)
        counts = _write(writer, bar, config)
        return writer.finish(_provenance(work, scan, writer, counts))


def plan(config: PrepareConfig) -> str:
    """What `prepare` would do, in words: the rule and the records of each split. Parses nothing."""
    work = Work.of(config)
    config = work.config
    codes = _assign(work, _scan(work))
    notes = "".join(f"\nnote: {note}" for note in work.notes)
    counts = [f"{int((codes == code).sum())} {split}" for code, split in enumerate(SPLITS)]
    return (
        f"{len(codes)} records in {', '.join(f'{i} ({f})' for _, i, f in work.inputs)}\n"
        f"split {work.rule}: {', '.join(counts)}, {int((codes == splits.NONE).sum())} in none\n"
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


def _assign(work: Work, scan: _Scan) -> np.ndarray:
    """Split code of every record, [n] int8."""
    config, n = work.config, len(scan.ids)
    n_val, n_test = config.n_val or 0, config.n_test or 0
    if work.rule == "ratio":
        return splits.by_ratio(n, config.ratio or splits.usual_ratio(n), config.seed)
    if work.rule == "count":
        return splits.by_count(n, config.n_train, n_val, n_test, config.seed)
    if work.rule == "ids":
        assert config.split_ids is not None
        return splits.by_ids(scan.ids, splits.read_ids(config.split_ids))
    if work.rule == "matbench":
        assert config.fold is not None
        return splits.by_fold(n, config.fold, config.seed)
    if work.rule == "published-123":
        if config.split_target is None and len(config.targets) != 1:
            raise ValueError(
                "split=published-123 goes by which records have a label: name it with "
                f"split_target=…, one of {', '.join(config.targets) or 'the labels of the input'}"
            )
        counts = (config.n_train, n_val, n_test)
        given = any(c is not None for c in (config.n_train, config.n_val, config.n_test))
        return splits.published(np.array(scan.labelled), counts if given else None)
    return np.array(scan.own, dtype=np.int8)


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
    writer: DatasetWriter, results: Iterable[tuple[int, Crystal | Failure]], config: PrepareConfig
) -> _Counts:
    """Writes crystals to shards, failures to `dropped.csv` and notes to `warnings.csv`."""
    counts = _Counts()
    examples: list[str] = []
    with ExitStack() as files:
        file = files.enter_context(replacing(writer.directory / DROPPED))
        drop = row_writer(file)
        drop(["id", "source", "reason", "message"])
        for code, result in results:
            if isinstance(result, Crystal):
                writer.add(SPLITS[code], result)
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
    settings = {s: getattr(config, s) for s in splits.RULES[work.rule] if s not in SPLITS}
    if work.rule in ("ratio", "count", "matbench"):
        settings["seed"] = config.seed
    if settings.get("split_ids"):
        settings["split_ids"] = {
            "name": Path(config.split_ids or "").name,
            "sha256": sha256(Path(config.split_ids or "")),
        }
    return {
        "request": work.request,
        "sources": work.sources,
        "split": {"rule": work.rule, **{k: v for k, v in settings.items() if v is not None}},
        "cell": {**work.cells().describe(), "reduced": counts.reduced},
        **({"extensive": list(extensive)} if (extensive := work.extensive()) else {}),
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
    beside = [t for _, path, _ in work.inputs for t in tables_with(name, Path(path))]
    if beside:
        return text + f"{beside[0].name} has it: give labels={beside[0]}"
    text += "if it is in a table of its own, give labels=TABLE"
    return text if fields else f"{text} (a column of ids or file names, and one called {name!r})"
