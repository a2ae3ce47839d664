"""`prepare` with deduplication: parse, find duplicates, write the rest, write a report.

What is parsed, and what is decided, is kept in `.NAME.dedup` beside the output until the data set
is complete. So the same call goes on after a kill; a call with other settings or files starts anew.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crysforge.datapipe.common.files import write_text
from crysforge.datapipe.common.journal import WorkDirectory
from crysforge.datapipe.common.tables import row_writer
from crysforge.datapipe.crystals.crystal import BadCrystal
from crysforge.datapipe.preparing.config import PrepareConfig
from crysforge.datapipe.preparing.duplicates.records import WITHIN, Duplicates, Found, Reference
from crysforge.datapipe.preparing.duplicates.search import search
from crysforge.datapipe.preparing.work import Work, is_dataset, origin
from crysforge.datapipe.preparing.write import DROPPED, WARNINGS, write
from crysforge.datapipe.storage.dataset import Dataset, DatasetWriter
from crysforge.datapipe.storage.manifest import MANIFEST, SPLITS, Manifest

REPORT, MATCHES = "dedup.json", "matches.csv"

_COLUMNS = ("id", "split", "formula", "set", "same_as", "same_as_split", "by", "rms", "largest")

_ASIDE = ("output", "shard_size", "workers", "progress", "dry_run")
"""Settings that change nothing in what is found."""


def prepare_unique(config: PrepareConfig) -> Manifest:
    """Writes the data set that a config asks for, without the duplicates it tells of.

    Raises:
        ValueError: see `prepare.prepare` and `duplicates.search.search`.
    """
    with DatasetWriter(config.output, config.targets):
        pass  # says so at once if the output cannot be written
    asked = Work.of(config)
    identity: dict[str, Any] = {
        "settings": {k: v for k, v in asdict(config).items() if k not in _ASIDE},
        "inputs": asked.sources,
        "references": [origin(path) for path in config.dedup],
        "versions": _versions(),
    }
    hashes = {value for one in identity["inputs"] for value in one.values()}
    for path, known in zip(config.dedup, identity["references"], strict=True):
        if hashes & {known.get("fingerprint"), known.get("sha256")}:
            raise ValueError(
                f"dedup: {path} is the input itself; for duplicates among its own crystals give "
                "duplicates.within=true"
            )
    with WorkDirectory(config.output, "dedup", identity) as work:
        plain = replace(config, dedup=[], duplicates=Duplicates())
        data = _dataset(plain, work.path / "input")
        references = [
            _reference(path, name, config, work.path / f"reference-{i}")
            for i, (path, name) in enumerate(zip(config.dedup, _names(config.dedup), strict=True))
        ]
        found = search(
            data,
            references,
            config.duplicates,
            work.path / "decided.jsonl",
            workers=config.workers,
            progress=config.progress,
        )
        manifest = _write(data, references, found, config, asked.request)
        work.remove()
    return manifest


def _dataset(config: PrepareConfig, root: Path) -> Dataset:
    """The data set of a config, made unless it is there from a call before."""
    if not (root / MANIFEST).is_file():
        write(replace(config, output=str(root)))
    return Dataset.open(root)


def _reference(path: str, name: str, config: PrepareConfig, root: Path) -> Reference:
    """A data set as it is; of anything else, a data set of all crystals that can be used."""
    if is_dataset(path):
        splits = [s for s in SPLITS if s in config.duplicates.splits]
        return Reference(name, Dataset.open(path), splits, {**origin(path), "splits": splits})
    shares = [1.0, 0.0, 0.0]
    asked = PrepareConfig(
        input=path,
        ratio=shares,
        checks=config.checks,
        cell=config.cell,
        cell_tolerance=config.cell_tolerance,
        limits=config.limits,
        workers=config.workers,
        progress=config.progress,
    )
    dataset = _dataset(asked, root)
    unusable = sum(dataset.manifest.provenance["dropped"].values())
    return Reference(name, dataset, ["train"], {**origin(path), "unusable": unusable})


def _names(paths: Sequence[str]) -> list[str]:
    """Names of the references for reports: their files' names, numbered where these are equal."""
    names = [Path(path.rstrip("/")).name for path in paths]
    seen: Counter[str] = Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(f"{name} ({seen[name]})" if names.count(name) > 1 else name)
    return out


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("numpy", "pymatgen", "scipy")}


def _write(
    data: Dataset,
    references: Sequence[Reference],
    found: Found,
    config: PrepareConfig,
    request: str,
) -> Manifest:
    """The data set without the duplicates, with the report beside it."""
    sets = {n: (r.name, _splits_of(r.dataset)) for n, r in enumerate(references)}
    sets[WITHIN] = ("", _splits_of(data))
    splits = sets[WITHIN][1]
    first = {match["item"]: match for match in reversed(found.matches)}
    reasons = {item: _reason(match, references) for item, match in sorted(first.items())}
    units = {name: t.unit for name, t in data.manifest.targets.items() if t.unit}
    before = data.manifest.provenance
    source = ", ".join(one["name"] for one in before["sources"])
    with DatasetWriter(config.output, data.names, units, config.shard_size, data.folds) as writer:
        crystals = data.read(range(len(data)))
        quiet = not config.progress
        for item, crystal in tqdm(crystals, "writing", len(data), unit=" crystals", disable=quiet):
            if isinstance(crystal, BadCrystal):
                raise ValueError(f"{data.root}: {crystal}")
            if item not in first:
                writer.add(splits[item], crystal, fold=data.fold_of(item))
        report = _report(data, references, found, config)
        write_text(writer.directory / REPORT, json.dumps(report, indent=1, ensure_ascii=False))
        write_text(writer.directory / MATCHES, _table([_COLUMNS, *_rows(found, sets, splits)]))
        listed = (
            (first[item]["id"], source, reason, f"the same as {first[item]['other_id']}")
            for item, reason in reasons.items()
        )
        dropped = (Path(data.root) / DROPPED).read_bytes().decode() + _table(listed)
        write_text(writer.directory / DROPPED, dropped)
        if (warnings := Path(data.root) / WARNINGS).is_file():
            write_text(writer.directory / WARNINGS, warnings.read_text("utf-8"))
        counts = Counter(before["dropped"]) + Counter(reasons.values())
        return writer.finish(
            {
                **before,
                "request": request,
                "kept": len(writer),
                "dropped": dict(sorted(counts.items())),
                "dedup": {**report, "undecided": len(found.undecided)},
            }
        )


def _splits_of(dataset: Dataset) -> list[str]:
    """Split of every item."""
    return [s for s in SPLITS for _ in range(dataset.manifest.splits[s])]


def _reason(match: Mapping[str, Any], references: Sequence[Reference]) -> str:
    if match["set"] == WITHIN:
        return "duplicate within the set"
    return f"duplicate of {references[match['set']].name}"


def _report(
    data: Dataset,
    references: Sequence[Reference],
    found: Found,
    config: PrepareConfig,
) -> dict[str, Any]:
    """What was searched, how, and what was found: `dedup.json`."""

    def tell(number: int) -> dict[str, int]:
        matches = [m for m in found.matches if m["set"] == number]
        return {
            "duplicates": len(matches),
            "of_its_crystals": len({m["other"] for m in matches}),
            "by_id": sum(m["by"] == "id" for m in matches),
            "by_id_without_match": sum(m["by"] == "id" and m["rms"] is None for m in matches),
        }

    splits = _splits_of(data)
    dropped = Counter(splits[item] for item in {m["item"] for m in found.matches})
    names = [r.name for r in references] + ["the set itself"]
    return {
        "method": "same reduced formula, then pymatgen's StructureMatcher (DAO, Algorithm 2)",
        "settings": asdict(config.duplicates),
        "versions": _versions(),
        "input": {"sources": data.manifest.provenance["sources"], "crystals": data.manifest.splits},
        "references": [
            {"name": r.name, **r.origin, "crystals": len(r.items), **tell(number)}
            for number, r in enumerate(references)
        ],
        "within": tell(WITHIN) if config.duplicates.within else None,
        "dropped": {s: dropped[s] for s in SPLITS},
        "kept": {s: data.manifest.splits[s] - dropped[s] for s in SPLITS},
        "pairs": {k: found.pairs[k] for k in ("formula", "sites", "compared", "matched")},
        "undecided": [{**u, "set": names[u["set"]]} for u in found.undecided],
    }


def _rows(
    found: Found, sets: Mapping[int, tuple[str, Sequence[str]]], splits: Sequence[str]
) -> Iterator[Sequence[Any]]:
    """The rows of `matches.csv`: one for each duplicate and set that has it."""
    for m in found.matches:
        name, there = sets[m["set"]]
        numbers = ["" if m[k] is None else f"{m[k]:.6f}" for k in ("rms", "largest")]
        own = (m["id"], splits[m["item"]], m["formula"])
        yield (*own, name, m["other_id"], there[m["other"]], m["by"], *numbers)


def _table(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV text."""
    text = io.StringIO()
    write = row_writer(text)
    for row in rows:
        write(row)
    return text.getvalue()
