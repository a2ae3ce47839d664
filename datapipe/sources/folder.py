"""Folders and archives of CIF and POSCAR files, with or without `id_prop.csv`."""

from __future__ import annotations

import csv
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from crysforge.datapipe.crystals.crystal import BadCrystal
from crysforge.datapipe.sources.base import (
    MAYBE,
    NO,
    SOURCES,
    Look,
    Options,
    Payload,
    Raw,
    check_size,
)

_SUFFIXES = (".cif", ".vasp", ".poscar", ".contcar")
_PLAIN = ("POSCAR", "CONTCAR")


def is_structure(name: str) -> bool:
    """Whether a file name is that of a CIF or POSCAR."""
    base = name.rsplit("/", 1)[-1]
    return not base.startswith(".") and (
        base.lower().endswith(_SUFFIXES) or base.upper().startswith(_PLAIN)
    )


def _likes(look: Look) -> int:
    if look.path.is_dir() or look.suffix in (".zip", ".tar"):
        return MAYBE
    return MAYBE if is_structure(look.path.name) else NO


@SOURCES.register("folder", _likes)
def read_folder(path: Path, options: Options) -> Iterator[Raw]:
    """A folder (searched through), `.zip` or `.tar(.gz)` of CIF and POSCAR files, or one such file.

    With an `id_prop.csv` (headerless `file,label[,label…]`; the suffix of the file may be left
    out), the crystals are those it lists, in its order (in a tar: in the archive's), and `targets`
    names its columns; a header line is understood too. Without one, all files are taken, sorted by
    name and unlabelled. Ids are file names without suffix; `a/POSCAR` has the id `a`.
    """
    if path.is_dir():
        names = sorted(_walk(path))
        read: Callable[[str], str] = lambda n: (path / n).read_text(encoding="utf-8-sig")  # noqa: E731
        yield from _list(path, names, lambda n: ("file", str(path / n)), read, options)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = sorted(n for n in archive.namelist() if not n.startswith("__MACOSX"))
            read = lambda n: _zipped(archive, n)  # noqa: E731
            yield from _list(path, names, lambda n: ("member", (str(path), n)), read, options)
    elif tarfile.is_tarfile(path):
        yield from _read_tar(path, options)
    else:
        yield Raw(_id(path.name), path.name, ("file", str(path)))


def _walk(path: Path) -> Iterator[str]:
    for folder, _, files in os.walk(path):
        for name in files:
            yield (Path(folder) / name).relative_to(path).as_posix()


def _list(
    path: Path,
    names: list[str],
    payload: Callable[[str], Payload],
    read: Callable[[str], str],
    options: Options,
) -> Iterator[Raw]:
    files = [n for n in names if is_structure(n)]
    table = next((n for n in names if _is_table(n)), None)
    if table is None:
        if not files:
            raise ValueError(f"{path} holds no structure files ({', '.join(_SUFFIXES)}, POSCAR…)")
        for name in files:
            yield Raw(_id(name), f"{path.name}/{name}", payload(name))
        return
    properties = Properties.parse(read(table), table, options, files)
    places = _places(n for n in names if n != table)
    listed = set()
    for number, (key, labels) in enumerate(properties.rows, start=1):
        place = places.get(key)
        where = f"{path.name}/{place or f'{table} line {number + properties.header}'}"
        if place is None:
            absent = (f"{table} lists {key!r}, but there is no such file", "missing file")
            yield Raw(_id(key), where, ("bad", absent), labels)
        else:
            listed.add(place)
            yield Raw(_id(key), where, payload(place), labels)
    for name in files:
        if name not in listed:
            yield _unlisted(path, name, table)


def _read_tar(path: Path, options: Options) -> Iterator[Raw]:
    """Reads a tar in one go, as its compression wants; its table, if any, in a first one."""
    table = None
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile() and _is_table(member.name):
                text = _content(tar, member).decode("utf-8-sig")
                table = Properties.parse(text, member.name, options)
                break
    labels: dict[str, Mapping[str, Any]] = {}
    again = []
    for listed, values in table.rows if table else ():
        if labels.setdefault(listed, values) is not values:
            again.append(listed)
    found, count = set(), 0
    with tarfile.open(path) as tar:
        for member in tar:
            name, count = member.name, count + 1
            keys = _keys(name)
            key = next((k for k in keys if k in labels), None)
            if not member.isfile() or (key is None and not is_structure(name)):
                continue
            if table and key is None:
                yield _unlisted(path, name, table.name)
                continue
            try:
                text = _content(tar, member).decode("utf-8", errors="replace")
                payload: Payload = ("text", text)
            except BadCrystal as error:
                payload = ("bad", (str(error), error.reason))
            found.add(key)
            yield Raw(_id(key or name), f"{path.name}/{name}", payload, labels.get(key or "", {}))
    for key in labels:
        if key not in found:
            absent = (
                f"{table.name if table else ''} lists {key!r}, but there is no such file",
                "missing file",
            )
            yield Raw(_id(key), path.name, ("bad", absent), labels[key])
    for key in again:
        twice = (f"{table.name if table else ''} lists {key!r} twice", "duplicate id")
        yield Raw(_id(key), path.name, ("bad", twice), labels[key])
    if not found and not labels:
        raise ValueError(f"{path} holds no structure files ({', '.join(_SUFFIXES)}, POSCAR…)")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """What a regular member holds; its size may be a sparse file's. Nothing is written anywhere."""
    check_size(member.name, member.size)
    return tar.extractfile(member).read()  # type: ignore[union-attr]


def _zipped(archive: zipfile.ZipFile, name: str) -> str:
    check_size(name, archive.getinfo(name).file_size)
    return archive.read(name).decode("utf-8-sig")


def _unlisted(path: Path, name: str, table: str) -> Raw:
    message = f"{table} does not list it"
    return Raw(_id(name), f"{path.name}/{name}", ("skip", (message, "not listed")))


def _id(name: str) -> str:
    path = PurePosixPath(name)
    if path.name.upper() in _PLAIN and path.parent.name:
        return path.parent.name
    return path.name[: -len(path.suffix)] if path.suffix.lower() in _SUFFIXES else path.name


def _keys(name: str) -> list[str]:
    """What `id_prop.csv` may call a file, the most exact first."""
    path = PurePosixPath(name)
    keys = [name, path.name, _id(name)]
    return [*keys, str(path.with_suffix(""))] if path.suffix.lower() in _SUFFIXES else keys


def _places(names: Iterable[str]) -> dict[str, str]:
    """File by what it may be called; an exact name wins over a shortened one."""
    places: dict[str, str] = {}
    named = [(n, _keys(n)) for n in names]
    for rank in range(4):
        for name, keys in named:
            if rank < len(keys):
                places.setdefault(keys[rank], name)
    return places


def _is_table(name: str) -> bool:
    base = name.rsplit("/", 1)[-1].lower()
    return base.startswith("id_prop") and base.endswith(".csv")


@dataclass(frozen=True)
class Properties:
    """The content of an `id_prop.csv`."""

    name: str
    header: int
    """1 if the first line names the columns."""
    rows: list[tuple[str, Mapping[str, Any]]]
    """File (or id) and labels."""

    @classmethod
    def parse(cls, text: str, name: str, options: Options, files: Iterable[str] = ()) -> Properties:
        """Reads the table; `targets` names the label columns of a headerless one.

        Raises:
            ValueError: a different number of targets than columns, or rows of unequal length.
        """
        rows = [[x.strip() for x in row] for row in csv.reader(text.splitlines()) if any(row)]
        if not rows:
            raise ValueError(f"{name} is empty: it must hold lines 'file,label'")
        width = len(rows[0])
        for number, row in enumerate(rows, start=1):
            if len(row) != width:
                raise ValueError(f"{name} line {number} has {len(row)} fields, line 1 has {width}")
        header = rows[0][0].lower() in ("id", "file", "filename", "material_id", "jid", "name")
        columns = width - 1
        if header:
            labels = rows.pop(0)[1:]
        elif options.targets and columns:
            labels = list(options.targets)
            if len(labels) != columns:
                raise ValueError(
                    f"{name} has {columns} label column(s) without names, targets names "
                    f"{len(labels)}: name each column once, in order"
                )
        else:
            labels = ["target"] if columns == 1 else [f"target_{i}" for i in range(1, width)]
        return cls(
            name, int(header), [(row[0], dict(zip(labels, row[1:], strict=True))) for row in rows]
        )
