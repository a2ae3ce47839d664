"""Space-group symbols in any spelling to the tabulated settings that they may mean."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

import gemmi

from crysforge.datapipe.cif.groups.operations import SymmetryGroup, group_of_entry

_DOUBLE_GLIDES = {
    39: "aem2 bme2 b2em c2me cm2e ae2m",
    41: "aea2 bbe2 b2eb c2ce cc2e ae2a",
    64: "cmce ccme aema aeam bbem bmeb",
    67: "cmme aemm bmem",
    68: "ccce aeaa bbeb",
}
"""Symbols with the glide e (International Tables A, table 1.5.4.4), by space-group number."""

_MONOCLINIC = range(3, 16)
_CUBIC = 195
_LONGEST = 200
"""Characters of a symbol with remarks."""
_UNTABULATED = re.compile(r"[()]|a\)?$")
"""CCP4's names for shifted origins, which no file means."""

_WORD = r"(?:[a-z]{3}|\bno\b|@|#)"
_REMARK = re.compile(
    rf"\{{[^{{}}]*{_WORD}[^{{}}]*\}}|\[[^\[\]]*{_WORD}[^\[\]]*\]|\([^()]*{_WORD}[^()]*\)"
    r"|[,;#].*$|\bno\.? ?\d+.*$| \(\d{2,3}\)\s*$",
    re.I,
)
"""Words beside a symbol. A shift of the origin (`(x+1/4,y,z)`, `(a)`) is none: it stays unknown."""
_NUMBER = re.compile(r"(?:#|\bno\.?) ?(\d{1,3})\b| \((\d{2,3})\)\s*$", re.I)
_SCREW = re.compile(r"21|3[12]|4[123]|6[1-5]")
_ORIGIN = re.compile(r"(?:origin|choice|setting)\D{0,12}([12])\b", re.I)
_CENTRE = re.compile(r"origin.{0,6}(?:centre|center|-1\b)|cent(?:er|re) of symmetry", re.I)
_SUFFIXES = (
    (re.compile(r"^(.+?):o?r?([12])$"), r"\2"),
    (re.compile(r"^(.+?):([hr])x?$"), r"\2"),
    (re.compile(r"^(.+?):(-?[abc123-]+)$"), r"\2"),
    (re.compile(r"^(.+?)(?:s|or?1)$"), "1"),
    (re.compile(r"^(.+?)(?:z|or?2)$"), "2"),
    (re.compile(r"^(r.+?)(h|r)$"), r"\2"),
    (re.compile(r"^(.+?)([12])$"), r"\2"),
)
"""Ends of a symbol without spaces that choose an origin or axes, the surest first."""


@dataclass(frozen=True)
class Setting:
    """A tabulated setting of a space group."""

    number: int
    hall: str
    hm: str
    extension: str
    """1 or 2 (origin), h or r (axes), or nothing."""
    qualifier: str
    """The axes, as in International Tables: b1, -c2, cab."""

    @property
    def name(self) -> str:
        """The symbol with its extension: `F d -3 m :2`."""
        return f"{self.hm} :{self.extension.upper()}" if self.extension else self.hm

    @property
    def has_unique_a(self) -> bool:
        """Whether it is monoclinic with unique axis a."""
        return self.number in _MONOCLINIC and "a" in self.qualifier

    @property
    def group(self) -> SymmetryGroup:
        """Its operations."""
        return group_of_entry(self.hall)


def settings_of_number(number: int) -> tuple[Setting, ...]:
    """All tabulated settings of a space-group type, the standard one first."""
    return _by_number().get(number, ())


@lru_cache(maxsize=4096)
def settings_of_symbol(symbol: str) -> tuple[Setting, ...]:
    """The settings that a Hermann-Mauguin symbol may mean, with whatever setting and origin it
    names: by a suffix (`:2`, `:H`, ` S`, ` Z`, ` O1`) or a remark (`{origin @ centre}`). None if
    the symbol is unknown.

    A short monoclinic symbol names no axis; `P 21/c` may be `P 1 21/c 1` or `P 21/c 1 1`.
    """
    if len(symbol) > _LONGEST:
        return ()
    remarks = " ".join(_REMARK.findall(symbol))
    said = _REMARK.sub(" ", symbol)
    found, extension = _look_up(_plain(said))
    screws = [word for word in said.replace("_", " ").split()[1:] if _SCREW.fullmatch(word)]
    found = tuple(s for s in found if all(_has_word(s, word) for word in screws))
    if not extension and (match := _ORIGIN.search(remarks)):
        extension = match[1]
    elif not extension and _CENTRE.search(remarks):
        extension = "2"
    return choose(found, extension)


def _has_word(setting: Setting, word: str) -> bool:
    """Whether a screw axis that the file writes apart is one of the setting's: `P 31 2` is not
    `P 3 1 2`."""
    return any(part.split("/")[0] == word for part in _full_symbol(setting).split())


def number_in_symbol(symbol: str) -> int | None:
    """The number that a symbol is followed by: 225 for `F m -3 m (No. 225)`."""
    match = _NUMBER.search(symbol)
    return int(match[1] or match[2]) if match else None


def choose(settings: tuple[Setting, ...], extension: str | None) -> tuple[Setting, ...]:
    """Those with an extension or qualifier (`2`, `h`, `b1`, `2cab`); all if it says nothing that
    tells them apart."""
    if not extension:
        return settings
    wanted = extension.lower()
    found = [s for s in settings if wanted in (s.extension, s.qualifier, s.extension + s.qualifier)]
    return tuple(found) or settings


def number_of_schoenflies(symbol: str) -> int | None:
    """The space-group number of a Schoenflies symbol (`Oh^5`, `D6h^4`, `C2h.5`, `Oh5`)."""
    plain = re.sub(r"[^a-z0-9^]", "", symbol.lower().replace(".", "^"))
    return _by_schoenflies().get(plain if "^" in plain else re.sub(r"(\d+)$", r"^\1", plain))


def _plain(symbol: str) -> str:
    """A symbol in lower case without spaces, with `-` before what bears a bar."""
    text = unicodedata.normalize("NFKD", symbol).translate(_DASHES)
    text = re.sub(r"(\d)[\u0304\u0305\u00af]", r"-\1", text)
    text = re.sub(r"\\(?:bar|overline)\s*\{?\s*(\d)\s*\}?", r"-\1", text)
    text = re.sub(r"bar\s*\(?(\d)\)?|(\d)\s*bar", r"-\1\2", text, flags=re.I)
    text = re.sub(r"</?su[bp]>|[_{}$^'\"\s*]", "", text.lower())
    text = re.sub(r"([2346])\(([1-5])\)", r"\1\2", text)
    return re.sub(r"([1346])-(?=[a-z]|$)", r"-\1", text)  # Fm3-m: the bar behind its digit


_DASHES = {ord(c): "-" for c in "\u2010\u2011\u2012\u2013\u2014\u2212~"}


def _look_up(plain: str) -> tuple[tuple[Setting, ...], str]:
    names = _by_name()
    if plain in names:
        return names[plain], ""
    for pattern, extension in _SUFFIXES:
        match = pattern.match(plain)
        if match and match[1].rstrip(":") in names:
            found = names[match[1].rstrip(":")]
            said = match.expand(extension)
            if choose(found, said) != found or len(found) == 1:
                return found, said
    return (), ""


@lru_cache(maxsize=1)
def _table() -> tuple[tuple[Setting, str], ...]:
    """Settings and their full symbols (`F 4/m -3 2/m`), those of International Tables first."""
    import spglib

    found = []
    for place, entry in enumerate(gemmi.spacegroup_table()):
        if place >= _ITB and _UNTABULATED.search(entry.hm):
            continue
        kind = spglib.get_spacegroup_type(place + 1) if place < _ITB else None
        full = kind.international_full.replace("_", "") if kind else ""
        extension = entry.ext.strip("\x00").lower()
        qualifier = entry.qualifier.lower()
        found.append((Setting(entry.number, entry.hall, entry.hm, extension, qualifier), full))
    return tuple(found)


@lru_cache(maxsize=4096)
def _full_symbol(setting: Setting) -> str:
    return f"{setting.hm} {next(full for one, full in _table() if one == setting)}"


_ITB = 530
"""Settings in International Tables B, table A1.4.2.7, which both libraries list in its order."""


@lru_cache(maxsize=1)
def _by_name() -> dict[str, tuple[Setting, ...]]:
    found: dict[str, dict[Setting, None]] = {}
    for setting, full in _table():
        for name in _names(setting, full):
            found.setdefault(re.sub(r"\s", "", name.lower()), {})[setting] = None
    return {name: tuple(settings) for name, settings in found.items()}


def _names(setting: Setting, full: str) -> list[str]:
    """The spellings of a setting's symbol, in any case and with any spaces."""
    second = setting.number in (67, 68) and "-" in setting.qualifier  # C m m b: C m m e is C m m a
    names = [setting.hm, full] if full and not (second and "e" in full) else [setting.hm]
    parts = setting.hm.lower().split()
    if setting.number in _MONOCLINIC and full:
        names.append("".join(p for p in parts if p != "1"))
        if setting.hm in ("B 1 1 2/b", "B 1 1 b"):  # of the tables before 1983
            names.append(setting.hm.replace("1 1 ", ""))
    if setting.number >= _CUBIC:
        names += [name.replace("-3", "3") for name in names]
    double = setting.number in _DOUBLE_GLIDES and not second
    for position in range(1, len(parts) if double else 0):
        name = "".join([*parts[:position], "e", *parts[position + 1 :]])
        if name in _DOUBLE_GLIDES[setting.number].split():
            names.append(name)
    if setting.extension == "h" and setting.hm in ("R 3", "R 3 2"):
        names.append(setting.hm.replace("R", "H"))  # as the Protein Data Bank says
    return names


@lru_cache(maxsize=1)
def _by_number() -> dict[int, tuple[Setting, ...]]:
    found: dict[int, list[Setting]] = {}
    for setting, _ in _table()[:_ITB]:
        found.setdefault(setting.number, []).append(setting)
    return {number: tuple(settings) for number, settings in found.items()}


@lru_cache(maxsize=1)
def _by_schoenflies() -> dict[str, int]:
    import spglib

    kinds = [spglib.get_spacegroup_type(hall) for hall in range(1, _ITB + 1)]
    return {re.sub(r"[^a-z0-9^]", "", k.schoenflies.lower()): k.number for k in kinds if k}
