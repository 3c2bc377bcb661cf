"""A chain that starts at a lower level from a fitted prior: exact for Gaussian data, whatever their covariance."""

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_ext import (
    DataStatisticsModel,
    ExtDDIMScheduler,
    ExtDDPMScheduler,
    FlowScheduler,
    GaussianPriorModel,
    GuidedDiffusionPipeline,
    UNetModel,
    VAEModel,
)
from diffusers_ext.calibration.subject import Subject
from diffusers_ext.diffusion.noising import training_target
from diffusers_ext.pipelines.truncation import draw_clean, truncated_timesteps
from diffusers_ext.schedulers.levels import noise_level
from tiny import assert_same_weights, tiny_unet


# A covariance of 4x4 pixels with a length of its own, and a mean.
PLACES = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")).flatten(1).double()
COVARIANCE = (
    0.25 * torch.exp(-(PLACES[:, :, None] - PLACES[:, None]).square().sum(0) / 4) + 0.2 * torch.eye(16).double()
)
MEAN = torch.linspace(-0.5, 0.5, 16, dtype=torch.float64)


class GaussianDenoiser(UNetModel):
    """The exact network, of v or flow, for N(MEAN, COVARIANCE)."""

    @classmethod
    def make(cls, scheduler, num_classes=None):
        network = cls(4, 1, 1, block_out_channels=(8, 16), layers_per_block=1, num_classes=num_classes)
        network.scheduler = scheduler
        return network

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        x = sample.flatten(1).double()
        level = noise_level(self.scheduler, timestep[:1], x[:1, :1])
        alpha, sigma = level.alpha.double(), level.sigma.double()
        gain = alpha * COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(16).double())
        x0 = MEAN + (x - alpha * MEAN) @ gain.T
        kind = "flow" if isinstance(self.scheduler, FlowScheduler) else "v_prediction"
        eps = (x - alpha * x0) / sigma
        level = type(level)(alpha, sigma)
        output = training_target(x0, eps, level, kind).to(sample).view_as(sample)
        return UNet2DOutput(sample=output) if return_dict else (output,)


def draws(number, seed=0):
    noise = torch.randn(number, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (MEAN + noise @ torch.linalg.cholesky(COVARIANCE).T).view(-1, 1, 4, 4)


def exact_prior():
    model = GaussianPriorModel(4, 1, rank=16)
    model.mean.copy_(MEAN.view(1, 1, 4, 4))
    model.factor.copy_(torch.linalg.cholesky(COVARIANCE).T.reshape(1, 16, 1, 4, 4))
    model.std.zero_()
    return model


def pipeline(scheduler=None, **parts):
    scheduler = scheduler or ExtDDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    pipe = GuidedDiffusionPipeline(GaussianDenoiser.make(scheduler), scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_is_law(samples, rtol=0.05):
    """Of 4000 draws: the mean within 5 errors, and the variance along each eigenvector, whose errors are 2.2 %."""
    x = samples.flatten(1).double()
    values, vectors = torch.linalg.eigh(COVARIANCE)
    error = (COVARIANCE.diag() / len(x)).sqrt()
    assert ((x.mean(0) - MEAN).abs() < 5 * error).all()
    along = ((x - MEAN) @ vectors).var(0)
    assert ((along / values - 1).abs() < 3 * 0.0224 + rtol).all()
    return along / values


SCHEDULERS = {
    "ddim": ExtDDIMScheduler(prediction_type="v_prediction", clip_sample=False),
    "dpm-solver": DPMSolverMultistepScheduler(prediction_type="v_prediction"),
    "linear": FlowScheduler(),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_law_of_a_truncated_chain_is_that_of_gaussian_data(name):
    pipe = pipeline(SCHEDULERS[name], prior=exact_prior())
    call = {"batch_size": 4000, "num_inference_steps": 40, "output_type": "latent", "start_timestep": 300}
    assert_is_law(pipe(**call, generator=torch.Generator().manual_seed(0)).images)


def test_the_way_from_the_level_is_the_flow_of_the_law_there_which_few_steps_from_pure_noise_miss():
    """Without chance: DDIM is linear, and takes the covariance at the level to that of the data up to its own error."""

    def covariance_after(pipe, start, num_inference_steps, **call):
        """That of the ends, from the covariance of the starts: each end is a matrix times its start, and a constant."""
        call |= {"num_inference_steps": num_inference_steps, "output_type": "latent"}
        units = torch.eye(16).view(16, 1, 4, 4)
        ends, zero = (pipe(latents=each, **call).images.flatten(1).double() for each in (units, 0 * units))
        step = ends - zero
        return step.T @ start @ step

    pipe = pipeline()
    level = pipe.scheduler.schedule.level(300, torch.zeros(1, dtype=torch.float64))
    noise = torch.eye(16, dtype=torch.float64)
    at_level = level.alpha**2 * COVARIANCE + level.sigma**2 * noise
    exact = covariance_after(pipe, at_level, 301, start_timestep=300)
    truncated = covariance_after(pipe, at_level, 5, start_timestep=300)
    full = covariance_after(pipe, noise, 5)
    values, vectors = torch.linalg.eigh(COVARIANCE)
    exact, truncated, full = (((vectors.T @ c @ vectors).diag() / values - 1).abs() for c in (exact, truncated, full))
    assert exact.max() < 0.01 and truncated.max() < 0.35 and truncated.mean() < 0.5 * full.mean()


def test_a_fit_has_the_moments_of_the_samples_and_a_low_rank_their_variances():
    x = draws(500)
    full, low = GaussianPriorModel.fit(x), GaussianPriorModel.fit(x, rank=3)
    moments = torch.cov(x.flatten(1).T, correction=0)
    torch.testing.assert_close(full.covariance(), moments, atol=1e-6, rtol=0)
    torch.testing.assert_close(full.mean[0], x.mean(0).float())
    assert full.std.max() < 1e-6 and low.factor.shape == (1, 3, 1, 4, 4)
    torch.testing.assert_close(low.covariance().diag(), moments.diag(), atol=1e-6, rtol=0)
    values = torch.linalg.eigvalsh(moments)
    torch.testing.assert_close(low.factor[0].flatten(1).double().square().sum(1), values[-3:], rtol=1e-5, atol=0)


def test_draws_of_a_label_have_its_law_and_depend_on_their_own_generator_alone():
    x, labels = draws(300), torch.arange(300) % 2
    x[labels == 1] += 3
    prior = GaussianPriorModel.fit(x, labels, num_classes=3)
    assert prior.mean.shape == (4, 1, 4, 4)
    for row, chosen in ((0, labels == 0), (1, labels == 1), (2, labels >= 0), (3, labels >= 0)):  # 2 has no samples
        torch.testing.assert_close(prior.mean[row], x[chosen].mean(0).float())

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = prior.sample(2, torch.tensor([0, 1]), generators(5, 6))
    torch.testing.assert_close(both[1:], prior.sample(1, torch.tensor([1]), generators(6)), rtol=1e-5, atol=1e-5)
    many = prior.sample(4000, torch.tensor([1]), torch.Generator().manual_seed(0)).flatten(1)
    torch.testing.assert_close(many.mean(0), prior.mean[1].flatten(), atol=0.05, rtol=0)
    torch.testing.assert_close(torch.cov(many.T).double(), prior.covariance(1), atol=0.03, rtol=0)
    assert torch.equal(prior.rows(None), torch.tensor([3]))
    with pytest.raises(ValueError, match="a prior by label needs one label for each image"):
        prior.sample(1, torch.ones(1, 3).bool())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_classes": 3}, "labels and num_classes must be given together"),
        ({"labels": torch.zeros(9, dtype=torch.long)}, "labels and num_classes must be given together"),
        ({"labels": torch.zeros(8, dtype=torch.long), "num_classes": 3}, r"each of the 9 samples, got \(8,\)"),
        ({"labels": torch.arange(9) - 1, "num_classes": 3}, r"labels must be in \[0, 3\], got -1 to 7"),
    ],
)
def test_labels_that_a_prior_cannot_be_fitted_to_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianPriorModel.fit(torch.randn(9, 1, 2, 2), **options)


def test_the_default_of_a_pipeline_counts_unless_a_call_says_where_it_starts(tmp_path):
    prior, defaults = GaussianPriorModel(8, 1, rank=2), {"num_inference_steps": 3, "start_timestep": 299}
    pipe = GuidedDiffusionPipeline(tiny_unet(), ExtDDIMScheduler(), prior=prior, call_defaults=defaults)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert_same_weights(loaded.prior, prior)
    assert_same_weights(DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).prior, prior)

    def visited(**call):
        points = loaded(**call, trajectory_steps=[0, 1], output_type="latent").trajectory
        return [point.timestep for point in points]

    assert visited() == [299, 199]
    assert visited(start_timestep=599) == [599, 399]
    assert visited(timesteps=[700, 20]) == [700, 20]
    assert visited(latents=torch.zeros(1, 1, 8, 8))[0] > 600
    assert visited(image=torch.zeros(1, 1, 8, 8), strength=1.0)[0] > 600
    with pytest.raises(ValueError, match="must start from pure noise, got a start_timestep in its call_defaults"):
        Subject.of(loaded, 3)


def test_given_x_t_are_gone_on_from():
    pipe, x_t = pipeline(), torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    call = {"latents": x_t, "start_timestep": 400, "num_inference_steps": 2, "output_type": "latent"}
    out = pipe(**call, trajectory_steps=[0])
    assert torch.equal(out.trajectory[0].x_t, x_t) and out.trajectory[0].timestep == 400
    again = pipe(latents=x_t, timesteps=truncated_timesteps(pipe.scheduler, 2, 400), output_type="latent").images
    torch.testing.assert_close(out.images, again)


def test_an_autoencoder_draws_images_which_statistics_normalise():
    torch.manual_seed(0)
    vae = VAEModel(4, 1, 1, architecture="mlp", latent_dim=2, block_out_channels=(8,)).eval()
    parts = {"sample_size": 4, "in_channels": 1, "data_scale": "overall"}
    statistics = DataStatisticsModel.of(torch.full((1, 1, 4, 4), 0.25), torch.tensor([0.5]), **parts)
    pipe = pipeline(prior=vae, statistics=statistics)
    with torch.no_grad():
        x0 = draw_clean(vae, 3, None, statistics, torch.Generator().manual_seed(0), torch.device("cpu"))
        images = vae.decode(vae.sample_prior(3, torch.Generator().manual_seed(0))).sample
    torch.testing.assert_close(x0, (images - 0.25) / 0.5)
    out = pipe(batch_size=3, start_timestep=100, num_inference_steps=2, output_type="np").images
    assert out.shape == (3, 4, 4, 1)


def prior_of(**config):
    return GaussianPriorModel(**{"sample_size": 4, "in_channels": 1, "rank": 2} | config)


@pytest.mark.parametrize(
    "parts, call, message",
    [
        ({}, {}, "start_timestep needs a prior of this pipeline, which training/fit_prior.py fits, or latents"),
        ({"prior": prior_of(sample_size=8)}, {}, "prior must be of the denoiser's samples, 1x4x4 .* got 1x8x8"),
        ({"prior": prior_of(num_classes=3)}, {}, "of which it has none, got one of 3"),
        (
            {"prior": tiny_unet()},
            {},
            "prior must be a GaussianPriorModel or an autoencoder of this package, got UNetModel",
        ),
        (
            {"prior": prior_of()},
            {"start_timestep": 1000},
            r"start_timestep must be an integer in \[0, 999\], got 1000",
        ),
        ({"prior": prior_of()}, {"start_timestep": 1}, "at most the 2 timesteps up to start_timestep 1, got 3"),
        ({"prior": prior_of()}, {"timesteps": [9]}, "start_timestep and timesteps both say where to start"),
        (
            {"prior": prior_of()},
            {"image": torch.zeros(1, 1, 4, 4)},
            "start_timestep and image both say where to start",
        ),
        ({}, {"latents": torch.zeros(1, 1, 8, 8)}, r"latents must have shape \(1, 1, 4, 4\), got \(1, 1, 8, 8\)"),
    ],
)
def test_what_does_not_fit_is_refused(parts, call, message):
    with pytest.raises(ValueError, match=message):
        pipeline(ExtDDPMScheduler(prediction_type="v_prediction"), **parts)(
            **{"start_timestep": 300, "num_inference_steps": 3} | call
        )
