import pytest
import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from diffusers_ext.trainer.sharding import UnshardedModel, gathered, is_sharded, scattered
from runs import forget_accelerate


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    forget_accelerate()


def test_one_process_is_not_sharded(accelerator):
    assert not is_sharded(accelerator)


@pytest.mark.parametrize("engine", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_other_engines_are_refused_and_the_right_one_is_named(accelerator, engine):
    accelerator.state.distributed_type = engine
    with pytest.raises(ValueError, match=f"by FSDP2, got {engine.value}: launch with --use_fsdp --fsdp_version 2"):
        is_sharded(accelerator)


def test_full_tensors_stay_as_they_are():
    state = {"weight": torch.randn(3), "count": torch.tensor(2)}
    for result in (gathered(state), scattered(state, like=state)):
        assert all(result[name] is state[name] for name in state)


def test_an_unsharded_copy_takes_parameters_and_buffers_and_is_no_part_of_the_model():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).train()
    unsharded = UnshardedModel(model)
    model(torch.randn(4, 1, 5, 5))  # moves the statistics of the normalisation
    average = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copy = unsharded.of(average, model)
    assert not copy.training and model.training
    for name, value in copy.state_dict().items():
        expected = average[name] if name in average else before[name]
        assert torch.equal(value, expected), name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
