"""Crystals that need no file of the user's: synthetic ones, and data sets prepared before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from crysforge.datapipe.crystals.crystal import Crystal
from crysforge.datapipe.crystals.prototypes import TARGETS, check_size
from crysforge.datapipe.sources.base import NO, SOURCES, SURE, Options, Raw
from crysforge.datapipe.storage.dataset import Dataset
from crysforge.datapipe.storage.manifest import MANIFEST, SPLITS


@SOURCES.register("prototypes", lambda look: SURE if str(look.path) == "prototypes" else NO)
def read_prototypes(path: Path, options: Options) -> Iterator[Raw]:
    """SYNTHETIC crystals made here (`input=prototypes size=N seed=S`): see
    `datapipe.crystals.prototypes`."""
    check_size(options.size)
    labels = dict.fromkeys(TARGETS, "computed with the crystal")
    for index in range(options.size):
        yield Raw("", f"prototype {index}", ("prototype", (index, options.seed)), labels)


@SOURCES.register(
    "shards",
    lambda look: SURE if (look.path / MANIFEST).is_file() else NO,
    splits=lambda path, options: True,
)
def read_shards(path: Path, options: Options) -> Iterator[Raw]:
    """A data set that `prepare` wrote, with its labels and splits."""
    dataset = Dataset.open(path)
    for split in SPLITS:
        for item, crystal in dataset.read(dataset.stored_items(split)):
            labels = {
                name: None if value != value else value
                for name, value in zip(dataset.names, dataset.targets[item].tolist(), strict=True)
            }
            where = f"{path.name}/{dataset.where(item)}"
            if isinstance(crystal, Crystal):
                yield Raw(crystal.id, where, ("crystal", crystal.with_targets({})), labels, split)
            else:
                damaged = ("bad", (str(crystal), "damaged"))
                yield Raw(f"damaged-{item}", where, damaged, labels, split)
