"""The other way: diffusers' samplers built from our config, on our pipeline and on the Gaussian oracle."""

import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_ext.models import UNetModel
from diffusers_ext.pipelines import GuidedDiffusionPipeline
from diffusers_ext.schedulers import ExtDDIMScheduler, ExtDDPMScheduler, VPredictionScheduler
from gaussian_oracle import VARIANCE, model_output


SAMPLERS = (
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    DEISMultistepScheduler,
)
SOURCES = {
    "ddpm": ExtDDPMScheduler(),
    "ddim, cosine": ExtDDIMScheduler(beta_schedule="cosine"),
    "sigmoid in alpha_bar": ExtDDIMScheduler(beta_schedule="sigmoid_alpha_bar"),
    "short": ExtDDPMScheduler(num_train_timesteps=500, beta_reference_timesteps=1000),
    "v": ExtDDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing"),
}


class OracleDenoiser(UNetModel):
    """A `UNetModel` whose output is the best possible for Gaussian data."""

    def forward(self, sample, timestep, *args, return_dict=True, **kwargs):
        timestep = torch.as_tensor(timestep).round().long()  # the samplers in sigma stop between timesteps
        output = model_output(self.schedule, self.prediction_type, sample.double(), timestep).float()
        return UNet2DOutput(sample=output) if return_dict else (output,)


@pytest.mark.product
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.filterwarnings("ignore:alpha_bar of the last timestep")
def test_samplers_from_our_config_have_the_right_scale(sampler, source):
    """std within 3 % of the data's."""
    config = SOURCES[source]
    denoiser = OracleDenoiser(
        sample_size=16, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1
    )
    denoiser.schedule, denoiser.prediction_type = config.schedule, config.config.prediction_type
    scheduler = sampler.from_config(config.config)
    pipe = GuidedDiffusionPipeline(denoiser=denoiser, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    # Heun's step in sigma converges slowly from the large sigmas that schedules near zero terminal SNR start at.
    num_steps = 200 if sampler is HeunDiscreteScheduler else 100
    images = pipe(batch_size=64, num_inference_steps=num_steps, generator=generator, output_type="latent").images
    assert images.std().item() == pytest.approx(VARIANCE**0.5, rel=0.03)


def test_v_prediction_config_is_understood():
    for sampler in SAMPLERS:
        config = sampler.from_config(VPredictionScheduler().config).config
        assert config["prediction_type"] == "v_prediction"
