"""Encoders of other packages: found by entry point, held to the contract, and no harm if broken.
And what docs/encoders.md says is so."""

from __future__ import annotations

import inspect
import itertools
import re
import runpy

import pytest

from crysforge.models.encoders import ENCODERS, Encoder, build_encoder
from tests import plugin
from tests.models.encoders import test_encoders

VALUES = {"training": [True, False], "quotient": [True, False], "kind": ["irregular", "rocksalt"]}
CONTRACT = [
    test
    for name, test in vars(test_encoders).items()
    if name.startswith("test_")
    and "name" in (parameters := inspect.signature(test).parameters)
    and {*parameters} <= {"name", *VALUES}
]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The page's package, with some encoders that are broken."""
    modules = {
        "broken_syntax": "class Net(\n",
        "broken_import": "raise RuntimeError('the driver\\nis too old')\n",
        "no_encoder": "from crysforge.models.layers.basic import RBF\n",
    }
    broken = {
        "absent": "no_such_module:Net",
        "imports": "broken_import:Net",
        "no_class": "no_encoder:Net",
        "no_encoder": "no_encoder:RBF",
        "syntax": "broken_syntax:Net",
    }
    with plugin.installed(tmp_path, monkeypatch, modules, **broken):
        yield broken


def test_the_contract_is_all_here():
    assert len(CONTRACT) >= 14
    assert test_encoders.test_packed_equals_one_by_one in CONTRACT


@pytest.mark.parametrize("test", CONTRACT, ids=lambda test: test.__name__)
def test_the_pages_encoder_keeps_the_contract(installed, test):
    names = [name for name in inspect.signature(test).parameters if name != "name"]
    for values in itertools.product(*(VALUES[name] for name in names)):
        test("filternet", **dict(zip(names, values, strict=True)))


def test_all_are_listed_one_a_line_whatever_is_broken(installed, capsys):
    runpy.run_module("crysforge.models.encoders", run_name="__main__")
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == sorted({*ENCODERS})
    assert {"filternet", "pddformer", *installed} <= set(lines)
    parameters = sum(p.numel() for p in build_encoder({"name": "filternet"}).parameters())
    assert lines["filternet"].split()[1:] == [f"{parameters:,}", "radius=5.0", "depth=3"]
    for name, target in installed.items():
        if name != "no_encoder":
            assert f"'{name}' ({target}) does not load: " in lines[name]
    assert "RuntimeError: the driver is too old" in lines["imports"]
    assert "no subclass of Encoder" in lines["no_encoder"]


def test_a_broken_plugin_is_an_error_where_it_is_asked_for(installed):
    assert build_encoder({"name": "schnet", "tiny": True}).dim == 16
    for name in installed:
        with pytest.raises(ValueError, match=f"'{name}'"):
            build_encoder({"name": name})
    with pytest.raises(ValueError, match="did you mean 'filternet'"):
        build_encoder({"name": "filtrenet"})


def test_an_encoder_that_does_not_build_is_a_line(monkeypatch, capsys):
    class Fails(Encoder):
        Config = ENCODERS["schnet"].Config

        def __init__(self, config) -> None:
            raise TypeError("no\nsuch thing")

    monkeypatch.setitem(ENCODERS._items, "fails", Fails)
    runpy.run_module("crysforge.models.encoders", run_name="__main__")
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("fails"))
    assert line.endswith("does not build with its default settings: TypeError: no such thing")


def test_the_pages_table_is_right():
    rows = re.findall(
        r"^\| `(.+?)` \| ([\d,]+) \| [\d,]+ \| (.+?) \| .*?\| (yes|no) \|", plugin.PAGE, re.M
    )
    assert [row[0] for row in rows] == sorted(
        n for n in ENCODERS if ENCODERS[n].__module__.startswith("crysforge.models.")
    )
    for name, parameters, neighbours, quotient in rows:
        encoder = build_encoder({"name": name})
        assert parameters == f"{sum(p.numel() for p in encoder.parameters()):,}", name
        number, rule = neighbours.split()
        if number == "all":
            assert encoder.graph.radius == 1e-3, name  # no edges: it forms the pairs itself
        else:
            limit = encoder.graph.neighbors if rule == "nearest" else encoder.graph.radius
            assert limit == float(number), name
        assert (quotient == "yes") == (encoder.graph.depth is not None), name


def test_where_a_plug_in_comes_from_is_known_by_its_sources(installed, tmp_path):
    """So that ranks can compare it."""
    assert ENCODERS.origin("pddformer") == ENCODERS.origin("no such encoder") == ""
    before = ENCODERS.origin("filternet")
    assert re.fullmatch(r"\w+ 1\.0, sources \w{16}", before)
    (source,) = [p for p in tmp_path.glob("*.py") if "FilterNet" in p.read_text()]
    source.write_text(source.read_text() + "\n")
    assert ENCODERS.origin("filternet") != before
    for name in installed:
        assert ENCODERS.origin(name)
