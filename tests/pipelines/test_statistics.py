"""Images go through a pipeline with statistics as through one without: normalised before the network, restored after it."""

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image

from diffusers_ext import DataStatisticsModel, ExtDDIMScheduler, ExtDDPMScheduler, GuidedDiffusionPipeline, UNetModel
from diffusers_ext.calibration.examples import Examples
from diffusers_ext.calibration.subject import Subject
from diffusers_ext.calibration.variance import _decoder
from diffusers_ext.data.batches import BatchOptions, TrainingBatches
from diffusers_ext.data.latent_cache import Normaliser
from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.diffusion.analytic_variance import VISIBLE_NOISE
from diffusers_ext.evaluation.labelled_images import LabelledImages
from diffusers_ext.pipelines.inversion import deterministic
from diffusers_ext.recipes.sample_grids import draw_denoising


class PointDenoiser(UNetModel):
    """The exact network, of x_0, for data that are one sample for each label: `points`, the last of no label."""

    @classmethod
    def make(cls, points):
        network = cls(8, 1, 1, block_out_channels=(8, 16), layers_per_block=1, num_classes=len(points) - 1)
        network.points = points
        return network

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        output = self.points[class_labels].to(sample)
        return UNet2DOutput(sample=output) if return_dict else (output,)


def statistics():
    mean = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    parts = {"sample_size": 8, "in_channels": 1, "num_classes": 3, "data_mean": "class", "data_scale": "overall"}
    return DataStatisticsModel.of(mean, torch.tensor([0.2]), **parts)


# White and black pixels: of normalised ones the largest.
IMAGES = torch.where(torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.5, -1.0, 1.0)


def pipeline(scheduler=ExtDDIMScheduler, **config):
    data = statistics()
    denoiser = PointDenoiser.make(data.normalise(IMAGES, torch.arange(4)))
    options = {"prediction_type": "sample", "clip_sample_range": data.largest, "timestep_spacing": "trailing"}
    pipe = GuidedDiffusionPipeline(denoiser, scheduler(**options | config), statistics=data)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def as_images(x):
    return x / 2 + 0.5


@pytest.mark.parametrize("scheduler", [ExtDDIMScheduler, ExtDDPMScheduler])
def test_the_images_of_each_label_are_made_with_its_mean(scheduler):
    pipe = pipeline(scheduler)
    images = pipe(class_labels=[0, 2, 1], num_inference_steps=4, output_type="pt").images
    torch.testing.assert_close(images, as_images(IMAGES[[0, 2, 1]]), atol=1e-4, rtol=0)
    with pytest.warns(UserWarning, match="they get the mean of all data"):
        images = pipe(num_inference_steps=4, output_type="pt").images
    torch.testing.assert_close(images, as_images(IMAGES[3:]), atol=1e-4, rtol=0)
    grey = pipe(class_labels=[0], num_inference_steps=1, guidance_scale=1.0, output_type="latent").images
    torch.testing.assert_close(grey, pipe.denoiser.points[:1], atol=1e-4, rtol=0)  # latents are left normalised


def test_a_scheduler_that_clips_to_the_range_of_images_is_warned_of_and_thresholding_refused():
    narrow = pipeline(clip_sample_range=1.0)
    with pytest.warns(UserWarning, match=rf"clip_sample_range={statistics().largest:.6g}"):
        images = narrow(class_labels=0, num_inference_steps=4, output_type="pt").images
    assert (images - as_images(IMAGES[:1])).abs().max() > 0.3  # which is what it does to them
    with pytest.raises(ValueError, match="thresholding must be False for a pipeline with statistics"):
        pipeline(thresholding=True)(class_labels=0)


def test_given_images_come_back_and_known_pixels_stay_exactly():
    pipe, picture = pipeline(), torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    same = pipe(class_labels=1, image=picture, strength=0, output_type="pt").images
    torch.testing.assert_close(same, picture, atol=1e-6, rtol=0)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4, :] = 1
    filled = pipe(class_labels=1, image=picture, mask_image=mask, num_inference_steps=4, output_type="pt").images
    kept = 2 * picture - 1
    assert torch.equal(filled[..., 4:, :], as_images(kept)[..., 4:, :])
    torch.testing.assert_close(filled[..., :4, :], as_images(IMAGES[1:2])[..., :4, :], atol=1e-4, rtol=0)


def test_inversion_starts_from_the_normalised_and_an_interpolation_ends_at_the_images():
    """The network answers with one image, so that only that one is made again from its noise."""
    pipe = pipeline()
    own = as_images(IMAGES[2:3])
    noise = pipe.invert(own, class_labels=2, num_inference_steps=10)
    _, inverse = deterministic(pipe.scheduler)
    inverse.set_timesteps(10)
    point = pipe.denoiser.points[2:3]
    torch.testing.assert_close(noise, inverse.invert(lambda x, t: point, point, 0), atol=1e-4, rtol=1e-4)
    again = pipe(class_labels=2, latents=noise, num_inference_steps=10, output_type="pt").images
    torch.testing.assert_close(again, own, atol=1e-4, rtol=0)
    ends = pipe.interpolate(own, own, num_images=2, class_labels=2, num_inference_steps=4, output_type="pt")
    torch.testing.assert_close(ends, own.expand(2, -1, -1, -1), atol=1e-4, rtol=0)


def test_the_strip_of_a_denoising_ends_in_the_image(tmp_path):
    pipe = pipeline()
    draw_denoising(pipe, tmp_path / "strip.png", label=0, num_inference_steps=2, columns=2)
    strip = np.asarray(Image.open(tmp_path / "strip.png").convert("L"))
    cell = strip[-64 - 1 : -1, -64 - 1 : -1] if strip.shape[0] > 128 else strip[-8:, -8:]
    side = cell.shape[0] // 8
    got = cell[side // 2 :: side, side // 2 :: side] / 255
    expected = as_images(IMAGES[0, 0]).numpy()
    assert np.abs(got - expected).mean() < 0.1


def test_the_calibration_looks_at_normalised_images_and_counts_bits_of_the_data():
    pipe = pipeline()
    subject = Subject.of(pipe, 4)
    pixels = ((IMAGES[:3] + 1) * 127.5).round().to(torch.uint8)
    examples = Examples(LabelledImages(pixels, torch.arange(3), ["a", "b", "c"])).at_most(3, seed=0)
    x0, condition = subject.clean_samples(examples)
    torch.testing.assert_close(x0, pipe.denoiser.points[condition.labels], atol=1e-5, rtol=0)
    assert subject.last_noise == pytest.approx(VISIBLE_NOISE / 0.2)
    # A prediction that is off by a bin and a half of the data, with an error of the same size.
    bin_width = 2 / 255 / 0.2
    nats = _decoder(x0, x0 * (1 - 1e-9), torch.tensor(bin_width / 2), subject.units(condition, x0))
    # An outermost bin has no end: half of the mass and that of half a bin, of one standard deviation.
    assert nats.mean().item() == pytest.approx(-np.log(0.8413447), rel=1e-3)


def test_dropped_labels_leave_an_image_the_mean_of_its_own():
    """The null label is the network's alone, and what it then sees is what is left without the mean of the image's label."""
    data = prepare_images("digits", max_samples=40)
    mean = torch.rand(11, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    parts = {"sample_size": 8, "in_channels": 1, "num_classes": 10, "data_mean": "class", "data_scale": "none"}
    normalise = Normaliser(DataStatisticsModel.of(mean, torch.ones(1), **parts), torch.device("cpu"), None)
    options = {"seed": 0, "batch_size": 40, "label_dropout": 0.5}
    batch = TrainingBatches(data, BatchOptions(**options, own_labels=True))[0]
    plain = TrainingBatches(data, BatchOptions(**options))[0]
    assert "own_labels" not in plain and torch.equal(batch["labels"], plain["labels"])
    own, dropped = batch["own_labels"], batch["labels"] == 10
    assert 5 < dropped.sum() < 35 and (own < 10).all() and torch.equal(own[~dropped], batch["labels"][~dropped])
    images = batch.pop("pixels").float() / 127.5 - 1
    seen = normalise(batch | {"images": images})
    torch.testing.assert_close(seen["images"], images - mean[own])
    torch.testing.assert_close(seen["units"].data(seen["images"]), images)
    assert "own_labels" not in seen and torch.equal(seen["labels"], batch["labels"])
