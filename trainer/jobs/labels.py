"""Which crystals a finetuning learns from, and how their labels are standardised."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from crysforge.datapipe.storage.dataset import Dataset
from crysforge.trainer.jobs.schemas import FinetuneJob


def chosen_items(dataset: Dataset, config: FinetuneJob) -> dict[str, np.ndarray]:
    """Items of each split that a finetuning learns from and is judged on; of `train` none where it
    only evaluates.

    Raises:
        ValueError: see `labelled_items` and `with_label`.
    """
    learns = config.finetune.epochs > 0
    train = labelled_items(dataset, config) if learns else np.empty(0, np.int64)
    judged = {s: with_label(dataset, s, config.targets, config.atoms) for s in ("val", "test")}
    return {"train": train, **judged}


def labelled_items(dataset: Dataset, config: FinetuneJob) -> np.ndarray:
    """The training crystals a finetuning job learns from: those with a label, of which a seeded
    random share is taken. Smaller shares are subsets of larger ones with the same seed."""
    items = with_label(dataset, "train", config.targets, config.atoms)
    count = len(items)
    if config.label_count is not None:
        if config.label_count > count:
            raise ValueError(
                f"label_count={config.label_count}, but only {count} are labelled: give at most "
                "that, or prepare the data again with more labels"
            )
        count = config.label_count
    else:
        count = max(1, round(config.label_fraction * count))
    order = np.random.default_rng(config.seed).permutation(len(items))
    return np.sort(items[order[:count]])


def with_label(
    dataset: Dataset, split: str, targets: list[str], atoms: Sequence[int] | None = None
) -> np.ndarray:
    """Items of a split that have at least one of the labels.

    Args:
        atoms: least and most atoms of a cell.

    Raises:
        ValueError: an unknown target (lists those the data has), or one that no crystal of the
            split has.
    """
    items = dataset.split_items(split)
    if len(items) == 0:
        return items
    if atoms is not None:
        size = dataset.atoms[items]
        items = items[(size >= atoms[0]) & (size <= atoms[1])]
        if len(items) == 0:
            least, most = atoms
            raise ValueError(f"no crystal of the {split!r} split has {least} to {most} atoms")
    present = ~np.isnan(np.stack([dataset.targets_of(name)[items] for name in targets]))
    if missing := [n for n, some in zip(targets, present.any(axis=1), strict=True) if not some]:
        raise ValueError(
            f"no crystal of the {split!r} split has a label for {', '.join(missing)}: prepare the "
            "data again with labels for it (labels=TABLE reads them from a table), or with "
            "another split"
        )
    return items[present.any(axis=0)]


def class_statistics(labels: np.ndarray, targets: Sequence[str]) -> tuple[list[float], list[float]]:
    """Mean 0 and spread 1 of each target, whose labels [n, T] are 0 and 1.

    Raises:
        ValueError: other labels, or one class alone.
    """
    for name, column in zip(targets, labels.T, strict=True):
        found = sorted(set(column[~np.isnan(column)].tolist()))
        if found != [0.0, 1.0]:
            shown = ", ".join(f"{x:g}" for x in found[:4])
            raise ValueError(
                f"finetune.task=classification needs training labels 0 and 1, both: those of "
                f"{name} are {shown}{', …' if len(found) > 4 else ''}"
            )
    return [0.0] * len(targets), [1.0] * len(targets)


def standardisation(labels: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Mean and population standard deviation of each target's present labels, [labels, targets]."""
    values = torch.tensor(labels, dtype=torch.float64)
    present = ~values.isnan()
    count = present.sum(0).clamp(min=1)
    mean = values.nan_to_num().sum(0) / count
    square = ((values - mean).nan_to_num() ** 2 * present).sum(0) / count
    return mean.tolist(), square.sqrt().tolist()
