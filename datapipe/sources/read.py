"""Reads any input: picks the reader, parses in parallel, says what is wrong with which crystal."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.common.workers import CHUNK, Guard, Workers
from crysforge.datapipe.crystals.cells import AS_GIVEN, Cells
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.crystals.filters import Filters
from crysforge.datapipe.crystals.limits import Limits, check_atoms
from crysforge.datapipe.sources.base import NO, SOURCES, Look, Options, Raw
from crysforge.datapipe.sources.catalog import ORIGIN
from crysforge.datapipe.sources.delimited import same_column
from crysforge.datapipe.sources.join import join
from crysforge.datapipe.sources.parse import parse
from crysforge.datapipe.sources.texts import READ_ERRORS, SAVE_AS_TEXT, WORKBOOKS
from crysforge.datapipe.sources.values import parse_label

AUTO = "auto"


@dataclass(frozen=True)
class Failure:
    """A crystal that is left out, and why."""

    id: str
    where: str
    """File and place in it."""
    reason: str
    """The words that counts are kept under."""
    message: str
    bad: bool = True
    """False where a filter or split that the user chose leaves it out."""
    ends: bool = False
    """Whether nothing can be made of the input until the user says what a label means."""

    def __str__(self) -> str:
        return f"{self.where} (id {self.id!r}): {self.message}"


@dataclass(frozen=True)
class Reading:
    """What is done to each raw record, in whatever process: parse, labels, cell, filters."""

    labels: tuple[str, ...] = ()
    """Labels to keep; those that filters look at are among them."""
    filters: Filters = field(default_factory=Filters)
    cells: Cells = AS_GIVEN
    """The cell that crystals are brought to."""
    extensive: tuple[str, ...] = ()
    """Labels that go with the number of atoms in the cell."""
    doubtful: Mapping[str, str] = field(default_factory=dict)
    """Labels that may do so, and why: they end the reading where a cell is reduced."""
    checks: str = "strict"
    """What to do with a file that contradicts itself."""
    limits: Limits = field(default_factory=Limits)
    """What one crystal may cost while it is read."""

    def __call__(self, raw: Raw | Failure) -> Crystal | Failure:
        if isinstance(raw, Failure):
            return raw
        if raw.payload[0] == "skip":
            message, reason = raw.payload[1]
            return Failure(raw.id, raw.where, reason, message, bad=False)
        try:
            with self.limits.applied():
                return self._read(raw)
        except BadCrystal as error:
            return Failure(raw.id, raw.where, error.reason, str(error))
        except MemoryError:
            return self.lost(raw, f"takes more than {self.limits.memory_gb:g} GB of memory")

    def _read(self, raw: Raw) -> Crystal | Failure:
        crystal = parse(raw.payload, self.checks)
        check_atoms(len(crystal))
        labels = {
            name: crystal.targets[name]
            if name in crystal.targets
            else parse_label(name, raw.labels.get(name))
            for name in self.labels
        }
        crystal = self.cells(replace(crystal, id=raw.id or crystal.id, targets=labels))
        if crystal.copies > 1 and labels:
            if problem := self._doubt(crystal):
                return Failure(crystal.id, raw.where, "label of the cell", problem, ends=True)
            crystal = crystal.with_targets(self._shared(crystal))
        rejected = self.filters.check(crystal)
        return Failure(crystal.id, raw.where, *rejected, bad=False) if rejected else crystal

    def _doubt(self, crystal: Crystal) -> str | None:
        for name, why in self.doubtful.items():
            if not math.isnan(crystal.targets[name]):
                return (
                    f"{name!r} may be a label of the whole cell ({why}), and this cell holds "
                    f"{crystal.copies} primitive ones: give extensive=[{name}] if it goes with the "
                    f"number of atoms, intensive=[{name}] if not, or cell=as_is to reduce no cell"
                )
        return None

    def _shared(self, crystal: Crystal) -> dict[str, float]:
        """The labels of one of the copies."""
        return {
            name: value / crystal.copies if name in self.extensive else value
            for name, value in crystal.targets.items()
        }

    def lost(self, raw: Raw | Failure, reason: str) -> Failure:
        """What stands for a record that cost more than it may."""
        return Failure(
            raw.id,
            raw.where,
            "too costly",
            f"it {reason}: limits.seconds and limits.memory_gb say what a crystal may take",
        )

    def workers(self, count: int) -> Workers[Raw | Failure, Crystal | Failure]:
        """Processes that read within the limits."""
        memory = int(self.limits.memory_gb * 1e9)
        return Workers(self, count, Guard(self.lost, self.limits.seconds, memory))


def guess(path: Path) -> str:
    """The format of an input, by what it looks like.

    Raises:
        ValueError: it does not exist, or looks like no format or several.
    """
    if str(path) != "prototypes" and not path.exists():
        name = str(path).lower().replace("_", "-")
        if name in ORIGIN:
            raise ValueError(
                f"{str(path)!r} is not on this machine. Get it from {ORIGIN[name]} and give the "
                "path as input"
            )
        raise ValueError(f"input {str(path)!r} does not exist{_meant(path)}")
    if path.is_dir() and not any(path.iterdir()):
        raise ValueError(f"{path} is empty: give a folder with structure files")
    try:
        look = Look(path)
        score = {name: SOURCES[name].likes(look) for name in SOURCES}
    except READ_ERRORS as error:
        raise _unreadable(path, error) from None
    if path.suffix.lower() in (".7z", ".rar", ".zst"):
        raise ValueError(f"{path} is packed in a way that is not read: unpack it first")
    if path.suffix.lower() in WORKBOOKS:
        raise ValueError(f"{path} is a workbook: {SAVE_AS_TEXT}")
    best = max(score.values())
    names = [name for name, value in score.items() if value == best]
    if best == NO or len(names) > 1:
        what = "nothing that is known" if best == NO else " and ".join(names)
        raise ValueError(
            f"cannot tell what {path} is: it looks like {what}; give format=…, one of "
            f"{', '.join(SOURCES)}"
        )
    return names[0]


def _meant(path: Path) -> str:
    """What a user may have meant by an input that is not there."""
    if str(path).startswith("~"):
        return f": ~ has no meaning here, give {str(path.expanduser())!r}"
    if "*" in path.name:
        return f": give the folder, {str(path.parent)!r}"
    name = str(path).lower().replace("_", "-").replace(" ", "-")
    word = name.removesuffix(path.suffix.lower())
    sets = difflib.get_close_matches(name, ORIGIN, n=1, cutoff=0.8)
    sets = sets or [s for s in ORIGIN if s.startswith(word) or word.startswith(f"{s}-")]
    sets = sets or difflib.get_close_matches(word, ORIGIN, n=1, cutoff=0.6)
    if len(path.parts) == 1 and sets:
        return f": did you mean the data set {sets[0]!r}? Get it from {ORIGIN[sets[0]]}"
    files = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    alike = difflib.get_close_matches(path.name, files, n=1, cutoff=0.6)
    if alike:
        return f": did you mean {str(path.parent / alike[0])!r}?"
    return "" if path.parent.is_dir() else f": there is no folder {str(path.parent)!r}"


def resolve(input: str, format: str = AUTO) -> str:
    """The reader's name for an input: `format` itself, or a guess if it is "auto" or the name of
    a data set.

    Raises:
        ValueError: unknown format, or see `guess`.
    """
    guessed = guess(Path(input))  # says so if the input does not exist
    if format == AUTO or (format in ORIGIN and format not in SOURCES):
        return guessed
    if format not in SOURCES:
        raise ValueError(f"unknown format {format!r}: {nearest(format, {*SOURCES, *ORIGIN})}")
    return format


def brings_splits(input: str, format: str, options: Options) -> bool:
    """Whether an input says which split each of its records belongs to.

    Args:
        format: a reader's name, from `resolve`.

    Raises:
        ValueError: the input cannot be read.
    """
    try:
        return SOURCES[format].splits(Path(input), options)
    except READ_ERRORS as error:
        raise _unreadable(Path(input), error) from None


def read_raw(input: str, format: str = AUTO, options: Options | None = None) -> Iterator[Raw]:
    """The raw records of an input.

    Raises:
        ValueError: the input does not exist, cannot be read, or holds no crystal.
    """
    path = Path(input)
    options = options or Options()
    source = SOURCES[resolve(input, format)]
    raws = partial(source.read, path, options)
    count = 0
    try:
        for raw in join(raws, Path(options.labels), options) if options.labels else raws():
            yield _as_wanted(raw, options.wanted)
            count += 1
    except READ_ERRORS as error:
        raise _unreadable(path, error) from None
    except ValueError as error:
        text = str(error)
        raise ValueError(text if path.name in text else f"{path}: {text}") from None
    if not count:
        raise ValueError(f"{path} holds no crystals")


def _as_wanted(raw: Raw, wanted: Sequence[str]) -> Raw:
    """A record whose labels have the names that they are asked for by, where those in the file
    differ in case and space alone."""
    other = [name for name in wanted if name not in raw.labels]
    called = {n: f for n in other if (f := same_column(n, raw.labels)) and f not in wanted}
    if not called:
        return raw
    return replace(raw, labels={**raw.labels, **{n: raw.labels[f] for n, f in called.items()}})


def _unreadable(path: Path, error: BaseException) -> ValueError:
    return ValueError(f"cannot read {path}: {str(error) or type(error).__name__}")


def read_crystals(
    input: str,
    format: str = AUTO,
    *,
    targets: Sequence[str] = (),
    options: Options | None = None,
    reading: Reading | None = None,
    workers: int = 0,
    progress: bool = False,
) -> Iterator[Crystal | Failure]:
    """The crystals of any input that `prepare` reads, in the order of the input; in place of each
    that cannot be used, a `Failure` that says why. Ids are unique: later ones with the same id are
    failures.

    Args:
        input: path of a file, archive, folder or prepared data set; or "prototypes".
        format: a reader's name; "auto" guesses.
        targets: labels to read; a missing one is NaN.
        reading: what is done to each record; None takes it as it is, with the targets.
        workers: processes that parse; 0 takes every core. Small inputs are parsed by one.
        progress: whether to show a progress bar, and in the end what there is to say of the input.

    Raises:
        ValueError: the input as a whole cannot be read.
    """
    options = options or Options(targets=tuple(targets), wanted=tuple(targets))
    reading = reading or Reading(tuple(targets), checks=options.checks)
    options = replace(options, max_atoms=reading.limits.atoms)
    raws = read_raw(input, format, options)
    first = list(islice(raws, 2 * CHUNK))
    seen: set[str] = set()
    with reading.workers(1 if len(first) < 2 * CHUNK else workers) as pool:
        results = pool.map(chain(first, raws))
        for result in tqdm(results, desc="reading", unit=" crystals", disable=not progress):
            if isinstance(result, Crystal):
                if result.id in seen:
                    result = Failure(result.id, input, "duplicate id", "the id occurred before")
                seen.add(result.id)
            yield result
    if progress:
        for note in options.notes:
            tqdm.write(f"note: {note}", file=sys.stderr)
