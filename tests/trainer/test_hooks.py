from contextlib import contextmanager

import pytest
import torch

from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.trainer.hooks import StepHook
from runs import assert_same_run, metrics, trainer


class Watcher(StepHook):
    """Notes each call, and whether the main model has gradients by then."""

    active, name = True, "watching"

    def __init__(self):
        self.calls = []

    def prepare(self, accelerator, *, channels_last=False):
        self.calls.append("prepare")

    def begin_step(self, step, share_of_peak):
        self.calls.append(("begin", step, share_of_peak))

    @contextmanager
    def around_loss(self):
        self.calls.append("loss")
        yield
        self.calls.append("backward done")

    def after_backward(self, module, batch, max_grad_norm):
        assert "images" in batch and max_grad_norm == 0.5
        self.calls.append(("after", all(parameter.grad is not None for parameter in module.parameters())))
        return torch.tensor(2.0)


@pytest.fixture(scope="module")
def data():
    return prepare_images("digits", max_samples=20)


def test_a_hook_is_called_at_each_part_of_the_step_and_changes_nothing(data, tmp_path):
    hook = Watcher()
    settings = {"max_train_steps": 3, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    trainer(data, tmp_path / "with", step_hook=hook, **settings).train()
    of_a_batch = ["loss", "backward done", ("after", True)]
    assert [call for call in hook.calls if call[0] != "begin"] == ["prepare", *of_a_batch * 6]
    begins = [number for number, call in enumerate(hook.calls) if call[0] == "begin"]
    assert begins == [1, 8, 15] and [hook.calls[number][1] for number in begins] == [0, 1, 2]
    assert [hook.calls[number][2] for number in begins] == [0.5, 1.0, 1.0]  # of a warm-up of two steps
    assert metrics(tmp_path / "with")[-1]["adversary_loss"] == 2.0

    hook.active = False
    hook.calls.clear()
    trainer(data, tmp_path / "idle", step_hook=hook, **settings).train()
    trainer(data, tmp_path / "without", **settings).train()
    assert not [call for call in hook.calls if call[0] == "after"]
    assert_same_run(tmp_path / "idle", tmp_path / "without", 3)
