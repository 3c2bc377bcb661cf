"""DDIM backwards: exact where it can be, and converging on a trained model as in the paper."""

import pytest
import torch
from diffusers import DDIMInverseScheduler
from sklearn.datasets import load_digits

from diffusers_ext.diffusion.betas import make_betas
from diffusers_ext.diffusion.noising import PREDICTION_TYPES, NoiseSchedule, add_noise
from diffusers_ext.diffusion.timesteps import TIMESTEP_SPACINGS
from diffusers_ext.schedulers import ExtDDIMInverseScheduler, ExtDDIMScheduler, VPredictionScheduler
from gaussian_oracle import VARIANCE, model_output


@pytest.mark.product
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_reverse_step_undoes_step(prediction_type, spacing):
    scheduler = ExtDDIMScheduler(prediction_type=prediction_type, timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(13)
    output, x_t = torch.randn(2, 13, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    timesteps = scheduler.timesteps
    # Of x_0-predictions the last step forgets x_t, so no output can take it back.
    kept = slice(None, -1) if prediction_type == "sample" else slice(None)
    timesteps, output, x_t = timesteps[kept], output[kept], x_t[kept]
    x_s = scheduler.step(output, timesteps, x_t).prev_sample
    back = scheduler.reverse_step(output, timesteps, x_s, model_input=x_t)
    torch.testing.assert_close(back.prev_sample, x_t)
    torch.testing.assert_close(back.pred_original_sample, scheduler.step(output, timesteps, x_t).pred_original_sample)


def test_v_rotation_is_undone_at_zero_terminal_snr():
    scheduler = VPredictionScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    v, x_t = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_s = scheduler.step(v, 999, x_t).prev_sample
    torch.testing.assert_close(scheduler.reverse_step(v, 999, x_s, model_input=x_t).prev_sample, x_t)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_inversion_is_exact_after_refinement(prediction_type):
    """Image to latent to image, with a model that depends on its input."""
    scheduler = ExtDDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(20)
    image = VARIANCE**0.5 * torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def denoise(x_t, t):
        return model_output(scheduler.schedule, prediction_type, x_t, t)

    def decode(x):
        for t in scheduler.timesteps:
            x = scheduler.step(denoise(x, t), t, x).prev_sample
        return x

    errors = [
        (decode(scheduler.invert(denoise, image, num_refinements=n)) - image).abs().max().item() for n in (0, 1, 30)
    ]
    assert errors[2] < 1e-6 < errors[1] < errors[0]


def test_inverse_scheduler_is_the_reverse_step():
    config = {"timestep_spacing": "trailing"}
    forward, inverse = ExtDDIMScheduler(**config), ExtDDIMInverseScheduler(**config)
    assert isinstance(inverse, DDIMInverseScheduler)
    forward.set_timesteps(13)
    inverse.set_timesteps(13)
    assert torch.equal(inverse.timesteps, forward.timesteps.flip(0))
    output, sample = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in inverse.timesteps:
        expected = forward.reverse_step(output, t, sample, return_dict=False)
        torch.testing.assert_close(inverse.step(output, t, sample, return_dict=False), expected, rtol=0, atol=0)


@pytest.fixture(scope="module")
def trained_model():
    """A small network trained on digits for a few seconds, and images it has not seen."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1
    schedule = NoiseSchedule(make_betas("linear", 1000))
    frequencies = torch.arange(1, 9) * torch.pi

    class Denoiser(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(64 + 17, 256),
                torch.nn.SiLU(),
                torch.nn.Linear(256, 256),
                torch.nn.SiLU(),
                torch.nn.Linear(256, 64),
            )

        def forward(self, x_t, t):
            u = (torch.as_tensor(t).float() / 1000).expand(len(x_t))[:, None]
            return self.layers(torch.cat([x_t, u, (u * frequencies).sin(), (u * frequencies).cos()], dim=1))

    model = Denoiser()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(600):
        x0 = images[torch.randint(1500, [256])]
        t, eps = torch.randint(1000, [256]), torch.randn(256, 64)
        loss = (model(add_noise(x0, eps, schedule.level(t, x0)), t) - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False), images[1500:]


def test_encode_decode_error_falls_with_the_number_of_steps(trained_model):
    """The pattern of DDIM's Table 2: .014 .0065 .0023 .0009 .0004 for 10 to 200 steps, roughly of first order."""
    model, images = trained_model
    scheduler = ExtDDIMScheduler(clip_sample=False)
    errors = []
    for num_steps in (10, 20, 50, 100, 200):
        scheduler.set_timesteps(num_steps)
        x = scheduler.invert(model, images)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x).prev_sample
        errors.append(((x - images) / 2).square().mean().item())  # data in [0, 1], as the paper's
    assert all(fewer > more for fewer, more in zip(errors, errors[1:], strict=False))
    assert errors[-1] < errors[0] / 20
    assert errors[-1] < 2e-3
