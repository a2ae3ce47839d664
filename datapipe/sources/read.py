"""Reads any input: picks the reader, parses in parallel, says what is wrong with which crystal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

from crysforge.datapipe.common.workers import CHUNK, Guard, Workers
from crysforge.datapipe.crystals.crystal import BadCrystal, Crystal
from crysforge.datapipe.crystals.filters import Filters
from crysforge.datapipe.crystals.limits import Limits, check_atoms
from crysforge.datapipe.sources.base import NO, READ_ERRORS, SOURCES, Look, Options, Raw
from crysforge.datapipe.sources.catalog import ORIGIN
from crysforge.datapipe.sources.parse import parse, parse_label

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

    def __str__(self) -> str:
        return f"{self.where} (id {self.id!r}): {self.message}"


@dataclass(frozen=True)
class Reading:
    """What is done to each raw record, in whatever process: parse, labels, filters."""

    labels: tuple[str, ...]
    """Labels to keep; those that filters look at are among them."""
    filters: Filters
    limits: Limits = field(default_factory=Limits)

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
        crystal = parse(raw.payload)
        check_atoms(len(crystal))
        labels = {
            name: crystal.targets[name]
            if name in crystal.targets
            else parse_label(name, raw.labels.get(name))
            for name in self.labels
        }
        crystal = replace(crystal, id=raw.id or crystal.id, targets=labels)
        rejected = self.filters.check(crystal)
        return Failure(crystal.id, raw.where, *rejected, bad=False) if rejected else crystal

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
        raise ValueError(f"input {str(path)!r} does not exist")
    if path.is_dir() and not any(path.iterdir()):
        raise ValueError(f"{path} is empty: give a folder with structure files")
    try:
        look = Look(path)
        score = {name: SOURCES[name].likes(look) for name in SOURCES}
    except READ_ERRORS as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    best = max(score.values())
    names = [name for name, value in score.items() if value == best]
    if best == NO or len(names) > 1:
        what = "nothing that is known" if best == NO else " and ".join(names)
        raise ValueError(
            f"cannot tell what {path} is: it looks like {what}; give format=…, one of "
            f"{', '.join(SOURCES)}"
        )
    return names[0]


def resolve(input: str, format: str = AUTO) -> str:
    """The reader's name for an input: `format` itself, or a guess if it is "auto" or the name of
    a data set.

    Raises:
        ValueError: unknown format, or see `guess`.
    """
    guessed = guess(Path(input))  # says so if the input does not exist
    if format == AUTO or (format in ORIGIN and format not in SOURCES):
        return guessed
    SOURCES[format]  # says so if there is no such format
    return format


def read_raw(input: str, format: str = AUTO, options: Options | None = None) -> Iterator[Raw]:
    """The raw records of an input.

    Raises:
        ValueError: the input does not exist, cannot be read, or holds no crystal.
    """
    path = Path(input)
    source = SOURCES[resolve(input, format)]
    count = 0
    try:
        for raw in source.read(path, options or Options()):
            yield raw
            count += 1
    except READ_ERRORS as error:
        what = str(error) or type(error).__name__
        raise ValueError(f"cannot read {path}: {what}") from None
    except ValueError as error:
        text = str(error)
        raise ValueError(text if path.name in text else f"{path}: {text}") from None
    if not count:
        raise ValueError(f"{path} holds no crystals")


def read_crystals(
    input: str,
    format: str = AUTO,
    *,
    targets: Sequence[str] = (),
    options: Options | None = None,
    filters: Filters | None = None,
    limits: Limits | None = None,
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
        limits: what one crystal may cost.
        workers: processes that parse; 0 takes every core. Small inputs are parsed by one.
        progress: whether to show a progress bar.

    Raises:
        ValueError: the input as a whole cannot be read.
    """
    options = options or Options(targets=tuple(targets))
    reading = Reading(tuple(targets), filters or Filters(), limits or Limits())
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
