"""From files of crystals to a data set: read, filter, split, write.

Two passes over the input, so that memory is flat: the first only looks at ids and labels and
decides the splits; the second parses in parallel and writes shards as results come.
"""

from __future__ import annotations

from pathlib import Path

from crysforge.datapipe.common.journal import WorkDirectory
from crysforge.datapipe.preparing.config import PrepareConfig
from crysforge.datapipe.preparing.deduplicate import prepare_unique
from crysforge.datapipe.preparing.grouped import prepare_grouped
from crysforge.datapipe.preparing.request import made_before
from crysforge.datapipe.preparing.work import Work
from crysforge.datapipe.preparing.write import write
from crysforge.datapipe.storage.manifest import MANIFEST, Manifest


def prepare(config: PrepareConfig) -> Manifest:
    """Writes the data set that a config asks for. All of it appears at once; after an error or a
    kill at any moment nothing does, and the same call can be made again. If it has been made of the
    same files with the same settings before, it is left as it is.

    Raises:
        ValueError: an input cannot be read, a target or split setting does not fit it, the output
            holds files; a bad crystal with `on_bad=error`; every crystal is dropped.
    """
    if not config.output:
        raise ValueError("setting 'output' is required: the directory of the data set")
    if (Path(config.output) / MANIFEST).is_file():
        done = made_before(config.output, Work.of(config).request)
        if done is not None:
            for purpose in ("dedup", "groups"):
                WorkDirectory.leave_nothing(config.output, purpose)
            return done
    return prepare_grouped(config, _whole) if Work.of(config).needs_crystals else _whole(config)


def _whole(config: PrepareConfig) -> Manifest:
    """`prepare` without a split by groups."""
    if config.dedup or config.duplicates.within:
        return prepare_unique(config)
    return write(config)
