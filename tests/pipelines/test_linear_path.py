"""Networks of the linear path in our pipelines: every solver and every feature is right, or refused with the kind of model."""

import inspect
import warnings

import diffusers
import pytest
import torch
from diffusers import ConfigMixin, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from diffusers_ext import (
    DiffusionPipeline,
    ExtDDIMScheduler,
    FlowScheduler,
    GuidedDiffusionPipeline,
    NoisyClassifierModel,
    ScoreSDEScheduler,
    WeakModelGuidance,
)
from diffusers_ext.guidance.guiding import guided_steps
from diffusers_ext.schedulers.levels import describe_path, noise_level, prediction_type_of
from diffusers_ext.schedulers.sources import has_betas
from tiny import assert_same_output, tiny_unet


DATA, IMAGE = 0.3, 0.8

# Rather right than refused. Others end at the level of their last timestep, or are for networks of one repository.
SAMPLERS = {
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "UniPCMultistepScheduler",
}


class PointFlow(ModelMixin, ConfigMixin):
    """The exact velocity of rectified flow for data that are all one picture, at which every solver has to end."""

    @register_to_config
    def __init__(self, sample_size=4, in_channels=1, out_channels=1):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, sample, timestep, return_dict=True):
        t = timestep.view(-1, 1, 1, 1).double() / 1000
        output = ((sample - DATA) / t).to(sample.dtype)
        return UNet2DOutput(sample=output) if return_dict else (output,)


def pipeline(denoiser=None, scheduler=None, **components):
    pipe = GuidedDiffusionPipeline(
        PointFlow() if denoiser is None else denoiser,
        FlowScheduler() if scheduler is None else scheduler,
        **components,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, **options):
    options = {
        "num_inference_steps": 6,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    } | options
    return pipe(**options).images


def exported() -> list[type[SchedulerMixin]]:
    values = [getattr(diffusers, name) for name in dir(diffusers)]
    classes = [value for value in values if isinstance(value, type) and issubclass(value, SchedulerMixin)]
    return sorted({cls for cls in classes if cls is not SchedulerMixin}, key=lambda cls: cls.__name__)


# Which schedulers.


@pytest.mark.parametrize("cls", exported())
@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_is_right_from_noise_and_from_an_image_or_refused(cls):
    name, pipe = cls.__name__, pipeline()
    needed = [p for p in list(inspect.signature(cls.__init__).parameters.values())[1:] if p.default is p.empty]
    try:
        pipe.scheduler = cls(**{p.name: 4 for p in needed}) if needed else cls.from_config(pipe.scheduler.config)
    except (ValueError, TypeError, NotImplementedError) as error:
        assert name not in SAMPLERS
        assert name in str(error) or needed
        return
    assert prediction_type_of(pipe.scheduler) == "flow"
    image = torch.full((1, 1, 4, 4), (IMAGE + 1) / 2)
    for steps, strength in ((1, 1.0), (3, 1.0), (20, 1.0), (6, 0.5), (20, 0.0), (20, 0.1), (20, 0.6)):
        out = sample(pipe, num_inference_steps=steps, image=image, strength=strength)
        assert (out - (DATA if int(steps * strength + 1e-6) else IMAGE)).abs().max() < 0.05, (steps, strength)


def test_solvers_without_noise_make_the_same_images_in_many_steps():
    pipe = pipeline(tiny_unet(2))
    expected = sample(pipe, class_labels=1, guidance_scale=1.5, num_inference_steps=200)
    for name, steps, tolerance in (
        ("FlowMatchEulerDiscreteScheduler", 200, 1e-4),
        ("FlowMatchHeunDiscreteScheduler", 60, 0.02),
        ("DPMSolverMultistepScheduler", 60, 0.02),
        ("UniPCMultistepScheduler", 60, 0.02),
    ):
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        out = sample(pipe, class_labels=1, guidance_scale=1.5, num_inference_steps=steps)
        assert (out - expected).abs().max() < tolerance * expected.abs().max(), name


def test_a_scheduler_of_another_path_than_the_networks_is_refused_by_its_kind(tmp_path):
    flow, vp = pipeline(), pipeline(scheduler=ExtDDIMScheduler())
    for scheduler in (diffusers.DDIMScheduler(), diffusers.EulerDiscreteScheduler(), ExtDDIMScheduler()):
        with pytest.raises(
            ValueError,
            match=f"must have the linear path.* got {type(scheduler).__name__}, which is for a model of a Gaussian path "
            "given by betas; take FlowScheduler",
        ):
            flow.scheduler = scheduler
    for scheduler in (FlowScheduler(), FlowMatchEulerDiscreteScheduler()):
        with pytest.raises(ValueError, match="given by betas, .*is for a flow-matching model; take ExtDDIMScheduler"):
            vp.scheduler = scheduler
    with pytest.raises(
        ValueError, match="must have the linear path.*which is for a model of the variance-exploding path"
    ):
        flow.scheduler = ScoreSDEScheduler(path="ve")
    with pytest.raises(ValueError, match="noise_path must be one of vp, linear, ve, subvp or None, got 'liner'"):
        pipeline(noise_path="liner")
    # It is the network's, and saved with it.
    flow.save_pretrained(tmp_path / "flow")
    for given in ({}, {"scheduler": FlowMatchEulerDiscreteScheduler()}):
        assert DiffusionPipeline.from_pretrained(tmp_path / "flow", **given).config.noise_path == "linear"
    with pytest.raises(ValueError, match="must have the linear path"):
        DiffusionPipeline.from_pretrained(tmp_path / "flow", scheduler=ExtDDIMScheduler())
    assert GuidedDiffusionPipeline.from_pipe(flow).config.noise_path == "linear"


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (FlowScheduler(use_dynamic_shifting=True), "use_dynamic_shifting must be False for GuidedDiffusionPipeline"),
        (FlowScheduler(invert_sigmas=True), "invert_sigmas must be False for GuidedDiffusionPipeline"),
        (
            FlowMatchEulerDiscreteScheduler.from_config(FlowScheduler(prediction_type="sample").config),
            "must lead the exact 'sample' of the linear path to the data",
        ),
        (
            DPMSolverMultistepScheduler.from_config(FlowScheduler().config, prediction_type="v_prediction"),
            "must lead the exact 'v_prediction' of the linear path to the data",
        ),
    ],
)
def test_what_a_scheduler_of_the_path_cannot_do_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        pipeline(scheduler=scheduler)


def test_a_flow_on_a_path_of_betas_is_a_prediction_type_like_others():
    """Its networks are no flow-matching models: they see x_t on the path of the betas."""
    pipe = pipeline(tiny_unet(), ExtDDIMScheduler(prediction_type="flow"))
    assert pipe.config.noise_path == "vp" and torch.isfinite(sample(pipe)).all()
    pipe.scheduler = ExtDDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="FlowScheduler is for a flow-matching model"):
        FlowScheduler.from_config(pipe.scheduler.config)


# Features of the call, with a network that has no structure to help them.


@pytest.fixture(params=["FlowScheduler", "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def solver(request):
    return request.param


def with_solver(pipe, name):
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    return pipe


def test_an_image_is_noised_to_the_level_that_its_steps_begin_at(solver):
    pipe = with_solver(pipeline(), solver)
    image, noise = torch.full((1, 1, 4, 4), (IMAGE + 1) / 2), torch.randn(1, 1, 4, 4)
    out = pipe(
        image=image,
        strength=0.5,
        num_inference_steps=10,
        trajectory_steps=[0, 4],
        generator=torch.Generator().manual_seed(0),
    )
    noise = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    first, last = out.trajectory
    sigma = pipe.scheduler.sigmas[5]
    torch.testing.assert_close(first.x_t, (1 - sigma) * IMAGE + sigma * noise)
    assert first.timestep == pytest.approx(1000 * sigma, abs=1)
    for point in out.trajectory:  # the network is exact; one that is given a rounded timestep less so
        assert (point.x0_hat - DATA).abs().max() < 0.02
    assert last.timestep < first.timestep


def test_inpainting_keeps_what_is_known(solver):
    pipe = with_solver(pipeline(), solver)
    image, mask = torch.full((1, 1, 4, 4), (IMAGE + 1) / 2), torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    kept = (image * 2 - 1)[..., 2:]
    out = sample(pipe, image=image, mask_image=mask)
    assert torch.equal(out[..., 2:], kept) and (out[..., :2] - DATA).abs().max() < 0.02
    if solver == "FlowScheduler":
        out = sample(pipe, image=image, mask_image=mask, num_resample_steps=3)
        assert torch.equal(out[..., 2:], kept) and (out[..., :2] - DATA).abs().max() < 1e-3
    else:
        with pytest.raises(ValueError, match="cannot go back a step.* FlowScheduler"):
            sample(pipe, image=image, mask_image=mask, num_resample_steps=3)


def test_guiders_intervals_and_callbacks_act_on_every_solver(solver):
    pipe = with_solver(pipeline(tiny_unet(2), weak_denoiser=tiny_unet(2)), solver)
    for parameter in pipe.weak_denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    plain = sample(pipe, class_labels=1)
    assert not torch.allclose(plain, sample(pipe, class_labels=1, guidance_scale=3.0))
    for unit, bounds in (("sigma", (0.0, 0.0)), ("timestep", (5000, 6000))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that none of the steps is guided
            assert_same_output(
                sample(pipe, class_labels=1, guidance_scale=3.0, guidance_interval={unit: bounds}), plain
            )
    assert not torch.allclose(plain, sample(pipe, class_labels=1, guider=WeakModelGuidance(2.0)))
    seen = []
    stopped = sample(pipe, class_labels=1, callback_on_step_end=lambda p, i, t, x: seen.append((i, float(t))) or {})
    assert [i for i, _ in seen] == list(range(6)) and seen == sorted(seen, key=lambda pair: -pair[1])
    assert_same_output(stopped, plain)
    assert_same_output(sample(pipe, class_labels=1, latents=draw()), plain)


def draw():
    return torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_an_interval_of_noise_is_that_of_the_linear_path(solver):
    scheduler = getattr(diffusers, solver).from_config(FlowScheduler().config)
    scheduler.set_timesteps(10)
    ratio = scheduler.sigmas[:-1] / (1 - scheduler.sigmas[:-1])
    expected = ((0.2 <= ratio) & (ratio <= 3)).tolist()
    assert guided_steps({"sigma": (0.2, 3)}, scheduler, scheduler.timesteps) == expected and 1 < sum(expected) < 9


def test_a_classifier_of_the_path_guides_and_of_another_is_refused():
    torch.manual_seed(0)
    make = {"sample_size": 8, "in_channels": 1, "num_classes": 2, "block_out_channels": (8, 16), "layers_per_block": 1}
    classifier = NoisyClassifierModel(**make, noise_schedule=describe_path(FlowScheduler()))
    pipe = pipeline(tiny_unet(2), classifier=classifier)
    for parameter in classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    plain = sample(pipe, class_labels=1, classifier_scale=0.0)
    guided = [sample(pipe, class_labels=1, classifier_scale=5.0)]
    for name in ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
        guided.append(sample(with_solver(pipe, name), class_labels=1, classifier_scale=5.0))
    assert not torch.allclose(guided[0], plain)
    torch.testing.assert_close(guided[1], guided[0], rtol=1e-3, atol=1e-3)
    pipe.register_modules(classifier=NoisyClassifierModel(**make, noise_schedule=describe_path(ExtDDIMScheduler())))
    with pytest.raises(
        ValueError, match="must be trained on the scheduler's noise levels.* 'linear' of 1000 timesteps"
    ):
        sample(pipe, class_labels=1, classifier_scale=5.0)


def test_an_image_is_inverted_and_made_again():
    pipe = pipeline(tiny_unet())
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    latents = pipe.invert(image, num_inference_steps=10, num_refinements=30)
    again = pipe(latents=latents, num_inference_steps=10, output_type="latent").images
    torch.testing.assert_close(again, image * 2 - 1, rtol=0, atol=1e-3)
    assert len(pipe.interpolate(image, 1 - image, num_images=3, num_inference_steps=3)) == 3
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="inversion needs a scheduler of this package"):
        pipe.invert(image)


def test_the_level_of_a_solver_of_diffusers_is_that_of_its_step():
    like = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    for cls in (FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler, FlowScheduler):
        scheduler = cls.from_config(FlowScheduler(shift=3.0).config)
        assert has_betas(cls) == (cls is DPMSolverMultistepScheduler)
        scheduler.set_timesteps(7)
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            level = noise_level(scheduler, t, like)
            torch.testing.assert_close(level.sigma.squeeze(), sigma.double(), rtol=1e-6, atol=0)
            torch.testing.assert_close(level.alpha + level.sigma, torch.ones_like(level.alpha))
        assert noise_level(scheduler, 123.4, like).sigma.item() == pytest.approx(0.1234)
