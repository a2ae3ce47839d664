"""Crystals that cannot be used: every rank passes over its own, TensorBoard shows how many."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crysforge.datapipe.storage.dataset import Dataset
from tests.distributed.jobs import curve, launch

pytestmark = pytest.mark.distributed

BAD = range(3, 160, 13)
"""Item numbers of the training part that are damaged."""
STEPS = 10
"""One epoch of 160 crystals."""


@pytest.fixture(scope="module")
def damaged(data, tmp_path_factory) -> Path:
    root = Path(shutil.copytree(data, tmp_path_factory.mktemp("damaged") / "data"))
    for item, crystal in list(Dataset.open(data).read(BAD)):
        path = root / Dataset.open(data).where(item).split()[0]
        sound = path.read_bytes()
        broken = sound.replace(f'"{crystal.id}"'.encode(), f'"{crystal.id[:-1]}?"'.encode())
        assert broken != sound
        path.write_bytes(broken)
    return root


def pretrain(data: Path, run: Path, ranks: int, *args: str) -> Path:
    launch(
        "pretrain", "--config", "configs/pretrain/tiny.yaml", "stages=[vae]",
        f"vae.max_steps={STEPS}", "vae.batch_size=16", "trainer.log_every=1",
        f"data={data}", f"run_dir={run}", *args, ranks=ranks,
    )  # fmt: skip
    return run


def events_of(run: Path, name: str) -> list[list[dict]]:
    """The events of that name, of each rank."""
    files = sorted((run / "events").iterdir())
    found = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return [[event for event in some if event["event"] == name] for some in found]


def test_two_ranks_quarantine_what_one_does_and_tensorboard_shows_the_sum(damaged, tmp_path):
    runs = {ranks: pretrain(damaged, tmp_path / str(ranks), ranks) for ranks in (1, 2)}
    for ranks, run in runs.items():
        events = EventAccumulator(str(run / "tensorboard" / "vae")).Reload()
        shown = [(e.step, e.value) for e in events.Scalars("data/quarantined")]
        assert [step for step, _ in shown] == list(range(1, STEPS + 1))
        assert [n for _, n in shown] == sorted(n for _, n in shown)
        assert shown[-1][1] == len(BAD)
        met = events_of(run, "quarantine")
        assert len(met) == ranks
        assert all(met)  # every rank met some of them
        assert sorted(x["item"] for some in met for x in some) == list(BAD)
        assert all("its checksum is not the index's" in x["reason"] for some in met for x in some)
    one, other = (curve(run, "vae") for run in runs.values())
    assert [s for s, _ in one] == [s for s, _ in other]
    assert [v for _, v in other] == pytest.approx([v for _, v in one], rel=2e-4)


def test_a_rank_without_a_crystal_changes_nothing(damaged, tmp_path):
    """With two crystals per step, each that is damaged leaves its rank of two without any: the
    other's losses, and the batch norms that validation goes by, are those of one rank."""
    small = "vae.batch_size=2", f"vae.max_steps={4 * STEPS}"
    one, two = (pretrain(damaged, tmp_path / str(n), n, *small) for n in (1, 2))
    assert sum(map(len, events_of(two, "quarantine"))) >= 3
    for name in ("train/loss", "val/loss"):
        expected = {step: pytest.approx(v, rel=2e-4) for step, v in curve(one, "vae", name)}
        assert dict(curve(two, "vae", name)) == expected


def test_more_than_the_limit_end_all_ranks(damaged, tmp_path):
    with pytest.raises(AssertionError, match=r"more than loader\.max_bad=2; the last: train-"):
        pretrain(damaged, tmp_path / "run", 2, "loader.max_bad=2")
