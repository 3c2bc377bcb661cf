"""Pipelines of sequences: arrays in own units, whose distribution is known where the data are a Gaussian process."""

import numpy as np
import pytest
import torch

from diffusers_ext import DiffusionPipeline, ExtDDIMScheduler, GuidedDiffusionPipeline, UNetModel
from diffusers_ext.diffusion.noising import predict_eps, training_target


LENGTH, CHANNELS = 12, 2
SCALE = {"shift": [50.0, -3.0], "scale": [10.0, 0.5]}


def covariance():
    """Of a Gaussian process on the scale of the network: smooth in time, and the channels go together."""
    time = torch.arange(LENGTH, dtype=torch.float64)
    smooth = 0.09 * torch.exp(-0.5 * ((time[:, None] - time) / 3).square()) + 0.01 * torch.eye(LENGTH)
    return torch.kron(torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64), smooth)


class GaussianProcessDenoiser(UNetModel):
    """The exact network for it: E[x_0 | x_t] = alpha C (alpha^2 C + sigma^2)^-1 x_t."""

    @classmethod
    def make(cls, scheduler):
        model = cls((LENGTH,), CHANNELS, CHANNELS, block_out_channels=(4,), layers_per_block=1, dims=1)
        model.scheduler = scheduler
        return model

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        schedule = self.scheduler.schedule
        level = schedule.level(timestep, sample)
        alpha, sigma = (each.flatten()[0].double() for each in (level.alpha, level.sigma))
        gain = (
            alpha * covariance() @ torch.linalg.inv(alpha**2 * covariance() + sigma**2 * torch.eye(LENGTH * CHANNELS))
        )
        x0 = (sample.flatten(1).double() @ gain.T).view_as(sample).to(sample)
        return (training_target(x0, predict_eps(x0, sample, level), level, self.scheduler.config.prediction_type),)


def gaussian_process():
    scheduler = ExtDDIMScheduler(clip_sample=False, prediction_type="v_prediction", beta_schedule="cosine")
    pipe = GuidedDiffusionPipeline(GaussianProcessDenoiser.make(scheduler), scheduler, value_scale=SCALE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def white(number):
    """Noise of exactly mean 0 and covariance 1, so that what follows from it linearly has no error of sampling."""
    noise = torch.randn(number, LENGTH * CHANNELS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = noise - noise.mean(0)
    noise = noise @ torch.linalg.inv(torch.linalg.cholesky(noise.T @ noise / number)).T
    return noise.view(number, CHANNELS, LENGTH).float()


def test_sequences_of_a_gaussian_process_have_its_covariance_in_own_units():
    arrays = gaussian_process()(latents=white(64), num_inference_steps=250).images
    assert isinstance(arrays, np.ndarray) and arrays.shape == (64, LENGTH, CHANNELS)
    values = torch.from_numpy(arrays).double().movedim(-1, 1).flatten(1)
    units = torch.tensor(SCALE["scale"], dtype=torch.float64).repeat_interleave(LENGTH)
    shifts = torch.tensor(SCALE["shift"], dtype=torch.float64).repeat_interleave(LENGTH)
    assert torch.allclose(values.mean(0), shifts, atol=1e-4)
    measured = (values - shifts).T @ (values - shifts) / len(values)
    expected = units[:, None] * covariance() * units
    # 250 steps of the probability flow miss a standard deviation by less than a percent.
    assert (measured - expected).norm() < 0.02 * expected.norm()


def network(**config):
    config = {"in_channels": CHANNELS, "out_channels": CHANNELS, "dims": 1} | config
    return UNetModel(sample_size=16, block_out_channels=(8,), layers_per_block=1, **config)


def test_arrays_are_what_a_pipeline_of_sequences_gives_by_default(tmp_path):
    pipe = GuidedDiffusionPipeline(network(), ExtDDIMScheduler(), value_scale=SCALE)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.config.value_scale == SCALE
    settings = {"num_inference_steps": 2, "batch_size": 2}
    arrays, tensors = (
        loaded(**settings, generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)], **more).images
        for more in ({}, {"output_type": "pt"})
    )
    assert np.array_equal(arrays, tensors.movedim(1, -1).numpy()) and arrays.shape == (2, 16, CHANNELS)
    with pytest.raises(ValueError, match="output_type must be 'np' or 'pt' for this model"):
        loaded(output_type="pil")


@pytest.mark.parametrize(
    "config, scale, message",
    [
        ({}, {"shift": [0.0], "scale": [1.0]}, "a shift and a scale for each of 2 channels, got 1"),
        ({}, {"shift": [0.0, 0.0]}, "must be a dict of lists, shift and scale"),
        ({}, {"shift": [0.0, 0.0], "scale": [1.0]}, "a shift and a scale for each channel, got 2 and 1"),
        ({}, {"shift": [0.0, float("nan")], "scale": [1.0, 1.0]}, "finite shifts and of scales from 0 on"),
        ({}, {"shift": [0.0, 0.0], "scale": [1.0, -1.0]}, "finite shifts and of scales from 0 on"),
        ({"dims": 2}, SCALE, "value_scale is of sequences, and the denoiser makes images"),
    ],
)
def test_a_scale_of_values_that_does_not_fit_is_refused(config, scale, message):
    with pytest.raises(ValueError, match=message):
        GuidedDiffusionPipeline(network(**config), ExtDDIMScheduler(), value_scale=scale)


@pytest.mark.parametrize(
    "given, message",
    [
        (np.zeros((16, 3)), "image must have 2 channels and 1 dimensions of space, channels last, got shape"),
        (np.zeros((12, 2)), "image must be of the model's size, 16, got 12"),
        ([np.zeros((16, 2)), np.zeros((12, 2))], "sequences of one length, got 12, 16"),
        (np.full((16, 2), np.nan), "image must have finite values, got NaN or infinity"),
    ],
)
def test_sequences_to_start_from_must_fit(given, message):
    pipe = GuidedDiffusionPipeline(network(), ExtDDIMScheduler(), value_scale=SCALE)
    with pytest.raises(ValueError, match=message):
        pipe(image=given, strength=0.5)
