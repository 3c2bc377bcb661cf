"""Bits/dim of a pipeline in latents: those of its autoencoder, with the diffusion model as the prior."""

import math

import pytest
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config

from diffusers_ext import ExtDDIMScheduler, GuidedDiffusionPipeline, VAEModel
from diffusers_ext.evaluation.bits_per_dim import measure_bits_per_dim
from diffusers_ext.evaluation.labelled_images import LabelledImages
from diffusers_ext.evaluation.latent_likelihood import LatentCoder, without_autoencoder
from diffusers_ext.models.statistics import DataStatisticsModel
from diffusers_ext.models.vae_likelihood import log_likelihood
from gaussian_oracle import VARIANCE, model_output
from tiny_vae import tiny_vae


NUM_IMAGES = 300


class Exact(ModelMixin, ConfigMixin):
    """The best network for latents that are N(0, VARIANCE) in every coordinate."""

    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 2, out_channels: int = 2):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.schedule = ExtDDIMScheduler().schedule

    def forward(self, sample, timestep, return_dict=True):
        output = model_output(self.schedule, "epsilon", sample, timestep.long())
        return type("Output", (), {"sample": output})() if return_dict else (output,)


def vae(**config):
    torch.manual_seed(0)
    sizes = {"sample_size": 16, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8)}
    scale = {"scaling_factor": 1.7, "shift_factor": 0.2, "latent_channels": 2}
    return VAEModel(**sizes | scale | config).eval()


def images():
    pixels = torch.randint(256, (NUM_IMAGES, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    return LabelledImages(pixels.to(torch.uint8), torch.full([NUM_IMAGES], -1), [])


def pipeline(coder, **components):
    """With the variance of x_0 given x_t that such latents have, so that the chain has their law at any number of steps."""
    level = ExtDDIMScheduler().level(torch.arange(1000), torch.zeros(1, dtype=torch.float64))
    x0_variance = VARIANCE * level.sigma**2 / (VARIANCE * level.alpha**2 + level.sigma**2)
    table = {"timesteps": list(range(1000)), "x0_variance": x0_variance.flatten().tolist()}
    scheduler = ExtDDIMScheduler(
        timestep_spacing="trailing", clip_sample=False, variance_type="analytic", analytic_variance=table
    )
    return GuidedDiffusionPipeline(Exact(), scheduler, vae=coder, **components)


@torch.no_grad()
def expected_bits(coder, mean, std):
    """-log P(x | z) and log q(z | x) - log p(z) of the same draws, p = N(shift + mean / scale, (std sd / scale)^2), sd^2 = VARIANCE."""
    x = images().images.double() / 127.5 - 1
    posterior = coder.encode(x.float()).latent_dist
    noise = [torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(row)) for row in range(NUM_IMAGES)]
    z = posterior.mean + posterior.std * torch.stack(noise)
    q = torch.distributions.Normal(posterior.mean.double(), posterior.std.double())
    scale, shift = coder.config.scaling_factor, coder.config.shift_factor
    p = torch.distributions.Normal(shift + mean / scale, std * math.sqrt(VARIANCE) / scale)
    rate = (q.log_prob(z.double()) - p.log_prob(z.double())).flatten(1).sum(1).mean()
    kind, log_scale = coder.config.likelihood, coder.likelihood_log_scale
    distortion = -log_likelihood(kind, x, coder.decode_parameters(z), log_scale, levels=256).mean()
    return distortion.item() / (256 * math.log(2)), rate.item() / (256 * math.log(2))


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.3, 2.0)])
def test_the_bound_with_an_exact_prior_is_that_of_the_autoencoder_with_this_prior(mean, std):
    coder, components = vae(), {}
    if std != 1:
        statistics, shape = {"sample_size": 8, "in_channels": 2}, [1, 2, 8, 8]
        components["statistics"] = DataStatisticsModel.of(torch.full(shape, mean), torch.full([1], std), **statistics)
    pipe = pipeline(coder, **components)
    how = {"num_images": NUM_IMAGES, "num_steps": 20, "num_terms": None, "num_flow_steps": 6}
    result = measure_bits_per_dim(pipe, images(), show_progress=False, **how)
    assert result["num_dims"] == 256 and result["variance"] == "analytic" and pipe.vae is coder
    distortion, rate = expected_bits(coder, mean, std)
    assert result["distortion"] == pytest.approx(distortion, rel=1e-5)
    assert result["rate"] == pytest.approx(rate, abs=0.02)  # of the noise along the chain
    assert result["bits_per_dim"] == pytest.approx(result["rate"] + result["distortion"], rel=1e-9)
    assert result["flow_bits_per_dim"] == pytest.approx(distortion + rate, abs=0.02)
    assert abs(rate - expected_bits(coder, mean, 1.2 * std)[1]) > 0.05


def test_an_autoencoder_without_a_likelihood_in_8_bits_is_refused():
    for coder, message in (
        (tiny_vae(2, 1), "got a AutoencoderKL"),
        (vae(likelihood="bernoulli"), "got likelihood 'bernoulli'"),
    ):
        with pytest.raises(ValueError, match=f"whose bits are not those of images: .* {message}"):
            LatentCoder.of(pipeline(coder))
    with pytest.raises(ValueError, match="curves and dequantization are of pixels"):
        measure_bits_per_dim(pipeline(vae()), images(), with_curves=True)
    pipe = pipeline(vae())
    assert without_autoencoder(pipe).vae is None and pipe.vae is not None and pipe.config["vae"][0] is not None
