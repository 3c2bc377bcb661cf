"""Training on an accelerator in half precision: it learns, waits for nothing, and goes on where it was broken off."""

import pytest
import torch

from devices import DEVICES, PRECISIONS, no_host_sync
from diffusers_ext.conditions import line_art, luma
from diffusers_ext.data.batches import NUM_AUGMENTATION
from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.diffusion.tables import DeviceTable
from diffusers_ext.recipes.augmentation import augment
from diffusers_ext.recipes.denoising_objective import DenoisingObjective
from diffusers_ext.recipes.model_guidance import ModelGuidance
from diffusers_ext.schedulers import ExtDDIMScheduler
from runs import forget_accelerate, metrics, saved, stop_before_step, trainer
from tiny import tiny_unet


pytestmark = pytest.mark.device

ON_CPU = DEVICES == ["cpu"]
UNIFORM = DeviceTable(torch.rand(4, NUM_AUGMENTATION, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def data():
    return prepare_images("digits", max_samples=64)


def run_of(data, folder, *, importance_sampling=False, guidance=None, **settings):
    """A run of a small U-Net by `DenoisingObjective` on this machine's device."""
    forget_accelerate()
    scheduler = ExtDDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    options = {"importance_sampling": importance_sampling, "guidance": guidance}
    objective = DenoisingObjective(scheduler.schedule, scheduler.config.prediction_type, **options)
    model = tiny_unet(num_classes=10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)  # at which the first losses are large, and not so large that fp16 overflows for long
    settings = {"train_batch_size": 16, "learning_rate": 3e-3, "dataloader_num_workers": 0} | settings
    return trainer(data, folder, objective, model=model, cpu=ON_CPU, **settings)


@pytest.mark.parametrize("channels_last", [True] if ON_CPU else [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_loss_falls_in_half_precision(data, tmp_path, precision, channels_last):
    num_steps = 24 if ON_CPU else 60
    settings = {"mixed_precision": precision, "channels_last": channels_last, "max_train_steps": num_steps}
    run = run_of(data, tmp_path, logging_steps=num_steps // 4, learning_rate=1e-2, **settings)
    run.train()
    assert run.accelerator.device.type == DEVICES[0]
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in run.module.parameters())


@pytest.fixture
def deterministic():
    """As far as there are such kernels."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_goes_on_from_its_checkpoint(data, tmp_path, precision):
    """Weights, averages and optimizer, and with fp16 the scale of the loss; to the last bit on the CPU.

    A GPU may add up in another order in each run. Adam makes a whole step of a gradient that is rounding alone, so the norm
    of the difference is what is bounded; a lost state of the optimizer makes it 5 times the bound.
    """
    settings = {"mixed_precision": precision, "checkpointing_steps": 6, "max_train_steps": 9}
    run_of(data, tmp_path / "whole", **settings).train()
    stop_before_step(run_of(data, tmp_path / "parts", **settings), 8)
    torch.manual_seed(123)  # what ran before does not matter
    run_of(data, tmp_path / "parts", resume_from_checkpoint="latest", **settings).train()
    (whole, state, groups), (parts, other_state, other_groups) = (
        saved(tmp_path / run, 9) for run in ("whole", "parts")
    )
    assert whole.keys() == parts.keys() and groups == other_groups
    assert state["step"] == other_state["step"] and state["position"] == other_state["position"]
    for file in ("model.safetensors", "average.safetensors", "optimizer.bin"):
        first, second = (
            torch.cat([tensors[name].flatten().double().cpu() for name in tensors if name.startswith(file)])
            for tensors in (whole, parts)
        )
        assert len(first) > 1000
        assert (first - second).norm() <= (0 if ON_CPU else 0.01) * first.norm(), file
    if precision == "fp16":
        scalers = [torch.load(tmp_path / run / "checkpoint-9" / "scaler.pt") for run in ("whole", "parts")]
        assert scalers[0] == scalers[1]


@pytest.mark.product
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("importance_sampling", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_training_step_waits_for_the_device(data, tmp_path, precision, importance_sampling, guided):
    guidance = ModelGuidance(2.0, {"class_labels": torch.tensor([10])}) if guided else None
    run = run_of(
        data,
        tmp_path,
        importance_sampling=importance_sampling,
        guidance=guidance,
        mixed_precision=precision,
        max_train_steps=8,
        logging_steps=100,
    )
    step, steps_without = run._step, []

    def watched():
        if run.state.step < 4:  # the first ones set up caches and the optimizer's state
            return step()
        with no_host_sync(DEVICES[0]):
            step()
        steps_without.append(run.state.step)

    run._step = watched
    run.train()
    assert steps_without == [4, 5, 6, 7]


@pytest.mark.product
@pytest.mark.parametrize(
    "prepare", [luma, line_art, lambda images: augment(images, UNIFORM.on(images.device, images.dtype), 0.5)]
)
def test_what_is_made_of_a_batch_waits_for_nothing(prepare):
    """Once the tables are there."""
    images = torch.rand(4, 3, 16, 16, device=DEVICES[0]) * 2 - 1
    prepare(images)
    with no_host_sync(DEVICES[0]):
        prepare(images)
