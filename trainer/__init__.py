"""One training loop, its engines, stages and checkpoints."""

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from crysforge.trainer.serving.load import load

        return load
    raise AttributeError(f"module 'trainer' has no attribute {name!r}")
