"""What `prepare` is asked for: its settings, each checked by itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from crysforge.datapipe.common.names import nearest
from crysforge.datapipe.common.safe_names import check_names
from crysforge.datapipe.crystals.filters import Filters
from crysforge.datapipe.preparing.duplicates.records import Duplicates
from crysforge.datapipe.preparing.splitting import splits
from crysforge.datapipe.sources.options import ReadingConfig
from crysforge.datapipe.storage.manifest import MAX_FOLDS


@dataclass(kw_only=True)
class PrepareConfig(ReadingConfig):
    """Settings of `prepare`."""

    train: str = ""
    """Input of the training split, in place of `input`, where the splits are files."""
    val: str = ""
    """Input of the validation split."""
    test: str = ""
    """Input of the test split."""
    output: str = ""
    """Directory of the data set; new or empty."""
    labels: str | None = None
    """Table with labels of the crystals, where they are not in the input itself: a column of ids or
    file names, and one for each label."""
    targets: list[str] = field(default_factory=list)
    """Labels to keep, by their names in the input. None: those of a data set, else no labels, as
    pretraining needs none."""
    units: dict[str, str] = field(default_factory=dict)
    """Units of targets, where they are not known from their names."""
    extensive: list[str] = field(default_factory=list)
    """Labels of the whole cell that go with the number of its atoms: total energy, volume, total
    magnetization. Where a cell is reduced, they are divided by the number of its copies."""
    intensive: list[str] = field(default_factory=list)
    """Labels that are the same for any cell, though their names or units may not look like it."""
    split: str | None = None
    """ratio, count, ids, file, published-123, matbench, group, folds, or keep (input is a data
    set); None: the one whose settings are given, else keep for a data set and ratio for anything
    else."""
    split_by: str | None = None
    """What keeps crystals together, in a split or fold: formula (reduced), chemical_system, or
    cluster (structures that pymatgen's StructureMatcher takes for the same, as `duplicates` says).
    With split=group None is formula."""
    folds: int | None = None
    """Number of folds, for small sets: every crystal is tested in one (`fold=` of finetune)."""
    stratify: str | None = None
    """Label whose classes are alike in all splits or folds; `none` for none. None: with split=group
    and folds the only target, where its values are classes."""
    ratio: list[float] | None = None
    """Shares of train, val, test; None: [0.8, 0.1, 0.1], or as far as the crystals suffice."""
    n_train: int | None = None
    """Training records; None takes what val and test leave."""
    n_val: int | None = None
    """Validation records."""
    n_test: int | None = None
    """Test records."""
    split_ids: str | None = None
    """JSON file {train: [ids], val: …, test: …}, or folder of train.txt, val.txt, test.txt, or of
    pickled lists (`…train.pkl`, …), of which ids are read and nothing is run."""
    split_target: str | None = None
    """Label that published-123 uses; None: the only target."""
    fold: int | None = None
    """Matbench's official fold to test on, 0 to 4; None: all of them, as folds."""
    seed: int = 123
    """Seed of the shuffle of ratio, count, group and folds, of matbench's validation part, and of
    prototypes."""
    filters: Filters = field(default_factory=Filters)
    """Which crystals to keep, by the cell that they are brought to."""
    dedup: list[str] = field(default_factory=list)
    """Data sets, or files that can be read, whose crystals are left out."""
    duplicates: Duplicates = field(default_factory=Duplicates)
    """What counts as a duplicate of those, and whether to look for duplicates within."""
    shard_size: int = 1000
    """Crystals in a shard."""
    dry_run: bool = False
    """Only say what would be done."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split is not None and self.split not in splits.RULES:
            raise ValueError(f"unknown split {self.split!r}: {nearest(self.split, splits.RULES)}")
        if self.split_by is not None and self.split_by not in splits.GROUPS:
            raise ValueError(
                f"unknown split_by {self.split_by!r}: {nearest(self.split_by, splits.GROUPS)}"
            )
        if self.folds is not None and not 2 <= self.folds <= MAX_FOLDS:
            raise ValueError(f"folds must be 2 to {MAX_FOLDS}, got {self.folds}")
        if self.shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, got {self.shard_size}")
        check_names(self.targets)
        if repeated := sorted({n for n in self.targets if self.targets.count(n) > 1}):
            raise ValueError(f"targets names {', '.join(repeated)} more than once")
        for name in self.units:
            if name not in self.targets:
                has = nearest(name, self.targets) if self.targets else "give targets=[…]"
                raise ValueError(f"units.{name}: no such target: {has}")
        if both := set(self.extensive) & set(self.intensive):
            raise ValueError(f"{sorted(both)[0]} is in extensive and in intensive: which is it?")
