import random

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed

from diffusers_ext.draws import PositionRandom, derived_seed, seed_generators


def test_positions_and_streams_have_numbers_of_their_own():
    random = PositionRandom(3)
    draws = {(s, p): tuple(random.at(s, p).random(4)) for s in range(3) for p in (0, 1, 2**40)}
    assert len(set(draws.values())) == 9
    assert tuple(random.at(1, 1).random(4)) == draws[1, 1]
    first = np.random.Generator(np.random.Philox(key=3, counter=np.array([0, 1, 0, 1], np.uint64))).random(4)
    assert tuple(first) == draws[1, 1]


def test_derived_seeds_depend_on_every_part():
    seeds = {
        derived_seed(seed, position, process) for seed in (0, 2**40) for position in range(50) for process in range(3)
    }
    assert len(seeds) == 300


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_generators_are_seeded_as_accelerate_does_it(seed):
    def draws():
        return [random.random(), np.random.rand(), torch.rand(()).item(), torch.randint(2**40, ()).item()]

    set_seed(seed)
    theirs = draws()
    assert draws() != theirs
    seed_generators(seed, torch.device("cpu"))
    assert draws() == theirs
    assert torch.initial_seed() == seed
