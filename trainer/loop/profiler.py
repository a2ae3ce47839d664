"""A window of steps under torch's profiler, as a trace that TensorBoard and Perfetto show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from crysforge.datapipe.common.files import make_directory, replacing_by_name


class ProfileWindow:
    """Profiles optimiser steps first … last of one rank.

    Args:
        steps: (first, last), both included; None profiles nothing.
        path: directory for `steps-<first>-<last>.pt.trace.json`.
    """

    def __init__(self, steps: Sequence[int] | None, path: Path) -> None:
        self.first, self.last = steps or (0, 0)
        self.path = path / f"steps-{self.first}-{self.last}.pt.trace.json"
        self._profile: Any = None

    def before(self, step: int) -> None:
        """To be called before optimiser step `step` (from 1)."""
        if step == self.first:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities, record_shapes=True)
            self._profile.start()

    def after(self, step: int) -> None:
        """To be called after it; writes the trace when the window ends."""
        if self._profile is not None and step == self.last:
            self._profile.stop()
            make_directory(self.path.parent)
            with replacing_by_name(self.path) as temporary:
                self._profile.export_chrome_trace(str(temporary))
            self._profile = None
