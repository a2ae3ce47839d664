"""The files in a folder, zip or tar, without what is hidden; links are followed as far as it
reaches."""

from __future__ import annotations

import os
import posixpath
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from crysforge.datapipe.crystals.crystal import BadCrystal
from crysforge.datapipe.sources.base import Payload
from crysforge.datapipe.sources.file_names import is_hidden, is_structure
from crysforge.datapipe.sources.texts import check_size


class Files:
    """What lies in a folder or archive.

    Attributes:
        path: of it.
        names: of its files, by their paths within; those of a folder or zip are sorted.
        aliases: paths by way of links → the files in `names` that they lead to.
        links: these links.
        left_out: links that are not followed: out of the input, or nowhere.
        no_files: pipes and devices.
        in_order: whether files can only be read in the order of `names`.
    """

    in_order = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.aliases: dict[str, str] = {}
        self.links: list[str] = []
        self.left_out: list[str] = []
        self.no_files: list[str] = []

    def read(self, name: str) -> bytes:
        """The content of a small file. Raises BadCrystal if it is not small."""
        raise NotImplementedError

    def payload(self, name: str) -> Payload:
        """What a crystal is parsed from."""
        raise NotImplementedError

    def payloads(self) -> Iterator[tuple[str, Payload]]:
        """All structure files with their payloads."""
        for name in self.names:
            if is_structure(name):
                yield name, self.payload(name)

    def where(self, name: str) -> str:
        """A file's place, for messages."""
        return f"{self.path.name}/{name}"

    def _alias(self, link: str, paths: dict[str, str]) -> None:
        self.aliases |= paths
        self.links.append(link)

    def _resolve(self, links: dict[str, str], places: dict[str, str]) -> None:
        """Sorts links within an archive. A link to a structure file, or to a folder of some, is
        another name for it; one to any other file of the archive is a file of its own.

        Args:
            links: link → path that it leads to. places: file → what it is called in the archive.
        """
        folders = {n[: i + 1] for n in places for i, c in enumerate(n) if c == "/"}
        for link, target in links.items():
            place = posixpath.normpath(target)
            if place in places and is_structure(place):
                self._alias(link, {link: place})
            elif place in places:
                places[link] = places[place]
            elif f"{place}/" in folders:
                inside = [n for n in self.names if n.startswith(f"{place}/")]
                self._alias(link, {link + n.removeprefix(place): n for n in inside})
            else:
                self.left_out.append(link)
        self.names = list(dict.fromkeys([*self.names, *(n for n in links if n in places)]))


class Folder(Files):
    """A folder, searched through.

    Args:
        follow: whether links that lead out of it are followed, too.

    Raises:
        OSError: a folder that may not be read.
    """

    def __init__(self, path: Path, follow: bool = False) -> None:
        super().__init__(path)
        self._root, self._follow = path.resolve(), follow
        self._seen: dict[Path, str] = {}
        self._waiting: list[str] = []
        self._scan("")
        known = set(self.names)
        while self._waiting:
            self._add_link(self._waiting.pop(0), known)
        self.names.sort()

    def _scan(self, start: str) -> None:
        """Adds the files of a folder and of those in it; notes links for later."""
        folders = [start]
        while folders:
            folder = folders.pop()
            self._seen.setdefault((self.path / folder).resolve(), folder)
            with os.scandir(self.path / folder) as entries:
                for entry in sorted(entries, key=lambda e: e.name):
                    name = posixpath.join(folder, entry.name)
                    if is_hidden(entry.name):
                        continue
                    if entry.is_symlink():
                        self._waiting.append(name)
                    elif entry.is_dir():
                        folders.append(name)
                    elif entry.is_file():
                        self.names.append(name)
                    else:
                        self.no_files.append(name)

    def _add_link(self, link: str, known: set[str]) -> None:
        try:
            target = (self.path / link).resolve()
        except (OSError, RuntimeError):  # a link to itself
            self.left_out.append(link)
            return
        outside = not target.is_relative_to(self._root)
        own = "" if outside else target.relative_to(self._root).as_posix()
        if not target.exists() or (outside and not self._follow):
            self.left_out.append(link)
        elif target.is_file():
            if own in known and is_structure(own):
                self._alias(link, {link: own})
            else:
                self.names.append(link)
        elif target in self._seen:
            inside = f"{self._seen[target]}/".lstrip("/")
            names = [n for n in self.names if n.startswith(inside)]
            self._alias(link, {f"{link}/{n.removeprefix(inside)}": n for n in names})
        elif target.is_dir():
            self._scan(link)

    def read(self, name: str) -> bytes:
        check_size(name, (self.path / name).stat().st_size)
        return (self.path / name).read_bytes()

    def payload(self, name: str) -> Payload:
        return "file", str(self.path / name)


class Zip(Files):
    """A zip, which stays open while it is used."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._zip = zipfile.ZipFile(path)
        self._places: dict[str, str] = {}
        links: dict[str, str] = {}
        for entry in self._zip.infolist():
            name = _within(entry.filename)
            if entry.is_dir() or is_hidden(name):
                continue
            if stat.S_ISLNK(entry.external_attr >> 16):
                with suppress(UnicodeDecodeError, BadCrystal):
                    target = self._content(entry.filename).decode()
                    links[name] = posixpath.join(posixpath.dirname(name), target)
            else:
                self._places[name] = entry.filename
        self.names = sorted(self._places)
        self._resolve(links, self._places)

    def _content(self, place: str) -> bytes:
        check_size(place, self._zip.getinfo(place).file_size)
        return self._zip.read(place)

    def read(self, name: str) -> bytes:
        return self._content(self._places[name])

    def payload(self, name: str) -> Payload:
        return "member", (str(self.path), self._places[name])


class Tar(Files):
    """A tar, which is read from front to back, as its compression wants."""

    in_order = True

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._places: dict[str, str] = {}
        links: dict[str, str] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                name = _within(member.name)
                if is_hidden(name):
                    continue
                if member.isfile():
                    self._places[name] = member.name
                elif member.islnk():
                    links[name] = _within(member.linkname)
                elif member.issym():
                    links[name] = posixpath.join(posixpath.dirname(name), member.linkname)
                elif not member.isdir():
                    self.no_files.append(name)
        self.names = list(self._places)
        self._resolve(links, self._places)

    def read(self, name: str) -> bytes:
        with tarfile.open(self.path) as tar:
            return _content(tar, tar.getmember(self._places[name]))

    def payloads(self) -> Iterator[tuple[str, Payload]]:
        called: dict[str, list[str]] = {}
        for name in filter(is_structure, self.names):
            called.setdefault(self._places[name], []).append(name)
        with tarfile.open(self.path) as tar:
            for member in tar:
                names = called.pop(member.name, []) if member.isfile() else []
                if not names:
                    continue
                try:
                    data = _content(tar, member)
                except BadCrystal as error:
                    yield from ((n, ("bad", (str(error), error.reason))) for n in names)
                    continue
                yield from ((name, ("content", (name, data))) for name in names)


def open_files(path: Path, follow: bool = False) -> Files | None:
    """The files of a folder or archive; None for any other file."""
    if path.is_dir():
        return Folder(path, follow)
    if zipfile.is_zipfile(path):
        return Zip(path)
    return Tar(path) if tarfile.is_tarfile(path) else None


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """What a regular member holds; its size may be a sparse file's. Nothing is written anywhere."""
    check_size(member.name, member.size)
    return tar.extractfile(member).read()  # type: ignore[union-attr]


def _within(name: str) -> str:
    """A member's path as it is in an unpacked archive."""
    return name.removeprefix("./").lstrip("/")
