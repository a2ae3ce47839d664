"""Changes of files as damage and attackers make them, at random."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from crysforge.datapipe.common.files import sha256
from tests.exploits import Exploit
from tests.intrusions import FORMULAS, MARKUP, Scene

TEXTS = [
    "..", ".", "~", "a/b", "a\x00b", "-rf", "--all", "%s%n", "{}", "\n", "x" * 600, "9" * 5000,
    "[" * 500, "\ud800", "\U0001f600", "\u202e", "é" * 5, "*alias", "&anchor", "<<", "?", "???",
    "${oc.env:CRYSFORGE_TEST_SECRET}", "${a}", "$(id)", "`id`", "../" * 9 + "etc/passwd", "/", "1",
]  # fmt: skip
NUMBERS = [0, 1, -1, 0.0, 3.7, 2**63, -(2**70), 1e308, 10**400, 1e-320, float("nan"), float("inf")]
OTHERS = [None, True, False, "", " ", [], {}, [[]], [None], {"": ""}, {"a": {"b": [1]}}, [1, "x"]]


class Malice:
    """Changes files at random, in ways that have been trouble somewhere.

    Args:
        scene: the dice, and what is to be reached from the files.
    """

    def __init__(self, scene: Scene) -> None:
        self.dice, self.guard, self.scene = scene.dice, scene.guard, scene

    def value(self) -> Any:
        """Any value."""
        dice, outside = self.dice, self.guard.outside
        exploit = f"!!python/object/apply:os.system ['{self.guard.command}']"
        pool: list[Callable[[], Any]] = [
            lambda: dice.choice(OTHERS),
            lambda: dice.choice(NUMBERS),
            lambda: dice.choice(TEXTS),
            lambda: dice.choice([*MARKUP, *FORMULAS, exploit]),
            lambda: dice.choice([str(outside), f"../{outside.name}"]),
            self.scene.location,
            lambda: self.nested(dice.choice([3, 40, 200])),
            lambda: "".join(chr(dice.randrange(1, 0x3000)) for _ in range(dice.randrange(20))),
        ]
        return json.loads(json.dumps(dice.choice(pool)()))  # of its own

    def nested(self, depth: int) -> Any:
        """A value at the bottom of so many lists or mappings."""
        value: Any = 1
        for _ in range(depth):
            value = [value] if self.dice.random() < 0.5 else {"a": value}
        return value

    def change(self, document: Any) -> Any:
        """A document with one place of it changed."""
        places = list(_places(document))
        if not places:
            return self.value()
        holder, key = self.dice.choice(places)
        way = self.dice.random()
        if way < 0.65:
            holder[key] = self.value()
        elif way < 0.8:
            del holder[key]
        elif way < 0.9 and isinstance(holder, dict):
            holder[str(self.value())[:700]] = holder.pop(key)
        elif isinstance(holder, list):
            holder.append(self.value() if way < 0.95 else holder[key])
        else:
            other, name = self.dice.choice(places)
            holder[key] = json.loads(json.dumps(other.get(name) if isinstance(other, dict) else 0))
        return document

    def damage(self, path: Path, replace: bool = True) -> None:
        """Changes a file, or puts something else in its place."""
        way = self.dice.random()
        text = path.suffix in (".json", ".yaml", ".jsonl") or path.name == "COMPLETE"
        if text and way < 0.75:
            with contextlib.suppress(ValueError, AttributeError, RecursionError, yaml.YAMLError):
                return self.document(path)
        if way < 0.9 or not replace:
            return self.content(path)
        return self.whole(path)

    def document(self, path: Path) -> None:
        """Changes values of a JSON or YAML file."""
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".yaml":
            document = self.change(yaml.safe_load(content))
            data = yaml.safe_dump(document, sort_keys=False)
        elif path.suffix == ".jsonl":
            lines = [json.loads(line) for line in content.splitlines()]
            changed = self.change(lines) if lines else [self.value()]
            data = "".join(json.dumps(x) + "\n" for x in changed)
        else:
            data = json.dumps(self.change(json.loads(content)))
        path.write_text(data, encoding="utf-8", errors="surrogatepass")

    def content(self, path: Path) -> None:
        """Changes bytes of a file."""
        data, dice = bytearray(path.read_bytes()), self.dice
        at = dice.randrange(len(data) + 1)
        way = dice.randrange(6)
        if way == 0 and data:
            for _ in range(dice.randrange(1, 9)):
                data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        elif way == 1:
            del data[at:]
        elif way == 2:
            data[at:at] = str(self.value()).encode("utf-8", "replace")
        elif way == 3:
            end = dice.randrange(at, len(data) + 1)
            data[at:at] = data[at:end] * dice.choice([1, 2, 50])
        elif way == 4:
            data[at : at + dice.randrange(64)] = bytes(dice.randrange(256) for _ in range(16))
        else:
            lines = bytes(data).split(b"\n")
            dice.shuffle(lines)
            data = bytearray(b"\n".join(lines))
        path.write_bytes(data[: 1 << 22])

    def whole(self, path: Path) -> None:
        """Puts something else in place of a file."""
        way = self.dice.randrange(7)
        path.unlink()
        if way == 0:
            path.symlink_to(self.guard.secret)
        elif way == 1:
            os.mkfifo(path)
        elif way == 2:
            path.mkdir()
        elif way == 3:
            path.write_bytes(b"")
        elif way == 4:
            path.write_bytes(pickle.dumps(Exploit(self.guard.outside / "unpickled")))
        elif way == 5:
            with open(path, "wb") as file:
                file.truncate(1 << 27)


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a document as (what holds it, its key there)."""
    todo = [document]
    while todo:
        holder = todo.pop()
        if isinstance(holder, dict | list):
            pairs = holder.items() if isinstance(holder, dict) else enumerate(holder)
            for key, value in list(pairs):
                yield holder, key
                todo.append(value)


def agree(root: Path) -> None:
    """Makes the hashes in a sample those of its files, where there are any."""
    files = {p for p in root.rglob("*") if p.is_file() and p.stat().st_size < 1 << 24}
    for marker in (p for p in files if p.name == "COMPLETE"):
        with contextlib.suppress(ValueError, OSError, AttributeError):
            hashes = json.loads(marker.read_text())
            there = {name: marker.parent / name for name in hashes}
            hashes |= {name: sha256(path) for name, path in there.items() if path in files}
            marker.write_text(json.dumps(hashes))
    for path in (p for p in files if p.name == "manifest.json"):
        with contextlib.suppress(ValueError, OSError, AttributeError, KeyError, TypeError):
            manifest = json.loads(path.read_text())
            if (index := path.parent / "index.safetensors") in files:
                manifest["index_sha256"] = sha256(index)
            for shard in manifest["shards"]:
                if (tar := path.parent / shard["name"]) in files:
                    shard |= {"sha256": sha256(tar), "bytes": tar.stat().st_size}
            path.write_text(json.dumps(manifest))
