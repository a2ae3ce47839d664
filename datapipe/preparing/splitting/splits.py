"""Rules that put every record of an input into train, val, test or none of them.

A rule sees all records of the input, before any is parsed or dropped. So what filters drop never
moves another crystal from one split to another, and published memberships come out as published.
Every rule returns codes, [n] int8: 0 train, 1 val, 2 test, -1 none.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crysforge.datapipe.common.checked import checked
from crysforge.datapipe.common.safe_read import parse_json, read_named
from crysforge.datapipe.preparing.splitting.balanced import Folds
from crysforge.datapipe.preparing.splitting.pickled import pickled_ids
from crysforge.datapipe.storage.manifest import SPLITS

MAX_IDS = 1 << 30
"""Bytes of the longest file of ids."""

NONE = -1
PUBLISHED_SEED = 123
MATBENCH_SEED = 18012019
FOLDS = 5

GROUPS = ("formula", "chemical_system", "cluster")
"""What crystals of one group share: the reduced formula, the elements, or a structure that pymatgen
takes for the same."""

RULES: Mapping[str, tuple[str, ...]] = {
    "ratio": ("ratio", "stratify"),
    "count": ("n_train", "n_val", "n_test"),
    "ids": ("split_ids",),
    "file": SPLITS,
    "published-123": ("split_target", "n_train", "n_val", "n_test"),
    "matbench": ("fold",),
    "group": ("split_by", "ratio", "stratify"),
    "folds": ("folds", "split_by", "stratify"),
    "keep": (),
}
"""Rules and the settings each goes by; "keep" takes the splits of a data set as they are."""


def choose_rule(settings: Mapping[str, Any], asked: str | None, default: str) -> str:
    """The rule that is asked for, else the one whose settings are given, else the default.

    Args:
        settings: values by name; None and "" stand for not given.
        default: "keep" where the input has splits of its own.

    Raises:
        ValueError: settings of different rules, or a rule without what it needs.
    """
    known = dict.fromkeys(name for names in RULES.values() for name in names)
    given = {name for name in known if settings.get(name) not in (None, "")}
    fitting = [rule for rule, names in RULES.items() if given and given <= set(names)]
    rule = asked or (fitting[0] if fitting else default)
    if not given <= set(RULES[rule]):
        uses = ", ".join(RULES[rule]) or "no settings"
        others = ", ".join(sorted(given - set(RULES[rule])))
        raise ValueError(f"split={rule} uses {uses}, not {others}")
    if rule == "keep" and default != "keep":
        raise ValueError(
            "split=keep needs an input with splits: a prepared data set, or a folder with tables "
            "such as id_prop_train.csv and id_prop_test.csv"
        )
    if rule in ("count", "ids", "file") and not given:
        raise ValueError(f"split={rule} needs {', '.join(RULES[rule])}")
    return rule


def usual_ratio(n: int) -> list[float]:
    """Shares of train, val, test where none are asked for: a single crystal is a training set, of
    two the second validates."""
    return [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]][n - 1] if 0 < n < 3 else [0.8, 0.1, 0.1]


def shares(ratio: Sequence[float]) -> list[float]:
    """Shares of train, val and test; two are those of train and val.

    Raises:
        ValueError: not two or three shares in [0, 1] that add up to at most one.
    """
    out = [*ratio, 0.0] if len(ratio) == 2 else list(ratio)
    if len(out) != 3 or not all(0 <= s <= 1 for s in out) or not 0 < sum(out) < 1 + 1e-9:
        raise ValueError(
            f"ratio must be shares of train, val and test that add up to 1, got {list(ratio)}"
        )
    return out


def by_ratio(n: int, ratio: Sequence[float], seed: int) -> np.ndarray:
    """Shuffles, then cuts by shares of (train, val, test). Shares of val and test are rounded, but
    not down to nothing; train gets the rest where the shares add up to one.

    Raises:
        ValueError: not two or three shares in [0, 1] that add up to at most one, or n too small.
    """
    parts = shares(ratio)
    counts = [max(1, round(s * n)) if s else 0 for s in parts]
    if sum(parts) > 1 - 1e-9:
        counts[0] = n - counts[1] - counts[2] if parts[0] else 0
    if sum(counts) > n or (parts[0] and counts[0] < 1):
        raise ValueError(f"{n} crystals are too few for the splits {parts}")
    return by_count(n, counts[0], counts[1], counts[2], seed)


def by_count(n: int, n_train: int | None, n_val: int, n_test: int, seed: int) -> np.ndarray:
    """Shuffles; the first `n_train` are train, the next `n_val` val, the next `n_test` test.
    `n_train=None` takes what is left by the others.

    Raises:
        ValueError: negative counts, or more than there are records.
    """
    n_train = n - n_val - n_test if n_train is None else n_train
    _check_counts(n, n_train, n_val, n_test)
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return _codes(n, order, n_train, n_val, n_test)


def published(
    labelled: np.ndarray, counts: tuple[int | None, int, int] | None = None
) -> np.ndarray:
    """The field's published split ("published-123"), as ALIGNN and Matformer make it: the records
    with a label, in file order, are shuffled by Python's `random` with seed 123; train are the
    first, test the last, val those before test. Without counts: 80, 10 and 10 %, each rounded
    down, so that one or two records may be left over.

    Args:
        labelled: [n] bool, records that have the label.
        counts: (n_train, n_val, n_test) for sets published with numbers (MP-2018.6: 60000, 5000,
            4239).

    Raises:
        ValueError: no record has the label, or fewer than the counts ask for.
    """
    present = np.flatnonzero(labelled)
    n = len(present)
    if counts is None:
        n_train, n_val, n_test = int(0.8 * n), int(0.1 * n), int(0.1 * n)
    else:
        n_val, n_test = counts[1], counts[2]
        n_train = n - n_val - n_test if counts[0] is None else counts[0]
    if not n:
        raise ValueError(
            "no record has the label that the published split uses: name another with "
            "split_target=…, or give the table that has it as labels=TABLE"
        )
    _check_counts(n, n_train, n_val, n_test)
    order = list(range(n))
    random.Random(PUBLISHED_SEED).shuffle(order)
    middle = n - n_val - n_test
    used = order[:n_train] + order[middle:]
    codes = np.full(len(labelled), NONE, dtype=np.int8)
    codes[present] = _codes(n, used, n_train, n_val, n_test)
    return codes


def matbench_folds(n: int, seed: int) -> Folds:
    """All five of Matbench's official folds at once, see `by_fold`."""
    codes = np.stack([by_fold(n, fold, seed) for fold in range(FOLDS)])
    test, val = (codes == SPLITS.index(split) for split in ("test", "val"))
    bits = np.uint32(1) << np.arange(FOLDS, dtype=np.uint32)
    return Folds(FOLDS, test.argmax(axis=0).astype(np.int8), (val * bits[:, None]).sum(axis=0))


def by_fold(n: int, fold: int, seed: int) -> np.ndarray:
    """Matbench's official folds of a regression task: five, of records shuffled by numpy's
    `RandomState(18012019)` as scikit-learn's KFold does; one is test. Matbench leaves validation
    to its users: here a tenth of the other four, drawn with `seed`.

    Raises:
        ValueError: no such fold, or fewer records than folds.
    """
    if not 0 <= fold < FOLDS:
        raise ValueError(f"fold must be 0 to {FOLDS - 1}, got {fold}")
    if n < 3 * FOLDS:
        raise ValueError(f"{n} crystals are too few for {FOLDS} folds")
    order = np.random.RandomState(MATBENCH_SEED).permutation(n)
    test = np.array_split(order, FOLDS)[fold]
    codes = np.full(n, SPLITS.index("test"), dtype=np.int8)
    rest = np.setdiff1d(np.arange(n), test)
    codes[rest] = by_ratio(len(rest), [0.9, 0.1], seed)
    return codes


def by_ids(ids: Sequence[str], lists: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Each record goes to the split whose list has its id.

    Raises:
        ValueError: unknown split, an id in two lists, or no record is in any list.
    """
    place: dict[str, int] = {}
    for split, members in lists.items():
        if split not in SPLITS:
            raise ValueError(f"split ids: unknown split {split!r}, valid: {', '.join(SPLITS)}")
        code = SPLITS.index(split)
        for id in map(str, members):
            if place.setdefault(id, code) != code:
                raise ValueError(f"split ids: {id!r} is in both {SPLITS[place[id]]} and {split}")
    codes = np.array([place.get(id, NONE) for id in ids], dtype=np.int8)
    if not (codes != NONE).any():
        example = next(iter(place), None)
        raise ValueError(
            f"split ids: none of the {len(place)} listed ids (such as {example!r}) is in the "
            f"input, whose ids are like {next(iter(ids), None)!r}"
        )
    return codes


def read_ids(path: str) -> dict[str, list[str]]:
    """Id lists from a JSON file {"train": […], "val": […], "test": […]}, or from a folder with
    `train.txt`, `val.txt`, `test.txt`, one id a line, or with pickled lists whose names end so
    (`bulk_megnet_train.pkl`, …; see `pickled_ids`). A missing split is empty.

    Raises:
        ValueError: neither of them.
    """
    place = Path(path)
    if place.is_dir():
        files = {s: place / f"{s}.txt" for s in SPLITS}
        found = {s: _lines(f) for s, f in files.items() if f.is_file()}
        for split in SPLITS if not found else ():
            pickles = sorted(place.glob(f"*{split}.pkl"))
            if len(pickles) > 1:
                names = " and ".join(p.name for p in pickles[:2])
                raise ValueError(f"{path} holds {names}: give a folder with one list of each split")
            if pickles:
                found[split] = pickled_ids(pickles[0])
        if not found:
            raise ValueError(
                f"{path} holds none of train.txt, val.txt, test.txt, and no pickled lists"
            )
        return found
    lists = parse_json(read_named(path, "split_ids", MAX_IDS), path)
    try:
        found = checked(dict[str, list[str | int]], lists, path)
    except ValueError:
        raise ValueError(
            f'{path} must hold {{"train": […], "val": […], "test": […]}}, lists of ids'
        ) from None
    return {k: [str(x) for x in v] for k, v in found.items()}


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]


def _check_counts(n: int, n_train: int, n_val: int, n_test: int) -> None:
    if min(n_train, n_val, n_test) < 0 or n_train + n_val + n_test > n:
        raise ValueError(
            f"n_train={n_train}, n_val={n_val}, n_test={n_test} do not fit into {n} records"
        )


def _codes(n: int, order: Sequence[int], *counts: int) -> np.ndarray:
    """Codes for n records: the first `counts[0]` of `order` are train, and so on."""
    codes = np.full(n, NONE, dtype=np.int8)
    start = 0
    for code, count in enumerate(counts):
        codes[np.asarray(order[start : start + count], dtype=np.int64)] = code
        start += count
    return codes
