"""From files of crystals to a data set: read, filter, split, write.

Two passes over the input, so that memory is flat: the first only looks at ids and labels and
decides the splits; the second parses in parallel and writes shards as results come.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.preparing.config import PrepareConfig, Work
from crysforge.datapipe.preparing.write import write
from crysforge.datapipe.sources.join import tables_with
from crysforge.datapipe.storage.manifest import Manifest


def prepare(config: PrepareConfig) -> Manifest:
    """Writes the data set that a config asks for. All of it appears at once; after an error or a
    kill at any moment nothing does, and the same call can be made again.

    Raises:
        ValueError: an input cannot be read, a target or split setting does not fit it, the output
            holds files; a bad crystal with `on_bad=error`; every crystal is dropped.
    """
    if not config.output:
        raise ValueError("setting 'output' is required: the directory of the data set")
    if config.dedup or config.duplicates.within:
        from crysforge.datapipe.preparing.deduplicate import (
            prepare_unique,  # which calls `write` for its parts
        )

        return prepare_unique(config)
    return write(config)


def _without_target(work: Work, name: str, fields: Iterable[str]) -> str:
    """What to do about a target that no record has."""
    where = ", ".join(path for _, path, _ in work.inputs)
    fields = list(fields)
    text = f"{where} has no target {name!r}: "
    text += f"{nearest(name, fields)}; " if fields else "its records have no labels; "
    if work.config.labels:
        return text + f"nor has labels={work.config.labels}"
    beside = [t for _, path, _ in work.inputs for t in tables_with(name, Path(path))]
    if beside:
        return text + f"{beside[0].name} has it: give labels={beside[0]}"
    text += "if it is in a table of its own, give labels=TABLE"
    return text if fields else f"{text} (a column of ids or file names, and one called {name!r})"
