"""A share of `benchmarks/fuzz.py`, which takes minutes as a whole."""

from functools import partial

import huggingface_hub
import pytest

from benchmarks import fuzz


@pytest.fixture(scope="module")
def classes():
    return fuzz.option_classes()


def test_configs_of_schedulers_work_or_are_refused_in_a_sentence():
    assert fuzz.fuzz("scheduler", fuzz.try_scheduler, range(300)) == []


def test_options_of_scripts_are_refused_in_a_sentence_or_come_back_as_they_are(classes):
    assert len(classes) >= 10
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    assert fuzz.fuzz("options", partial(fuzz.try_options, classes=classes), range(60)) == []
    assert huggingface_hub.constants.HF_HUB_OFFLINE == before


def test_what_fails_is_found():
    """An error of PyTorch, one without a sentence, a number that is none, and what takes too long."""

    def attempt(seed):
        match seed:
            case 0:
                fuzz.torch.zeros(-1)
            case 1:
                raise ValueError("no")
            case 2:
                raise FloatingPointError("a sample at timestep 3 is not finite")
            case 3:
                while True:
                    pass
        return "works"

    found = fuzz.fuzz("attempt", attempt, range(5), seconds_each=0.2)
    assert [line.split(":")[0] for line in found] == [f"attempt {seed}" for seed in range(4)]


def test_a_time_ends_it_and_how_many_were_tried_is_said(capsys):
    def attempt(seed):
        end = fuzz.time.process_time() + 0.02
        while fuzz.time.process_time() < end:
            pass
        return "works"

    assert fuzz.fuzz("attempt", attempt, range(7, 1000), show=True, max_seconds=0.05) == []
    assert "attempt: 3 from 7 on: 3 works, 0 fail; 0 s of computing" in capsys.readouterr().out
