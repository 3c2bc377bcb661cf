"""Statistics of a run's data, beside NumPy's of the same images and of many draws of their latents."""

import dataclasses
import types

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from diffusers_ext import VAEModel
from diffusers_ext.data.latent_cache import LatentEncoder, SampleSpace
from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.recipes.data_statistics import measure, with_statistics
from diffusers_ext.recipes.denoising import DenoisingConfig


@pytest.fixture(scope="module")
def digits():
    return prepare_images("digits", max_samples=50)


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def images_of(data, flips=(False,)):
    """In [-1, 1], float64, and their labels."""
    rows, middle = np.arange(len(data)), np.full((len(data), 2), 0.5)
    images = [data.read(rows, middle, np.full(len(data), flip)) for flip in flips]
    return np.concatenate(images).astype(np.float64).transpose(0, 3, 1, 2) / 127.5 - 1, np.tile(
        data.labels, len(flips)
    )


def measured(data, **options):
    config = DenoisingConfig(block_out_channels=(8, 16), **options)
    return [each.numpy() for each in measure(config, data, SampleSpace.of(data, None), torch.device("cpu"))]


@pytest.mark.parametrize("random_flip", [False, True])
@pytest.mark.parametrize("data_mean", ["none", "overall", "class"])
def test_they_are_those_of_the_images(digits, data_mean, random_flip):
    x, labels = images_of(digits, (False, True) if random_flip else (False,))
    mean, std = measured(digits, data_mean=data_mean, data_scale="overall", random_flip=random_flip)
    overall, left = x.mean(0), x - x.mean()
    if data_mean == "none":
        expected = np.zeros((1, *overall.shape))
    elif data_mean == "overall":
        expected, left = overall[None], x - overall
    else:
        expected = np.stack([*(x[labels == label].mean(0) for label in range(10)), overall])
        left = x - expected[labels]
    np.testing.assert_allclose(mean, expected, atol=1e-12)
    assert std.item() == pytest.approx(np.sqrt(np.mean(left**2)), rel=1e-9)


def test_each_channel_has_its_own_and_a_label_without_images_the_mean_of_all(digits):
    class Colour:
        """Digits in three channels of different contrast."""

        def __getattr__(self, name):
            return getattr(digits, name)

        channels, num_classes, id2label = 3, 11, dict.fromkeys(range(11), "")

        def __len__(self):
            return len(digits)

        def read(self, *args):
            pixels = digits.read(*args)
            return np.concatenate([pixels, pixels // 2, 200 - pixels // 4], axis=-1)

    data = Colour()
    x, labels = images_of(data)
    mean, std = measured(data, data_mean="class", data_scale="channel")
    means = np.stack([*(x[labels == label].mean(0) for label in range(10)), x.mean(0), x.mean(0)])
    np.testing.assert_allclose(mean, means, atol=1e-12)
    np.testing.assert_allclose(std, np.sqrt(np.mean((x - means[labels]) ** 2, axis=(0, 2, 3))), rtol=1e-9)
    _, std = measured(data, data_mean="none", data_scale="channel")
    np.testing.assert_allclose(std, x.std(axis=(0, 2, 3)), rtol=1e-9)


def test_those_of_latents_are_those_of_their_draws(digits):
    torch.manual_seed(0)
    vae = VAEModel(8, 1, 1, block_out_channels=(8, 8), latent_channels=2, scaling_factor=1.7, shift_factor=0.3).eval()
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    config = DenoisingConfig(data_mean="overall", data_scale="channel", block_out_channels=(8, 16))
    space = SampleSpace.of(digits, vae)
    mean, std = measure(config, digits, space, torch.device("cpu"))
    encode, x = LatentEncoder(vae, torch.device("cpu"), cached=False), torch.from_numpy(images_of(digits)[0]).float()
    generator, draws = torch.Generator().manual_seed(0), []
    with torch.no_grad():
        for _ in range(200):
            noise = torch.randn(50, *space.shape, generator=generator)
            draws.append(encode({"images": x, "latent_noise": noise})["images"].double())
    draws = torch.cat(draws)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - mean[0]).abs() < 5 * error).all()
    torch.testing.assert_close((draws - mean).square().mean((0, 2, 3)).sqrt(), std, rtol=0.02, atol=0)
    assert dataclasses.replace(space, statistics=None).largest == 1


def test_data_without_such_statistics_are_refused(digits, accelerator):
    def refused(message, data=digits, **options):
        space = None if not hasattr(data, "pixels") else SampleSpace.of(data, None)
        with pytest.raises(ValueError, match=message):
            with_statistics(DenoisingConfig(block_out_channels=(8, 16), **options), data, space, accelerator)

    unlabelled = dataclasses.replace(digits, labels=None, id2label=None)
    refused("data_mean class needs one label for each image, digits has no labels", unlabelled, data_mean="class")
    sets = dataclasses.replace(digits, labels=np.ones((50, 10), bool))
    refused("digits has sets of labels: use data_mean overall", sets, data_mean="class")
    refused("which a stream does not allow: leave streaming out", types.SimpleNamespace(), data_scale="overall")
    single = prepare_images("digits", max_samples=1)
    refused("after data_mean overall nothing is left of them: use", single, data_mean="overall", data_scale="overall")
    refused("nothing is left of them in channel 0", single, data_mean="class", data_scale="channel")


def test_the_mean_of_a_single_image_leaves_nothing_of_it(accelerator):
    data = prepare_images("digits", max_samples=1)
    config = DenoisingConfig(block_out_channels=(8, 16), data_mean="overall")
    space = with_statistics(config, data, SampleSpace.of(data, None), accelerator)
    x = torch.from_numpy(images_of(data)[0]).float()
    assert space.statistics.normalise(x).abs().max() < 1e-6
    assert space.largest == 2  # a pixel that is black or white can be the other in another image
