"""Single CIF files, each structure of which is a record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from crysforge.datapipe.cif import structure_names
from crysforge.datapipe.common.text import decode
from crysforge.datapipe.crystals.crystal import BadCrystal
from crysforge.datapipe.sources.base import NO, SOURCES, SURE, Look, Options, Raw
from crysforge.datapipe.sources.texts import check_size

_SUFFIXES = (".cif", ".mcif")


def _likes(look: Look) -> int:
    return SURE if look.path.is_file() and look.suffix in _SUFFIXES else NO


@SOURCES.register("cif", _likes)
def read_cif_file(path: Path, options: Options) -> Iterator[Raw]:
    """A CIF (`.cif`, `.mcif`, compressed or not). The structure has the file's name as id; of
    several, each has `<file>-<data block>`. Blocks without atoms do not count."""
    at = path.name.lower().rfind(".m" if ".mcif" in path.name.lower() else ".cif")
    stem = path.name[:at] or path.name
    try:
        check_size(path.name, path.stat().st_size)
        names = structure_names(decode(path.read_bytes()))
    except (BadCrystal, ValueError):  # whose crystal will be the failure that says it
        names = [""]
    if len(names) == 1:
        yield Raw(stem, path.name, ("file", str(path)))
        return
    seen: Counter[str] = Counter()
    for number, name in enumerate(names):
        seen[name] += 1
        id = f"{stem}-{name}" if seen[name] == 1 else f"{stem}-{name}-{seen[name]}"
        yield Raw(id, f"{path.name} data_{name}", ("block", (str(path), number)))
