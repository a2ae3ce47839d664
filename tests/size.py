"""Lines per folder, of the core and in all: python tests/size.py

The core is what a crystal passes from CSV to loss, loop and checkpoint, with one encoder.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("crysforge", "datapipe", "models", "trainer", "launch")
CORE = [
    "datapipe/schema.py",
    "datapipe/common",
    "datapipe/crystals",
    "datapipe/storage",
    "datapipe/graphs",
    "datapipe/loading",
    "datapipe/sources/base.py",
    "datapipe/sources/read.py",
    "datapipe/sources/parse.py",
    "datapipe/sources/csv_files.py",
    "datapipe/preparing/config.py",
    "datapipe/preparing/prepare.py",
    "datapipe/preparing/write.py",
    "datapipe/preparing/work.py",
    "datapipe/preparing/splitting/splits.py",
    "datapipe/cif",
    "models/registry.py",
    "models/ops",
    "models/layers/basic.py",
    "models/layers/readout.py",
    "models/encoders/base.py",
    "models/encoders/pddformer.py",
    "models/denoisers/dit.py",
    "models/objectives/vae.py",
    "models/objectives/flow.py",
    "trainer/base",
    "trainer/stages/base.py",
    "trainer/stages/vae.py",
    "trainer/stages/joint.py",
    "trainer/stages/finetune.py",
    "trainer/engines",
    "trainer/loop",
    "trainer/runs",
    "trainer/jobs",
    "launch/prepare.py",
    "launch/pretrain.py",
    "launch/finetune.py",
]
APART = ("datapipe/crystals/prototypes.py", "datapipe/crystals/elements.py")
"""Files of a core folder that the way from CSV to loss does not pass."""


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def files(*tops: str) -> list[Path]:
    """Python files below some folders, or these themselves."""
    found: list[Path] = []
    for top in tops:
        path = ROOT / top
        found += [path] if path.is_file() else sorted(path.rglob("*.py"))
    return found


def main() -> None:
    count: Counter[str] = Counter()
    for path in files(*PRODUCT):
        count[path.parent.relative_to(ROOT).as_posix()] += lines(path)
    for name, number in sorted(count.items()):
        print(f"{number:>7,}  {name}")
    apart = {ROOT / name for name in APART}
    core = sum(lines(p) for p in files(*CORE) if p not in apart)
    tests, benchmarks = (sum(map(lines, files(top))) for top in ("tests", "benchmarks"))
    print(f"{core:>7,}  core\n{sum(count.values()):>7,}  product, the core among it")
    print(f"{tests:>7,}  tests\n{benchmarks:>7,}  benchmarks")


if __name__ == "__main__":
    main()
