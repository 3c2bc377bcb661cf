"""Networks of the VE and sub-VP paths in our pipeline: with our schedulers, with those of diffusers, or refused."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_ext import (
    AnnealedLangevinScheduler,
    ExtDDIMScheduler,
    ExtDDPMScheduler,
    GuidedDiffusionPipeline,
    ScoreSDEScheduler,
    UNetModel,
    VPredictionScheduler,
)
from diffusers_ext.diffusion.noising import NoiseSchedule
from gaussian_oracle import VARIANCE, model_output


class GaussianDenoiser(UNetModel):
    """The exact network for Gaussian data on the levels of `schedule`."""

    @classmethod
    def make(cls, schedule, prediction_type):
        network = cls(16, 1, 1, block_out_channels=(16, 32), layers_per_block=1)
        network.levels, network.prediction_type = schedule, prediction_type
        return network

    def forward(self, sample, timestep, *args, return_dict=True, **kwargs):
        timestep = torch.as_tensor(timestep).round().long()  # Heun of diffusers stops between timesteps
        output = model_output(self.levels, self.prediction_type, sample.double(), timestep).float()
        return UNet2DOutput(sample=output) if return_dict else (output,)


def pipeline(scheduler):
    """With the network that the scheduler's config describes."""
    config, schedule = scheduler.config, scheduler.schedule
    if config.unit_scale_input:
        schedule = NoiseSchedule(schedule.betas)
    pipe = GuidedDiffusionPipeline(GaussianDenoiser.make(schedule, config.prediction_type), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def std_of(pipe, **call):
    return (
        pipe(batch_size=64, generator=torch.Generator().manual_seed(0), output_type="latent", **call)
        .images.std()
        .item()
    )


@pytest.mark.product
@pytest.mark.parametrize("unit_scale_input", [False, True])
@pytest.mark.parametrize("path", ["ve", "subvp"])
@pytest.mark.parametrize(
    ("cls", "options", "num_steps"),
    [
        (ScoreSDEScheduler, {"corrector_steps": 1}, 100),
        (ScoreSDEScheduler, {"predictor": "heun"}, 50),
        (AnnealedLangevinScheduler, {}, 100),
    ],
)
def test_our_schedulers_sample_a_network_of_the_path(cls, options, num_steps, path, unit_scale_input):
    """A network that sees x_t itself, and one that sees it at unit scale; the start and `strength` have the path's scale."""
    scheduler = cls(path=path, unit_scale_input=unit_scale_input, prediction_type="score", **options)
    pipe = pipeline(scheduler)
    assert std_of(pipe, num_inference_steps=num_steps) == pytest.approx(VARIANCE**0.5, rel=0.09)
    image = (torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 0.05 + 0.5).clamp(0, 1)
    assert std_of(pipe, num_inference_steps=num_steps, image=image, strength=0.7) > 0.1
    kept = pipe(
        num_inference_steps=num_steps, image=image, mask_image=torch.zeros(1, 1, 16, 16), output_type="pt"
    ).images
    torch.testing.assert_close(kept, image, rtol=0, atol=1e-5)


@pytest.mark.product
@pytest.mark.parametrize("path", ["ve", "subvp"])
@pytest.mark.parametrize(
    "sampler",
    [
        ExtDDIMScheduler,
        ExtDDPMScheduler,
        DDIMScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_samplers_of_betas_sample_a_network_that_sees_unit_scale(sampler, path):
    source = ScoreSDEScheduler(path=path, unit_scale_input=True, prediction_type="v_prediction")
    pipe = pipeline(source)
    pipe.scheduler = sampler.from_config(source.config)
    num_steps = 200 if sampler is HeunDiscreteScheduler else 100
    assert std_of(pipe, num_inference_steps=num_steps) == pytest.approx(VARIANCE**0.5, rel=0.06)
    back = ScoreSDEScheduler.from_config(pipe.scheduler.config)
    assert (back.config.path, back.config.unit_scale_input) == (path, True)
    assert torch.equal(back.schedule.sigma, source.schedule.sigma)


@pytest.mark.parametrize("path", ["ve", "subvp"])
def test_samplers_of_betas_are_refused_for_a_network_that_sees_x_t_itself(path, tmp_path):
    source = ScoreSDEScheduler(path=path, prediction_type="v_prediction")
    source.save_pretrained(tmp_path)
    message = f"at unit scale, and the config is that of a model of the path '{path}' that sees x_t itself"
    for cls in (ExtDDIMScheduler, ExtDDPMScheduler, VPredictionScheduler):
        with pytest.raises(ValueError, match=f"{cls.__name__} is for models that see x_t {message}"):
            cls.from_config(source.config)
        with pytest.raises(ValueError, match=message):
            cls.from_pretrained(tmp_path)
    pipe = pipeline(source)
    for cls in (DDIMScheduler, EulerDiscreteScheduler):
        with pytest.raises(ValueError, match=f"model sees x_t of the path '{path}' as it is, got {cls.__name__}"):
            pipe.scheduler = cls.from_config(source.config)
    for cls in (ScoreSDEScheduler, AnnealedLangevinScheduler):
        assert cls.from_config(source.config).config.path == path
        assert torch.equal(cls.from_pretrained(tmp_path).schedule.sigma, source.schedule.sigma)


def test_the_betas_of_a_config_are_those_of_its_path():
    """Also where options replace the path or the scale that the config had."""
    config = ScoreSDEScheduler(path="ve", unit_scale_input=True).config
    wider = ScoreSDEScheduler.from_config(config, sigma_max=100.0)
    torch.testing.assert_close(wider.schedule.sigma[-2].item(), 100.0)
    assert wider.config.trained_betas == wider.schedule.betas.tolist() != config.trained_betas
    assert ScoreSDEScheduler.from_config(config, unit_scale_input=False).config.trained_betas is None


def test_a_model_of_betas_goes_both_ways():
    ddpm = ExtDDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=True)
    for cls in (ScoreSDEScheduler, AnnealedLangevinScheduler):
        ours = cls.from_config(ddpm.config)
        assert (ours.config.path, ours.config.clip_sample) == ("vp", True)
        assert torch.equal(ours.schedule.alpha, ddpm.schedule.alpha)
        assert torch.equal(ExtDDPMScheduler.from_config(ours.config).schedule.alpha, ddpm.schedule.alpha)


def test_resampling_is_refused_where_a_level_has_several_calls():
    pipe = pipeline(ScoreSDEScheduler(path="ve", corrector_steps=1))
    with pytest.raises(
        ValueError, match="num_resample_steps must be 1 for ScoreSDEScheduler with 2 calls of the network"
    ):
        pipe(image=torch.zeros(1, 1, 16, 16), mask_image=torch.ones(1, 1, 16, 16), num_resample_steps=2)


def test_options_of_the_path_and_of_the_sampler_are_checked():
    for options, message in (
        ({"path": "linear"}, "path must be one of vp, ve, subvp, cosine, got 'linear', which FlowScheduler is for"),
        ({"path": "exploding"}, "path must be one of vp, ve, subvp, cosine, got 'exploding'"),
        ({"path": "ve", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr must be False for path 've'"),
        ({"path": "ve", "sigma_max": 0.001}, "sigma_min must be above 0 and less than sigma_max"),
        ({"predictor": "euler"}, "predictor must be one of reverse_diffusion, .*, got 'euler'"),
        ({"corrector": "mcmc"}, "corrector must be one of langevin, annealed_langevin, got 'mcmc'"),
        ({"corrector_steps": -1}, "corrector_steps must be an integer of at least 0, got -1"),
        ({"snr": 0}, "snr must be above 0 and below 1, got 0"),
        ({"path": "cosine"}, "prediction_type must be 'v_prediction' or 'sample' at zero terminal SNR"),
        (
            {"path": "cosine", "predictor": "euler_maruyama", "prediction_type": "v_prediction"},
            "predictor must not be 'euler_maruyama' on a path that ends without signal",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ScoreSDEScheduler(**options)
    scheduler = ScoreSDEScheduler(path="ve", predictor="euler_maruyama")
    with pytest.warns(UserWarning, match="8 steps are too few for 'euler_maruyama'"):
        scheduler.set_timesteps(8)
