import pytest
import torch
from torch import nn

from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.trainer.adversary import Adversary
from runs import assert_same_run, metrics, saved, stop_before_step, trainer


@pytest.fixture(scope="module")
def data():
    return prepare_images("digits", max_samples=20)


def critic():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3))


def hinge(module, batch):
    score = module(torch.cat([batch["images"], batch["guess"]]))
    real, guess = score.chunk(2)
    return ((1 - real).relu() + (1 + guess).relu()).mean()


class Contest:
    """A denoiser that is scored by its error and, where the adversary is active, by what that makes of its output."""

    def __init__(self, loss=hinge, **settings):
        self.adversary = Adversary(critic(), loss, **{"learning_rate": 0.02} | settings)

    def __call__(self, model, batch):
        batch["guess"] = model(batch["images"] + batch["noise"])
        loss = (batch["guess"] - batch["images"]).square().mean()
        return loss - 0.1 * self.adversary.module(batch["guess"]).mean() if self.adversary.active else loss

    def trainer(self, data, output_dir, **settings):
        return trainer(data, output_dir, self, step_hook=self.adversary, **settings)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_both_networks_learn_as_in_the_loop_written_out(data, tmp_path, accumulation):
    """The same batches, two plain optimizers, no freezing: gradients are taken for one network at a time."""
    contest = Contest()
    settings = {"gradient_accumulation_steps": accumulation, "dropout": 0.0, "use_ema": False, "max_grad_norm": 0.5}
    run = contest.trainer(data, tmp_path / "run", **settings)
    batches = []

    def note(batch):
        batches.append({name: value.clone() for name, value in batch.items()})
        return batch

    run.to_device.prepare_batch = note
    run.train()

    main = trainer(data, tmp_path / "other", dropout=0.0).module
    other = critic()
    optimizers = [
        torch.optim.AdamW(main.parameters(), betas=(0.9, 0.99), weight_decay=0.0),
        torch.optim.AdamW(other.parameters(), betas=(0.5, 0.9), weight_decay=0.0),
    ]
    parameters = [list(main.parameters()), list(other.parameters())]
    for step in range(12):
        share = run.learning_rate.at(step, 0.0) / 0.01
        sums = [[torch.zeros_like(p) for p in one] for one in parameters]
        for batch in batches[step * accumulation : (step + 1) * accumulation]:
            guess = main(batch["images"] + batch["noise"])
            loss = (guess - batch["images"]).square().mean() - 0.1 * other(guess).mean()
            for total, grad in zip(sums[0], torch.autograd.grad(loss, parameters[0]), strict=True):
                total += grad / accumulation
            loss = ((1 - other(batch["images"])).relu() + (1 + other(guess.detach())).relu()).mean()
            for total, grad in zip(sums[1], torch.autograd.grad(loss, parameters[1]), strict=True):
                total += grad / accumulation
        for optimizer, one, grads, peak in zip(optimizers, parameters, sums, (0.01, 0.02), strict=True):
            for parameter, grad in zip(one, grads, strict=True):
                parameter.grad = grad
            torch.nn.utils.clip_grad_norm_(one, 0.5)
            optimizer.param_groups[0]["lr"] = peak * share
            optimizer.step()

    for mine, theirs in ((run.module, main), (contest.adversary.module, other)):
        for (name, value), expected in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert not torch.equal(contest.adversary.module[0].weight, critic()[0].weight)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_with_an_adversary_resumes_bit_for_bit(data, tmp_path, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "checkpointing_steps": 7}
    Contest(start_step=5).trainer(data, tmp_path / "whole", **settings).train()
    stop_before_step(Contest(start_step=5).trainer(data, tmp_path / "parts", **settings), 10)
    Contest(start_step=5).trainer(data, tmp_path / "parts", resume_from_checkpoint="latest", **settings).train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 12)
    tensors = saved(tmp_path / "whole", 12)[0]
    assert not torch.equal(tensors["model_1.safetensors: 0.weight"], critic()[0].weight)
    assert any(name.startswith("optimizer_1.bin") for name in tensors)
    assert ["adversary_loss" in record for record in metrics(tmp_path / "whole")] == [False, True, True, True]


def test_before_its_start_the_adversary_stays_as_it_was(data, tmp_path):
    contest = Contest(start_step=12)
    contest.trainer(data, tmp_path / "run").train()
    for value, expected in zip(contest.adversary.module.parameters(), critic().parameters(), strict=True):
        assert torch.equal(value, expected)


def test_no_gradient_crosses_to_the_other_network(data, tmp_path):
    """Even from an adversary whose loss calls the main network itself, or keeps what that network made."""
    seen = []

    def careless(module, batch):
        guess = run.module(batch["images"])
        seen.append((guess.requires_grad, batch["guess"].requires_grad, main_grads()))
        return (module(guess) * batch["guess"].mean()).mean()

    def main_grads():
        return [None if p.grad is None else p.grad.clone() for p in run.module.parameters()]

    contest = Contest(careless)
    run = contest.trainer(data, tmp_path / "run", max_train_steps=3)
    after_backward = contest.adversary.after_backward

    def watched(*args):
        assert all(p.grad is None for p in contest.adversary.module.parameters())
        loss = after_backward(*args)
        for before, after in zip(seen[-1][2], main_grads(), strict=True):
            assert torch.equal(before, after)
        return loss

    contest.adversary.after_backward = watched
    run.train()
    assert len(seen) == 3 and not any(guess or kept for guess, kept, _ in seen)
    assert all(p.requires_grad for p in [*run.module.parameters(), *contest.adversary.module.parameters()])


def test_an_adversary_whose_loss_is_not_finite_is_named(data, tmp_path):
    contest = Contest(lambda module, batch: hinge(module, batch) * float("inf"))
    with pytest.raises(FloatingPointError, match=r"the adversary's loss is not finite \(inf\) at step 1"):
        contest.trainer(data, tmp_path / "run").train()


def test_an_adversary_that_cannot_run_is_refused(data, tmp_path):
    with pytest.raises(
        ValueError, match="learning_rate must be positive and its start_step not negative, got 0 and 0"
    ):
        Adversary(critic(), hinge, learning_rate=0.0)
