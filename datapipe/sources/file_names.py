"""Names of structure files: which are some, what ids they give, and what a table may call them."""

from __future__ import annotations

import itertools
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath

SUFFIXES = (".cif", ".mcif", ".vasp", ".poscar", ".contcar")
PACKED = (".gz", ".bz2", ".xz")
"""Suffixes of compressed files."""
_PLAIN = ("POSCAR", "CONTCAR")
_CLUTTER = {"__macosx", "thumbs.db", "desktop.ini", "icon\r"}
"""What file managers leave behind, in lower case."""


def is_hidden(name: str) -> bool:
    """Whether a path within a folder or archive is hidden, or what a file manager left there."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return any(part.startswith((".", "~$")) or part.lower() in _CLUTTER for part in parts)


def without_packing(name: str) -> str:
    """A file's name without the suffix of its compression."""
    packed = name.lower().endswith(PACKED)
    return name.rpartition(".")[0] if packed else name


def is_structure(name: str) -> bool:
    """Whether a file name is that of a CIF or POSCAR, compressed or not."""
    base = without_packing(name.rsplit("/", 1)[-1])
    return not base.startswith(".") and (
        base.lower().endswith(SUFFIXES) or base.upper().startswith(_PLAIN)
    )


def names_file(cell: str) -> bool:
    """Whether a text is the name of a structure file."""
    return len(cell) < 1000 and "\n" not in cell.strip() and is_structure(cell.strip())


def short_id(name: str) -> str:
    """The id that a file's name gives: without folders and suffix; of `a/POSCAR` it is `a`."""
    return PurePosixPath(_place(name)).name


def ids_of(names: Iterable[str]) -> dict[str, str]:
    """Ids of all files by their paths: `short_id` where these differ, else the paths without what
    all have in common (`mat0/relax/structure.cif`, `mat1/relax/structure.cif`: mat0, mat1).

    Files at one place (`a.cif` and `a.vasp`, `a/POSCAR` and `a/CONTCAR`) share their id.
    """
    places = {name: _place(name) for name in names}
    every = {place: PurePosixPath(place).parts for place in places.values()}
    if len({parts[-1] for parts in every.values()}) == len(every):
        return {name: every[place][-1] for name, place in places.items()}
    head = _in_common(list(every.values()))
    tail = _in_common([parts[head:][::-1] for parts in every.values()])
    return {
        name: "/".join(every[place][head : len(every[place]) - tail])
        for name, place in places.items()
    }


def _in_common(every: Sequence[Sequence[str]]) -> int:
    """How many first parts all paths share; one part of each is left over."""
    count, least = 0, min(map(len, every))
    while count < least - 1 and len({parts[count] for parts in every}) == 1:
        count += 1
    return count


def _place(name: str) -> str:
    """A path without the suffixes of a structure file; of `a/POSCAR` the folder."""
    path = PurePosixPath(without_packing(name))
    if path.name.upper() in _PLAIN and path.parent.name:
        return str(path.parent)
    return str(path.with_suffix("")) if path.suffix.lower() in SUFFIXES else str(path)


class Names:
    """Files, or records, by what a table may call them: an exact name goes before a shortened one,
    and that before one in other letters. What several may be called is no name.

    Args:
        ids: id of each file by its path; of records, each id by itself.
        aliases: further paths of files, links that lead to them.
    """

    def __init__(self, ids: Mapping[str, str], aliases: Mapping[str, str] | None = None) -> None:
        self.ids = ids
        levels = zip(*(name.split("/")[:-1] for name in ids), strict=False)
        shared = itertools.takewhile(lambda level: len(set(level)) == 1, levels)
        self._head = "/".join(level[0] for level in shared)
        self._by: dict[str, str | None] = {}
        self._by_path: dict[str, str | None] = {}
        self._by_number: dict[str, str | None] = {}
        spelt = [(name, _spellings(name, id)) for name, id in ids.items()]
        spelt += [(n, _spellings(alias, "")[:_PATHS]) for alias, n in (aliases or {}).items()]
        for rank in range(_SPELLINGS):
            _add(self._by, ((s[rank], name) for name, s in spelt if rank < len(s)))
            if rank < _PATHS or rank == _SPELLINGS - 1:
                _add(self._by_path, ((s[rank], name) for name, s in spelt if rank < len(s)))
        _add(self._by, ((s.casefold(), name) for name, all in spelt for s in all))
        numbers = ((_number(s), name) for name, all in spelt for s in all if _number(s))
        _add(self._by_number, numbers)

    def find(self, key: str) -> str | None:
        """The path of the file that a table calls so; None if there is none, or several."""
        key = _normal(key)
        found = self._by.get(key)
        return found if found is not None else self._by.get(key.casefold())

    def find_number(self, key: str) -> str | None:
        """As `find`, where the table lost leading zeros or gained `.0`, as spreadsheets do it."""
        return self._by_number.get(_number(_normal(key)))

    def _below(self, folder: str, key: str) -> str | None:
        return self._by_path.get(posixpath.join(folder, _normal(key)))

    def _without_head(self, folders: int, key: str) -> str | None:
        return self._by_path.get(_normal(key).split("/", folders)[-1])

    def match(self, keys: Sequence[str], folder: str = "") -> list[str | None]:
        """The path of each file that a table lists; None for what is no file.

        One way of reading holds for all keys, the first that finds a file: as they are, relative to
        the table's own `folder` or one above it or above all files, as paths without their first
        folders. Where more are found as numbers, they are numbers.
        """
        deepest = max((_normal(k).count("/") for k in keys[:1000]), default=0)
        finds: list[Callable[[str], str | None]] = [self.find]
        finds += [
            partial(self._below, above)
            for above in dict.fromkeys([*_above(folder), *_above(self._head)])
        ]
        finds += [partial(self._without_head, skip) for skip in range(1, deepest + 1)]
        found: list[str | None] = [None] * len(keys)
        for find in finds:
            found = [find(k) for k in keys]
            if any(found):
                break
        numbers = [self.find_number(k) for k in keys]
        return numbers if len(set(numbers)) > len(set(found)) else found


def _above(folder: str) -> list[str]:
    """A folder and those that it lies in, without the top."""
    path = PurePosixPath(folder)
    return [str(p) for p in (path, *path.parents) if p.name]


def _add(by: dict[str, str | None], pairs: Iterable[tuple[str, str]]) -> None:
    """Adds spellings that no file had before; one that files of several places share is nobody's.
    Of files at one place the first has it."""
    new: dict[str, str | None] = {}
    for spelling, name in pairs:
        known = new.setdefault(spelling, name)
        if known is not None and known != name and _place(known) != _place(name):
            new[spelling] = None
    for spelling, found in new.items():
        by.setdefault(spelling, found)


_SPELLINGS, _PATHS = 9, 3
"""Spellings of a file's name, the first of which are paths, and so is the last, its folder's."""


def _spellings(name: str, id: str) -> list[str]:
    """What a table may call a file, the most exact first."""
    name = _normal(name)
    bare, base = without_packing(name), name.rsplit("/", 1)[-1]
    place = _place(name)
    short = PurePosixPath(place).name
    plain = re.sub(r"^(?:POSCAR|CONTCAR)[._-]+", "", short, flags=re.IGNORECASE)
    folder = str(PurePosixPath(name).parent)
    return [name, bare, place, base, without_packing(base), short, _normal(id), plain, folder]


def _normal(name: str) -> str:
    """One spelling for a path: composed characters, slashes, no `./` in front or `..` within."""
    name = unicodedata.normalize("NFC", name.strip()).replace("\\", "/")
    return posixpath.normpath(name) if "./" in name or "//" in name else name


def _number(name: str) -> str:
    """A whole number without leading zeros; empty for anything else."""
    found = re.fullmatch(r"0*(\d+)(?:\.0+)?", name)
    return found[1] if found else ""
