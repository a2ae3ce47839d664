"""The pages on reliability and security say what was tried: their tables are those of their
results, row for row."""

from __future__ import annotations

import pytest

from tests import reliability, security
from tests.attacks import ATTACKS
from tests.distributed.faults import owner_of
from tests.distributed.trials import KINDS, MOMENTS

CONFIG = reliability.Config()


def test_the_table_is_made_of_the_results():
    trials = reliability.read(reliability.Path(CONFIG.results))
    page = reliability.Path(str(CONFIG.page)).read_text(encoding="utf-8")
    assert reliability.insert(page, reliability.table(trials)) == page
    assert {t["fault"] for t in trials} <= {kind.name for kind in KINDS}


def test_the_table_of_attacks_is_made_of_the_results():
    tried = reliability.read(reliability.Path(CONFIG.attack_results))
    page = reliability.Path(str(CONFIG.page)).read_text(encoding="utf-8")
    table = reliability.attack_table(tried)
    assert reliability.insert(page, table, reliability.ATTACKED) == page
    assert {t["attack"] for t in tried} == {attack.name for attack in ATTACKS}
    assert all(t["held"] for t in tried)


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda m: m.name)
def test_a_moment_is_one_of_the_product(moment):
    """A function that moved would never be reached."""
    for engine in ("torch_engine:Torch", "deepspeed:DeepSpeed"):
        for at in filter(None, (moment.at, moment.within)):
            owner, name = owner_of(at.replace("base:", engine))
            assert callable(getattr(owner, name))


def test_what_the_table_counts():
    def trial(lost, recovered=True, exact=True):
        return {"fault": KINDS[0].name, "lost": lost, "recovered": recovered, "exact": exact}

    text = reliability.table([trial(1), trial(4), trial(2), trial(90, False, None)])
    assert text.splitlines()[2] == f"| {KINDS[0].name} | 4 | 3 | 2 | 4 | 3 |"
    assert "0 of these 4 name their commit" in text
    page = f"before\n{reliability.BEGIN}old\n{reliability.END}after\n"
    assert reliability.insert(page, "new\n") == page.replace("old", "new")
    tried = [{"attack": ATTACKS[0].name, "held": held} for held in (True, False, True)]
    assert reliability.attack_table(tried).splitlines()[2] == f"| {ATTACKS[0].name} | 3 | 2 |"


def test_what_was_tried_again_is_counted_once(tmp_path):
    path = tmp_path / "results.jsonl"
    for held in (False, True):
        reliability.note(path, {"attack": "a", "number": 1, "held": held})
        reliability.note(path, {"seed": 1, "lost": int(held)})
    one, other = reliability.read(path)
    assert one["held"] and other["lost"] == 1 and one["commit"] == reliability.commit()
    again = reliability.Config(again=True)
    assert reliability.known(again, [one, {"seed": 2}]) == [one]
    assert len(reliability.known(CONFIG, [one, {"seed": 2}])) == 2


def test_the_table_of_what_strangers_try_is_made_of_the_results():
    tried = security.read()
    page = security.PAGE.read_text(encoding="utf-8")
    assert security.insert(page, security.table(tried)) == page
    assert tried.keys() == {*security.names()}
    assert all(held == times > 0 for times, held in tried.values())
