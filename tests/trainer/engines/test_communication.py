"""How DeepSpeed is told to sum gradients: beside the backward pass, and in few collectives."""

import pytest

from crysforge.trainer.engines.base import EngineConfig
from crysforge.trainer.engines.deepspeed import communication
from crysforge.trainer.loop.memory import state_bytes

PAPER = 134 * 10**6
"""Parameters of the paper's second stage."""


@pytest.mark.parametrize("parameters", [80, 5 * 10**6, PAPER, 10**9])
def test_buckets_hold_the_model_or_are_a_small_part_of_it(parameters):
    settings = communication(parameters, 8)
    bucket = settings["reduce_bucket_size"]
    assert bucket == settings["allgather_bucket_size"] and bucket % 512 == 0
    assert parameters <= bucket < parameters + 512 or 1.9e7 < bucket < 2.1e7
    if parameters >= PAPER:
        assert bucket < parameters / 5


def test_parts_are_reduced_one_by_one_where_they_are_large():
    together = {n: communication(PAPER, n)["use_multi_rank_bucket_allreduce"] for n in (8, 64, 512)}
    assert together == {8: False, 64: False, 512: True}
    assert communication(10**5, 2)["use_multi_rank_bucket_allreduce"]


@pytest.mark.parametrize("parameters", [5 * 10**6 + 1, PAPER])
def test_the_memory_model_has_two_buckets(parameters):
    plan = state_bytes(parameters, EngineConfig(zero_stage=1), ranks=8, deepspeed=True)
    bucket = communication(parameters, 8)["reduce_bucket_size"]
    assert plan.buffers == pytest.approx(2 * 4 * bucket, rel=1e-3)
