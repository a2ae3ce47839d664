"""Tables and figures of the papers, and what here shows the same (exhibits.yaml)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from crysforge.datapipe.common.checked import Line, between, checked
from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.common.safe_read import parse_yaml

PATH = Path(__file__).with_name("exhibits.yaml")


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """A table or figure of a paper."""

    exhibit: Line
    """Its number there."""
    what: Line
    suite: Line = ""
    """Name of the suite that makes it, in configs/suites."""
    command: Line = ""
    """The command that makes it, where that is no suite."""
    tables: list[Line] | None = None
    """Keys of the published tables."""
    data: Line = ""
    """What keys of their properties that are shown begin with."""
    lacks: Line = ""
    """How what is made here differs from the paper's, or where in a report it is."""

    def commands(self, runs: str) -> list[str]:
        """What to run, given the folder of runs."""
        if not self.suite:
            return [self.command] if self.command else []
        output = f"{runs}/{self.suite}"
        return [
            f"python launch/submit.py suite=configs/suites/{self.suite}.yaml data_dir=data "
            f"output={output}",
            f"python launch/evaluate.py suite={output}",
        ]


@dataclass(frozen=True)
class _File:
    schema: Annotated[int, between(1, 1)]
    papers: dict[Line, list[Exhibit]]


@functools.cache
def _file() -> _File:
    record = parse_yaml(PATH.read_text(encoding="utf-8"), str(PATH))
    return checked(_File, record, str(PATH))


def papers() -> list[str]:
    """Names of the papers."""
    return list(_file().papers)


def exhibits(paper: str) -> list[Exhibit]:
    """What a paper shows, in its order.

    Raises:
        ValueError: no such paper; lists those there are.
    """
    found = _file().papers
    if paper not in found:
        raise ValueError(f"no paper {paper!r} is known by its tables: {nearest(paper, found)}")
    return found[paper]
