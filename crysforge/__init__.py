"""Crysforge: pretrain crystal encoders, predict properties from few labels.

    from crysforge import load

    model = load("runs/finetune")

The parts are `crysforge.datapipe`, `crysforge.models`, `crysforge.trainer` and `crysforge.launch`.
"""

from pathlib import Path
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

_HERE = Path(__file__).resolve().parent
if not (_HERE / "models").is_dir():  # a checkout: the parts are this folder's siblings
    __path__.append(str(_HERE.parent))


def __getattr__(name: str) -> Any:
    if name == "load":  # PyTorch takes seconds to import, and not all who import this need it
        from crysforge.trainer.serving.load import load

        return load
    raise AttributeError(f"module 'crysforge' has no attribute {name!r}")
