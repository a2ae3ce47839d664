"""What of a folder or an archive is not read, in words."""

from __future__ import annotations

from collections.abc import Sequence

from crysforge.datapipe.sources.base import Options
from crysforge.datapipe.sources.file_names import SUFFIXES
from crysforge.datapipe.sources.files import Files
from crysforge.datapipe.sources.texts import SAVE_AS_TEXT, WORKBOOKS

_SHOWN = 5
"""Examples of a long list."""


def tell(files: Files, used: set[str], options: Options) -> None:
    """Notes what is passed over."""
    others = [n for n in files.names if n not in used]
    for what, names in (("other file", others), ("pipe or device", files.no_files)):
        if names:
            options.note(f"passed over {_listed(what, names)}")
    if files.links:
        options.note(f"{_listed('link', files.links)} to what is read anyway: it is read once")
    if files.left_out:
        options.note(f"not followed: {_outside(files)}")


def _outside(files: Files) -> str:
    remedy = "read them with follow_links=true" if files.path.is_dir() else "unpack it"
    return f"{_listed('link', files.left_out)} out of {files.path.name} or to nothing; {remedy}"


def _listed(what: str, names: Sequence[str]) -> str:
    more = ", …" if len(names) > _SHOWN else ""
    plural = "s" if len(names) > 1 else ""
    return f"{len(names):,} {what}{plural} ({', '.join(names[:_SHOWN])}{more})"


def no_crystals(files: Files) -> str:
    """What is wrong with a folder without crystals."""
    text = f"{files.path} holds no structure files ({', '.join(SUFFIXES)}, POSCAR…)"
    if files.left_out:
        return f"{text}; it has {_outside(files)}"
    if workbook := next((n for n in files.names if n.lower().endswith(WORKBOOKS)), None):
        return f"{text}; {workbook} is a workbook: {SAVE_AS_TEXT}"
    if files.no_files:
        return f"{text}; it has {_listed('pipe or device', files.no_files)}"
    if not files.names:
        return text
    text = f"{text}; it has {_listed('other file', files.names)}"
    if not files.path.is_dir():
        return f"{text}: unpack it and give what holds the crystals as input"
    return text
