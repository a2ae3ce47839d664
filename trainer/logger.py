"""Where numbers go: TensorBoard, metrics.jsonl and a progress bar, all from rank 0."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Logger:
    """Logs one stage of a run. Other ranks hold one that does nothing.

    TensorBoard sees a curve per stage in RUN/tensorboard/<stage>; a resumed stage purges what the
    killed process logged after its last checkpoint, so the curve stays one.
    """

    def __init__(self, run: Path, stage: str, start: int, total: int, enabled: bool) -> None:
        self.stage = stage
        self.enabled = enabled
        self.bar = tqdm(
            total=total,
            initial=start,
            desc=stage,
            unit="step",
            disable=not enabled,
            mininterval=1.0,
            dynamic_ncols=True,
        )
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            _drop_lines(run / "metrics.jsonl", stage, start)
            self._lines = open(run / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
            self._board = SummaryWriter(
                str(run / "tensorboard" / stage), purge_step=start + 1 if start else None
            )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records named scalars (`train/loss`, `val/mae`, …) at an optimiser step."""
        if not self.enabled:
            return
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        line = {"stage": self.stage, "step": step, **values}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()

    def figure(self, step: int, name: str, figure: Any) -> None:
        """Records a matplotlib figure."""
        if self.enabled:
            self._board.add_figure(name, figure, step, close=False)

    def advance(self, **shown: str) -> None:
        """One optimiser step further on the progress bar."""
        self.bar.update(1)
        if shown:
            self.bar.set_postfix(shown, refresh=False)

    def say(self, text: str) -> None:
        """A line for people, above the progress bar."""
        if self.enabled:
            tqdm.write(text)

    def close(self) -> None:
        """Flushes everything."""
        self.bar.close()
        if self.enabled:
            self._lines.close()
            self._board.close()


def _drop_lines(path: Path, stage: str, start: int) -> None:
    """Forgets lines of this stage that were logged after the step a run resumes from."""
    if not path.is_file():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # cut off by a kill
            continue
        if line["stage"] != stage or line["step"] <= start:
            kept.append(text + "\n")
    path.write_text("".join(kept), encoding="utf-8")


def read_metrics(run: Path, stage: str) -> dict[str, list[tuple[int, float]]]:
    """The curves of a stage from RUN/metrics.jsonl: name → [(step, value), …]."""
    curves: dict[str, list[tuple[int, float]]] = {}
    with open(run / "metrics.jsonl", encoding="utf-8") as lines:
        for text in lines:
            line = json.loads(text)
            if line.pop("stage") != stage:
                continue
            step = line.pop("step")
            for name, value in line.items():
                curves.setdefault(name, []).append((step, value))
    return curves
