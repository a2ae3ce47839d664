"""When a stage is saved, and how training goes on meanwhile."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from crysforge.trainer.base.agreement import same_file
from crysforge.trainer.base.distributed import World
from crysforge.trainer.engines.base import Engine
from crysforge.trainer.loop.ema import WeightAverage
from crysforge.trainer.runs.checkpoint import RunDirectory
from crysforge.trainer.runs.logger import Logger
from crysforge.trainer.runs.saved import BackgroundWriter, Checkpoint


class Saver:
    """Checkpoints of one stage. Rank 0 copies the state to its memory and writes it in a thread,
    one at a time.

    A checkpoint that cannot be written (a full disk) is a warning: the older ones stay, training
    goes on, and the next one may succeed.

    Args:
        every: steps between checkpoints; 0 for none.
        minutes: minutes between checkpoints, looked at every `look_every` steps; 0 for none.
        milestone_every: steps between checkpoints that are never pruned; 0 for none.
        keep: how many others stay.
        step: of the checkpoint that training goes on from.
    """

    def __init__(
        self,
        run: RunDirectory,
        engine: Engine,
        logger: Logger,
        *,
        every: int,
        minutes: float,
        look_every: int,
        milestone_every: int,
        keep: int,
        step: int,
    ) -> None:
        self.run, self.engine, self.logger = run, engine, logger
        self.every, self.minutes, self.look_every = every, minutes, look_every
        self.milestone_every, self.keep = milestone_every, keep
        self._saved_step, self._saved_at = step, time.monotonic()
        self._writer = BackgroundWriter()

    def due(self, step: int) -> bool:
        """Whether to save after a step; all ranks agree. Collective."""
        if self._milestone(step) or (self.every > 0 and step % self.every == 0):
            return True
        if not self.minutes or step % self.look_every:
            return False
        late = time.monotonic() - self._saved_at > 60 * self.minutes
        return bool(self.engine.world.broadcast(float(late)))

    def _milestone(self, step: int) -> bool:
        return self.milestone_every > 0 and step % self.milestone_every == 0

    def save(
        self,
        step: int,
        state: dict[str, Any],
        best: dict[str, Tensor],
        average: WeightAverage | None,
    ) -> None:
        """Begins to save the state after a step, unless it is saved already. Collective."""
        if step == self._saved_step:
            return
        self.wait()
        model, optimizer = self.engine.weights(), self.engine.optimizer_state()
        self._saved_step, self._saved_at = step, time.monotonic()
        if not self.engine.world.main:
            return
        averaged = {} if average is None else average.on_host()
        stage = self.engine.stage.name
        checkpoint = Checkpoint(stage, step, state, model, optimizer, best, averaged)

        def write() -> None:
            began = time.monotonic()
            self.run.save(checkpoint, self.keep, self._milestone(step))
            self.logger.event("save", step=step, seconds=round(time.monotonic() - began, 3))

        self._writer.start(write)

    def wait(self) -> None:
        """Returns when nothing is being written."""
        try:
            self._writer.wait()
        except OSError as error:
            tags = self.run.tags(self.engine.stage.name)
            newest = tags[-1].name if tags else "none"
            self.logger.warning(f"checkpoint not written: {error}; the newest one is {newest}")


def newest(run: RunDirectory, stage: str, world: World) -> Checkpoint | None:
    """The checkpoint to go on from, the same on all ranks: rank 0 chooses.

    Raises:
        ValueError: all that are there are damaged, or this rank does not see the one chosen.
    """
    checkpoint = run.latest(stage) if world.main else None
    tag = world.share(None if checkpoint is None else checkpoint.tag)
    if tag is not None:
        same_file(world.meeting, run.checkpoints / tag / "COMPLETE")
        if checkpoint is None:
            checkpoint = run.load(run.checkpoints / tag)
    return checkpoint
