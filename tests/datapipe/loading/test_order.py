"""The order of crystals: once each, whatever the ranks, the workers and the interruptions."""

import json
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crysforge.datapipe.loading.lanes import default_lanes
from crysforge.datapipe.loading.order import OverLimit, Plan


def readers(plan, position, workers=1):
    """What every reader holds from a position on: per rank and worker its lanes' sequences."""

    def lane(number):
        for epoch, items in plan.windows(position, number):
            yield from ((epoch, int(item)) for item in items)

    return [
        [{k: lane(k) for k in range(*plan.lanes_of(rank, w, workers))} for w in range(workers)]
        for rank in range(plan.world_size)
    ]


def batches(plan, position=0, steps=None, workers=1):
    """Per step, per rank the (epoch, item) of its batch: workers' parts in lane order."""
    sources, out = readers(plan, position, workers), []
    for end in islice(plan.steps(position), steps):
        step = [
            [
                next(source)
                for lanes in rank
                for lane, source in lanes.items()
                for _ in range(plan.taken(end, lane) - plan.taken(position, lane))
            ]
            for rank in sources
        ]
        assert sum(map(len, step)) == end - position
        out.append(step)
        position = end
    return out


def flat(steps):
    return [x for step in steps for rank in step for x in rank]


@st.composite
def settings_of(draw, limits=False, train=True):
    """Arguments of a plan: any shapes, some of them unreasonable."""
    count = draw(st.integers(1, 70))
    batch = draw(st.integers(1, 24))
    lanes = draw(st.none() | st.integers(1, batch))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    items = np.sort(rng.choice(200, size=count, replace=False))
    values = {
        "items": items,
        "shards": items // draw(st.integers(1, 40)),
        "batch_size": batch,
        "lanes": lanes,
        "seed": draw(st.integers(0, 3)),
        "shuffle": draw(st.sampled_from([1, 7, 30, 1000])) if train else 0,
        "epochs": draw(st.sampled_from([0.3, 1, 2.5, 4])) if train else 1,
        "straddle": train,
    }
    if limits:
        atoms = rng.integers(1, 20, count)
        values["costs"] = {"atoms": atoms, "edges": atoms * rng.integers(10, 14, count)}
        bound = draw(st.sampled_from([19, 25, 60]))
        values["limits"] = {"atoms": bound, "edges": 13 * bound - 5 if bound > 19 else 13 * 19}
    return values


def world_sizes(values):
    return range(1, (values["lanes"] or default_lanes(values["batch_size"])) + 1)


@given(settings_of(), st.data())
def test_every_epoch_holds_every_item_once(values, data):
    plan = Plan(**values, world_size=data.draw(st.sampled_from(world_sizes(values))))
    count = len(plan)
    seen = Counter(flat(batches(plan)))
    assert set(seen.values()) == {1}
    assert sum(seen.values()) >= plan.stop
    for epoch in range(plan.stop // count):
        assert sorted(i for e, i in seen if e == epoch) == plan.items.tolist()


@given(settings_of(), st.data())
def test_ranks_and_workers_do_not_change_the_global_batches(values, data):
    one = batches(Plan(**values))
    plan = Plan(**values, world_size=data.draw(st.sampled_from(world_sizes(values))))
    for workers in (1, 2, 5):
        many = batches(plan, workers=workers)
        assert [[x for rank in step for x in rank] for step in many] == [s[0] for s in one]


@given(settings_of(limits=True), st.data())
def test_a_resumed_run_continues_the_uninterrupted_one(values, data):
    plan = Plan(**values, world_size=data.draw(st.sampled_from(world_sizes(values))))
    whole = batches(plan)
    done = data.draw(st.integers(0, len(whole)))
    position = sum(len(rank) for step in whole[:done] for rank in step)
    assert batches(plan, position) == whole[done:]


@given(settings_of(limits=True), st.data())
def test_a_changed_world_loses_and_repeats_nothing(values, data):
    worlds = st.sampled_from(world_sizes(values))
    values["epochs"] = 3
    first, second = (Plan(**values, world_size=data.draw(worlds)) for _ in range(2))
    begun = batches(first, steps=data.draw(st.integers(0, 8)))
    rest = batches(second, position=len(flat(begun)))
    seen = Counter(flat(begun + rest))
    assert set(seen.values()) == {1}
    for epoch in range(3):
        assert sorted(i for e, i in seen if e == epoch) == first.items.tolist()


@given(settings_of(limits=True), st.booleans(), st.data())
def test_limits_hold_and_no_step_is_shorter_than_they_ask(values, train, data):
    if not train:
        values |= {"shuffle": 0, "epochs": 1, "straddle": False}
    plan = Plan(**values, world_size=data.draw(st.sampled_from(world_sizes(values))))
    place = {int(item): i for i, item in enumerate(plan.items)}

    def within(step):
        return all(
            sum(plan.costs[name][place[i]] for _, i in rank) <= limit
            for name, limit in plan.limits.items()
            for rank in step
        )

    free = Plan(**{**values, "limits": {}}, world_size=plan.world_size)
    position = 0
    for end in plan.steps():
        assert within(batches_of(free, position, end))
        full = end - position == plan.batch_size or (not train and end == len(plan))
        assert full or not within(batches_of(free, position, end + 1))
        position = end
    assert plan.total_steps() == len(list(plan.steps()))


def batches_of(plan, start, stop):
    """Per rank the (epoch, item) at positions start … stop - 1."""
    return [
        [
            x
            for lane, source in rank[0].items()
            for x in islice(source, plan.taken(stop, lane) - plan.taken(start, lane))
        ]
        for rank in readers(plan, start)
    ]


@given(settings_of(limits=True, train=False), st.integers(1, 9), st.booleans())
def test_evaluation_takes_every_item_once(values, world_size, limited):
    if not limited:
        values["limits"] = {}
    values["lanes"] = None
    plan = Plan(**values, world_size=world_size)
    steps = batches(plan)
    assert sorted(flat(steps)) == [(0, i) for i in plan.items]
    assert len(steps) == plan.total_steps()


@given(settings_of())
def test_full_steps_give_ranks_equal_numbers(values):
    lanes = values["lanes"] = default_lanes(values["batch_size"])
    for world_size in (w for w in (1, 2, 3, 4) if lanes % w == 0):
        for step in batches(Plan(**values, world_size=world_size)):
            assert {len(rank) for rank in step} == {values["batch_size"] // world_size}


@given(settings_of())
def test_a_large_set_is_read_shard_by_shard(values):
    """Cutting the sequence of shards into lanes splits no shard more often than it must."""
    values["shuffle"] = min(values["shuffle"], len(values["items"]) - 1) or 1
    plan = Plan(**values)
    shard = dict(zip(plan.items.tolist(), plan.shards.tolist(), strict=True))
    pairs = set()
    for lane in range(plan.num_lanes):
        before: set[int] = set()
        for epoch, items in plan.windows(0, lane):
            if epoch > 0:
                break
            shards = {shard[int(i)] for i in items}
            assert len(shards & before) <= 1
            pairs |= {(lane, s) for s in shards}
            before |= shards
    assert len(pairs) <= len(set(shard.values())) + plan.num_lanes - 1


def test_a_set_that_fits_the_window_is_shuffled_whole():
    items = np.arange(1000)
    plan = Plan(items=items, shards=items // 100, batch_size=10, epochs=None)
    first, second = (np.array([i for _, i in flat(batches(plan, 1000 * e, 100))]) for e in (0, 1))
    for order in (first, second):
        assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.15
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15


def test_a_batch_mixes_the_shards_of_a_large_set():
    plan = Plan(items=np.arange(4000), shards=np.arange(4000) // 100, batch_size=64, shuffle=640)
    for step in batches(plan, steps=20):
        assert len({i // 100 for _, i in step[0]}) > 20


def test_lanes_read_their_windows_at_different_steps():
    plan = Plan(items=np.arange(4000), shards=np.arange(4000) // 100, batch_size=64, shuffle=640)
    firsts = [len(next(plan.windows(0, lane))[1]) for lane in range(64)]
    assert max(Counter(firsts).values()) <= 7


def test_budgets_fill_the_ranks_evenly():
    """Where the limit and not the batch size ends a step, no rank is left empty."""
    count = 2000
    atoms = np.random.default_rng(0).integers(1, 30, count)
    plan = Plan(
        items=np.arange(count),
        shards=np.zeros(count, int),
        batch_size=512,
        world_size=8,
        costs={"atoms": atoms},
        limits={"atoms": 200},
    )
    for step in batches(plan):
        assert min(len(rank) for rank in step) >= max(len(rank) for rank in step) - 2


def test_order_is_the_same_for_ever():
    """A released order must not change: a run that was begun with it could not go on."""
    items = np.arange(12)
    whole = Plan(items=items, shards=items // 3, batch_size=4, seed=1)
    windowed = Plan(items=items, shards=items // 3, batch_size=4, seed=1, shuffle=8)
    assert [i for _, i in flat(batches(whole))] == [1, 2, 11, 3, 7, 8, 6, 10, 4, 0, 9, 5]
    assert [i for _, i in flat(batches(windowed))] == [3, 6, 1, 9, 4, 8, 0, 10, 5, 7, 2, 11]


def test_state_is_small_json_and_knows_no_ranks():
    values = {"items": np.arange(50), "shards": np.zeros(50, int), "batch_size": 8}
    state = json.loads(json.dumps(Plan(**values, fingerprint="abc").state(24)))
    assert len(json.dumps(state)) < 500
    assert Plan(**values, fingerprint="abc", world_size=4, epochs=9).position_in(state) == 24
    for change, message in [
        ({"fingerprint": "abd"}, "the data set has changed"),
        ({"items": np.arange(50) * 2}, "other crystals are selected"),
        ({"seed": 5}, "seed=0, now it is 5"),
        ({"shuffle": 9}, "shuffle=16384, now it is 9"),
        ({"batch_size": 9}, "lanes=8, now it is 9"),
    ]:
        with pytest.raises(ValueError, match=message):
            Plan(**{**values, "fingerprint": "abc", **change}).position_in(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": np.zeros(0, int)}, "nothing to train on"),
        ({"items": np.array([3, 2])}, "ascending"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"epochs": 0}, "epochs more than 0"),
        ({"lanes": 99}, "lanes must be 1..batch_size=8"),
        ({"world_size": 9}, "multiple of the number of ranks, or set lanes=9"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    values = {"items": np.arange(9), "shards": np.zeros(9, int), "batch_size": 8, **change}
    values["shards"] = np.zeros(len(values["items"]), int)
    with pytest.raises(ValueError, match=message):
        Plan(**values)


def test_a_crystal_over_the_limit_is_named():
    values = {"items": np.array([4, 7]), "shards": np.zeros(2, int), "batch_size": 2}
    with pytest.raises(OverLimit, match=r"it has 300 atoms.*max_atoms=200 to 300") as error:
        Plan(**values, costs={"atoms": np.array([5, 300])}, limits={"atoms": 200})
    assert error.value.item == 7


def test_a_run_without_end_has_no_length():
    plan = Plan(items=np.arange(3), shards=np.zeros(3, int), batch_size=2, epochs=None)
    assert all(b - a == 2 for a, b in pairwise(islice(plan.steps(), 50)))
    with pytest.raises(ValueError, match="no number of steps"):
        plan.total_steps()
