"""The `crysforge` command: `crysforge pretrain …` is `python launch/pretrain.py …`.

Each command is a file of this folder; `crysforge COMMAND --help` shows its settings.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

from crysforge import __version__
from crysforge.datapipe.common.names import nearest
from crysforge.trainer.base.script import STARTS_ANEW, run

FOLDER = Path(__file__).parent


def commands() -> dict[str, str]:
    """What there is to run, with the first line of its docstring."""
    out = {}
    for path in sorted(FOLDER.glob("*.py")):
        if path.stem not in ("__init__", Path(__file__).stem):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            out[path.stem] = text.partition("\n")[0]
    return out


def usage() -> str:
    """All commands, one a line."""
    lines = [f"  {name:<12} {text}" for name, text in commands().items()]
    head = ["usage: crysforge COMMAND [--config NAME] [key=value …]", "", "commands:"]
    tail = ["", "crysforge COMMAND --help shows a command's settings."]
    return "\n".join([*head, *lines, *tail])


def main() -> None:
    """Runs the command that the first argument names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    if arguments[0] == "--version":
        print(__version__)
        return
    run(lambda: call(arguments[0], arguments[1:]), again=lambda: again(arguments[0]))


def again(command: str) -> str:
    """What the same command does after an interrupt; once it was imported, it says so itself."""
    module = sys.modules.get(f"crysforge.launch.{command}")
    return module.again() if module and hasattr(module, "again") else STARTS_ANEW


def call(command: str, arguments: list[str]) -> None:
    """Runs a command in this process."""
    if command not in commands():
        raise ValueError(f"unknown command {command!r}: {nearest(command, commands())}")
    sys.argv = [f"crysforge {command}", *arguments]
    importlib.import_module(f"crysforge.launch.{command}").main()


if __name__ == "__main__":
    main()
