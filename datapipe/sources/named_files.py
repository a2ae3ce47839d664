"""Structure files that a table names by their paths or ids."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from crysforge.datapipe.sources.base import Look, Options, Payload, Raw
from crysforge.datapipe.sources.delimited import clean, sniff
from crysforge.datapipe.sources.file_names import Names, ids_of, is_structure, names_file
from crysforge.datapipe.sources.files import Files, Folder
from crysforge.datapipe.sources.folder import list_files
from crysforge.datapipe.sources.labels import LabelTable, read_table
from crysforge.datapipe.sources.texts import open_text


class _Named(Files):
    """Files that a table names, relative to its folder."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        super().__init__(folder)
        self.names = sorted(names)

    def payload(self, name: str) -> Payload:
        return "file", str(self.path / name)


def read_named(path: Path, options: Options) -> Iterator[Raw]:
    """The structure files that a table names by their paths or ids, with its labels.

    Raises:
        ValueError: it names none.
    """
    text = _text(path, options)
    named = _names_of_files(text)
    files, outside = _find(path.parent, named, options.follow_links)
    ids, table = _match(path, text, files, options)
    if not table.fits():
        raise ValueError(_without_files(path, text, named, outside))
    if outside:
        options.note(
            f"{len(outside):,} file(s) that {path.name} names ({PurePath(outside[0]).name}, …) lie "
            "outside of its folder; read them with follow_links=true"
        )
    yield from list_files(files, [table], ids, rest=False)


def finds_files(path: Path, options: Options) -> bool:
    """Whether a table names structure files that are there."""
    text = _text(path, options)
    files, _ = _find(path.parent, _names_of_files(text), options.follow_links)
    try:
        return _match(path, text, files, options)[1].fits()
    except ValueError:
        return False


def _text(path: Path, options: Options) -> str:
    with open_text(path, options.note) as file:
        return file.read()


def _match(
    path: Path, text: str, files: Files, options: Options
) -> tuple[dict[str, str], LabelTable]:
    """Ids of files, and the table that names them."""
    ids = ids_of(filter(is_structure, files.names))
    names = Names(ids, files.aliases)
    return ids, read_table(text, path.name, names, options, options.structure_column)


def _names_of_files(text: str) -> list[str]:
    """Cells of a table that are names of structure files."""
    dialect = sniff(text[: 1 << 16], len(text) < 1 << 16)[0][0]
    cells = (clean(c) for row in dialect.rows(io.StringIO(text, newline="")) for c in row)
    return list(dict.fromkeys(c.replace("\\", "/") for c in cells if names_file(c)))


def _find(folder: Path, named: Sequence[str], follow: bool) -> tuple[Files, list[str]]:
    """The files that a table names if all are there, else all beside it; and those that are named
    but lie outside of its folder, unless they may be read."""
    root = folder.resolve()
    outside = [n for n in named if not (folder / n).resolve().is_relative_to(root)]
    allowed = [n for n in named if follow or n not in outside]
    there = [n for n in allowed if (folder / n).is_file()]
    if named and len(there) == len(allowed):
        return _Named(folder, there), [] if follow else outside
    files = Folder(folder, follow)
    if follow:
        files.names += [n for n in outside if n in there]
    return files, [] if follow else outside


def _without_files(path: Path, text: str, named: Sequence[str], outside: Sequence[str]) -> str:
    """What is wrong with a table that names no files that are there."""
    remedy = f"if they are elsewhere, give their folder: input=FOLDER labels={path}"
    if outside:
        return (
            f"{path.name} names files outside of its folder, such as {outside[0]!r}: read them "
            f"with follow_links=true; {remedy}"
        )
    if named:
        first = next((n for n in named if not (path.parent / n).is_file()), named[0])
        where = next((f" in column {c!r}" for c, n in _columns_of(text, first)), "")
        return (
            f"{path.name} holds file names{where}, and {first!r} is not in "
            f"{path.parent.resolve()}: put the files there, or, {remedy}"
        )
    names = Look(path).columns
    return (
        f"{path.name} has no column 'cif': name the column that holds the structure with "
        f"structure_column=…, one of {', '.join(filter(None, names))}; where structures are files, "
        f"give their folder: input=FOLDER labels={path}"
    )


def _columns_of(text: str, cell: str) -> Iterator[tuple[str, int]]:
    """Names of the columns that hold a cell."""
    rows = sniff(text[: 1 << 16], len(text) < 1 << 16)[0][1]
    for i, name in enumerate(rows[0] if rows else ()):
        if any(clean(row[i]) == cell for row in rows[1:] if i < len(row)):
            yield clean(name), i
