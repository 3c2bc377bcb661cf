"""Every scheduler class that diffusers exports: right in our pipelines and as the source of a config, or refused.

A class that is new in diffusers is found here by itself, and judged by what it does.
"""

import inspect
import json
import warnings

import diffusers
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusers_ext import (
    AnnealedLangevinScheduler,
    ConsistencyScheduler,
    ExtDDIMInverseScheduler,
    ExtDDIMScheduler,
    ExtDDPMScheduler,
    FlowScheduler,
    GuidedDiffusionPipeline,
    ScoreSDEScheduler,
    VPredictionScheduler,
)
from diffusers_ext.diffusion.noising import predict_eps
from diffusers_ext.evaluation.subject import load_pipeline
from diffusers_ext.schedulers.levels import is_linear, noise_level
from diffusers_ext.schedulers.samplers import check_sampler
from diffusers_ext.schedulers.sources import MODEL_KEYS, has_betas
from tiny import save_run


OURS = (
    ExtDDPMScheduler,
    ExtDDIMScheduler,
    ExtDDIMInverseScheduler,
    VPredictionScheduler,
    ScoreSDEScheduler,
    AnnealedLangevinScheduler,
    ConsistencyScheduler,
)


def exported() -> list[type]:
    """Those that need a library that is not installed are placeholders, and left out."""
    values = [getattr(diffusers, name) for name in dir(diffusers)]
    classes = {value for value in values if isinstance(value, type) and issubclass(value, SchedulerMixin)}
    return sorted(classes - {SchedulerMixin, FlowScheduler, *OURS}, key=lambda cls: cls.__name__)


def made(cls: type) -> SchedulerMixin:
    """A scheduler at its defaults, with a number where there is none."""
    required = [
        each.name
        for each in list(inspect.signature(cls.__init__).parameters.values())[1:]
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    texts = {"schedule_mode": "log", "noise_mode": "1/t"}
    return cls(**{name: texts.get(name, 4) for name in required})


EXPORTED = exported()
WITH_BETAS = [cls for cls in EXPORTED if has_betas(cls)]
OTHERS = [cls for cls in EXPORTED if not has_betas(cls)]

# Rather right than refused: the ones that people use.
SAMPLERS = {
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
}


@pytest.mark.parametrize("cls", EXPORTED)
def test_exactly_the_classes_that_take_betas_have_a_gaussian_path(cls):
    assert isinstance(getattr(made(cls), "alphas_cumprod", None), torch.Tensor) == has_betas(cls)


# As the source of a config.


def roads(scheduler: SchedulerMixin, folder) -> list:
    """Ways in which a config comes: in memory, as a dict, and from a file."""
    scheduler.save_pretrained(folder)
    content = json.loads((folder / "scheduler_config.json").read_text())
    options = {key: value for key, value in content.items() if not key.startswith("_")}
    return [scheduler.config, dict(scheduler.config), content, options]


@pytest.mark.parametrize("cls", WITH_BETAS)
@pytest.mark.filterwarnings("ignore:alpha_bar of the last timestep")
def test_a_config_makes_the_path_of_its_source(cls, tmp_path):
    """By every road to one class of ours, and from memory and disk to the others: how a config is read is one for all."""
    source = cls()
    in_memory, *named, options = roads(source, tmp_path)
    for ours in OURS:
        given = {"prediction_type": "v_prediction"} if ours is VPredictionScheduler else {}
        results = [ours.from_config(in_memory, **given), ours.from_pretrained(tmp_path, **given)]
        if ours is ExtDDIMScheduler:
            nearly_nothing = {"_class_name": cls.__name__}
            results += [ours.from_config(config) for config in (*named, nearly_nothing, options)]
        back = []
        if ours is ExtDDIMScheduler or cls is diffusers.DDPMScheduler:  # some take seconds to be made
            back = [cls.from_config(results[0].config)]
        for result in (*results, *back):
            torch.testing.assert_close(
                result.alphas_cumprod.double(), source.alphas_cumprod.double(), rtol=2e-3, atol=1e-6, msg=ours.__name__
            )
        nameless = results.pop().config.clip_sample if ours is ExtDDIMScheduler else None
        assert nameless in (None, source.config.get("clip_sample", True))  # whose options they are, nobody knows
        for result in results:
            # A class that has no such key never clips.
            assert result.config.clip_sample == source.config.get("clip_sample", False), ours
            assert result.config.clip_sample_range == source.config.get("clip_sample_range", 1.0), ours


@pytest.mark.parametrize("cls", [cls for cls in WITH_BETAS if "clip_sample" not in inspect.signature(cls).parameters])
def test_clipping_goes_through_a_class_that_never_clips(cls):
    """What our classes were told, or left to their default, is the model's; and an option goes before all."""
    for ours, told in ((ExtDDIMScheduler, {}), (ExtDDPMScheduler, {"clip_sample": False}), (ConsistencyScheduler, {})):
        made = ours(**told)
        assert ours.from_config(cls.from_config(made.config).config).config.clip_sample == made.config.clip_sample
    assert ExtDDIMScheduler.from_config(cls().config, clip_sample=True).config.clip_sample
    assert ExtDDIMScheduler.from_config({"_class_name": cls.__name__, "clip_sample": True}).config.clip_sample


@pytest.mark.parametrize("cls", OTHERS)
def test_a_config_of_another_path_is_refused_with_both_classes(cls, tmp_path):
    kind = r"a .*model|a consistency decoder"
    *named, options = roads(made(cls), tmp_path)
    for ours in OURS:
        for config in (*named, {"_class_name": cls.__name__, "num_train_timesteps": 1000}):
            with pytest.raises(ValueError, match=f"{ours.__name__} is for models of .*is that of ({kind})"):
                ours.from_config(config)
        with pytest.raises(ValueError, match=f"{ours.__name__} is for .* config of {cls.__name__} is that of"):
            ours.from_pretrained(tmp_path)
        if options.keys() - dict(ours().config).keys():  # else nothing says that they are not options of ours
            with pytest.raises(ValueError, match=f"{ours.__name__} is for models"):
                ours.from_config(options)


@pytest.mark.parametrize("cls", [cls for cls in WITH_BETAS if "use_flow_sigmas" in inspect.signature(cls).parameters])
def test_a_scheduler_of_betas_that_is_set_to_a_straight_path_is_refused(cls):
    source = cls(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="a flow-matching model"):
        ExtDDIMScheduler.from_config(source.config)
    with pytest.raises(ValueError, match=f"given by betas.*got {cls.__name__}, which is for a flow-matching model"):
        check_sampler(source, "GuidedDiffusionPipeline", "vp")


def test_v_prediction_does_not_take_epsilon_for_v():
    configs = [diffusers.DDIMScheduler().config, {"_class_name": "DDIMScheduler"}, {"num_train_timesteps": 1000}, {}]
    for config in configs:
        with pytest.raises(ValueError, match="must be 'v_prediction', got 'epsilon'.*pass prediction_type="):
            VPredictionScheduler.from_config(config)
        made = VPredictionScheduler.from_config(config, prediction_type="v_prediction")
        assert made.config.prediction_type == "v_prediction"
    assert VPredictionScheduler.from_config({"_class_name": "VPredictionScheduler"}).config.rescale_betas_zero_snr


def test_options_go_before_the_config():
    source = diffusers.LCMScheduler()
    made = ExtDDIMScheduler.from_config(source.config, beta_end=0.02, clip_sample=True)
    assert (made.config.beta_start, made.config.beta_end, made.config.clip_sample) == (0.00085, 0.02, True)
    assert set(MODEL_KEYS) & set(made.config["_use_default_values"]) <= {"trained_betas"}


# In a pipeline.


DATA = torch.tensor([0.3, -0.4, 0.1]).view(1, 3, 1, 1)
PATH = ExtDDIMScheduler(clip_sample=False, timestep_spacing="trailing")
IMAGE = 0.8


class PointDenoiser(ModelMixin, ConfigMixin):
    """Exact for data that are all one picture, at which so every sampler has to end."""

    @register_to_config
    def __init__(self, sample_size=4, in_channels=3, out_channels=3):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, sample, timestep, return_dict=True):
        stock = diffusers.DDPMScheduler()  # whose levels are found between the timesteps too
        level = noise_level(stock, timestep.reshape(-1)[0].clamp(0, 999), sample.double())
        output = predict_eps(DATA.double(), sample.double(), level).to(sample.dtype)
        return UNet2DOutput(sample=output) if return_dict else (output,)


def point_pipeline(scheduler=PATH):
    pipe = GuidedDiffusionPipeline(PointDenoiser(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def error_of(pipe, steps: int, strength: float) -> float:
    image = torch.full((1, 3, 4, 4), (IMAGE + 1) / 2)
    generator = torch.Generator().manual_seed(0)
    out = pipe(
        num_inference_steps=steps, image=image, strength=strength, generator=generator, output_type="latent"
    ).images
    return (out - (DATA if int(steps * strength + 1e-6) else IMAGE)).abs().max().item()


@pytest.mark.parametrize("cls", EXPORTED)
@pytest.mark.filterwarnings("ignore:LCMScheduler is for models")
def test_a_scheduler_is_right_from_noise_and_from_an_image_or_refused(cls):
    """At 0.1: some stop at the level of the first timestep, sigma 0.01, where others go on to 0."""
    name = cls.__name__
    pipe = point_pipeline()
    try:
        pipe.scheduler = cls.from_config(PATH.config) if has_betas(cls) else made(cls)
    except ValueError as error:
        assert name in str(error) and name not in SAMPLERS
        return
    assert has_betas(cls)
    for steps, strength in (
        (1, 1.0),
        (3, 1.0),
        (6, 1.0),
        (20, 1.0),
        (3, 0.5),
        (6, 0.5),
        (20, 0.0),
        (20, 0.1),
        (20, 0.6),
    ):
        try:
            assert error_of(pipe, steps, strength) < 0.1, (steps, strength)
        except ValueError as error:
            assert name in str(error) and name not in SAMPLERS


@pytest.mark.parametrize("cls", OTHERS)
def test_a_pipeline_names_the_kind_of_model_that_a_scheduler_is_for(cls):
    kind = r"a .*model|a consistency decoder"
    message = f"must have a Gaussian path .*, as its network has, for GuidedDiffusionPipeline, got {cls.__name__}, which is for ({kind})"
    pipe, scheduler = point_pipeline(), made(cls)
    with pytest.raises(ValueError, match=message):
        pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        pipe.register_modules(scheduler=scheduler)
    if not is_linear(scheduler):  # else, of a new pipeline, it says what the network was trained on
        with pytest.raises(ValueError, match=message):
            point_pipeline(scheduler)
    assert pipe.scheduler is PATH


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("DDIMInverseScheduler", {}, "must go from noise to data"),
        ("DPMSolverMultistepInverseScheduler", {}, "must go from noise to data"),
        ("ExtDDIMInverseScheduler", {}, "must go from noise to data"),
        ("RePaintScheduler", {}, "asks for original_image, mask too"),
        ("CogVideoXDPMScheduler", {}, "asks for old_pred_original_sample, timestep_back too"),
        ("CogVideoXDDIMScheduler", {}, "changes the betas in a way of its own: its alpha_bar is off by up to 0.2"),
        ("UnCLIPScheduler", {"beta_schedule": "squaredcos_cap_v2"}, "asks for prev_timestep too"),
        ("HeunDiscreteScheduler", {"rescale_betas_zero_snr": True}, "does not read rescale_betas_zero_snr"),
    ],
)
def test_what_a_scheduler_of_betas_cannot_do_is_refused(name, options, message):
    config = {**PATH.config, **options, "_use_default_values": []}
    scheduler = getattr(diffusers, name).from_config(config)
    with pytest.raises(ValueError, match=f"GuidedDiffusionPipeline, got {name}, which {message}|{message}"):
        point_pipeline().scheduler = scheduler


def test_zero_terminal_snr_works_in_the_schedulers_that_read_it():
    config = ExtDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True).config
    for name in ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"):
        check_sampler(getattr(diffusers, name).from_config(config), "a test")


class CurvedDenoiser(PointDenoiser):
    """Of a noise that changes on the way, so that rules of different orders end at different pictures."""

    def forward(self, sample, timestep, return_dict=True):
        return UNet2DOutput(sample=sample.sin()) if return_dict else (sample.sin(),)


def by_the_multistep_rule(x, timesteps, alpha_bar):
    """Adams-Bashforth of rising order on DDIM's transfer, the first step by the mean of both ends' noise (PLMS)."""
    alpha_bar = torch.cat([alpha_bar.double(), alpha_bar[:1].double()])  # at -1, the end, diffusers has that of 0
    weights = [(1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]
    distance = timesteps[0] - timesteps[1] if len(timesteps) > 1 else timesteps[0] + 1

    def transfer(x, eps, t):
        (alpha_t, alpha_s), s = alpha_bar[[t, max(t - distance, -1)]].sqrt(), max(t - distance, -1)
        sigma_t, sigma_s = (1 - alpha_bar[[t, s]]).sqrt()
        return alpha_s * (x - sigma_t * eps) / alpha_t + sigma_s * eps

    past = []
    for t in timesteps:
        past = [x.sin(), *past[:3]]
        if len(past) == 1 and len(timesteps) > 1:
            x = transfer(x, (x.sin() + transfer(x, x.sin(), t).sin()) / 2, t)
        else:
            x = transfer(x, sum(w * eps for w, eps in zip(weights[len(past) - 1], past, strict=True)), t)
    return x


@pytest.mark.product
@pytest.mark.parametrize("skip_prk_steps", [False, True])
@pytest.mark.parametrize("taken", [1, 2, 3, 7])
def test_pndm_goes_by_its_multistep_rule_from_an_image(taken, skip_prk_steps):
    scheduler = diffusers.PNDMScheduler.from_config(PATH.config, skip_prk_steps=skip_prk_steps)
    pipe = GuidedDiffusionPipeline(CurvedDenoiser(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        num_inference_steps=10,
        image=torch.full((1, 3, 4, 4), 0.7),
        strength=taken / 10,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        trajectory_steps=[0],
    )
    timesteps = list(range(999, 0, -100))[-taken:]
    assert out.trajectory[0].timestep == timesteps[0]
    expected = by_the_multistep_rule(out.trajectory[0].x_t.double(), timesteps, scheduler.alphas_cumprod)
    torch.testing.assert_close(out.images.double(), expected, rtol=1e-4, atol=1e-4)  # of float32's levels


@pytest.mark.parametrize("skip_prk_steps", [False, True])
def test_pndm_is_right_at_every_strength_and_stays_the_users_own(skip_prk_steps):
    scheduler = diffusers.PNDMScheduler.from_config(PATH.config, skip_prk_steps=skip_prk_steps)
    pipe, config = point_pipeline(scheduler), dict(scheduler.config)
    for steps, strength in ((20, 1.0), (20, 0.6), (20, 0.05), (20, 0.0), (2, 0.5), (1, 0.0), (20, 1.0)):
        assert error_of(pipe, steps, strength) < 0.1
        assert pipe.scheduler is scheduler and dict(scheduler.config) == config

    def stop(*_):
        raise KeyError

    with pytest.raises(KeyError):
        pipe(image=torch.full((1, 3, 4, 4), 0.9), strength=0.5, callback_on_step_end=stop)
    assert pipe.scheduler is scheduler and dict(scheduler.config) == config


def test_pndm_refuses_few_steps_and_a_list_that_it_does_not_follow():
    pipe = point_pipeline(diffusers.PNDMScheduler.from_config(PATH.config, timestep_spacing="linspace"))
    assert error_of(pipe, 50, 1.0) < 0.1
    for steps in (4, 5, 7):
        with pytest.raises(ValueError, match=f"PNDMScheduler steps by {1000 // steps} timesteps with {steps} steps"):
            error_of(pipe, steps, 1.0)
        with pytest.raises(ValueError, match=f"PNDMScheduler steps by {1000 // steps} timesteps with {steps} steps"):
            error_of(pipe, steps, 0.6)
    with pytest.raises(ValueError, match="PNDMScheduler cannot make 2 steps; take another number or scheduler"):
        error_of(pipe, 2, 1.0)


def test_timesteps_that_are_not_finite_are_refused():
    pipe = point_pipeline(
        diffusers.KDPM2AncestralDiscreteScheduler.from_config(PATH.config, timestep_spacing="linspace")
    )
    with pytest.raises(
        ValueError, match="KDPM2AncestralDiscreteScheduler has timesteps that are not finite with 2 steps"
    ):
        error_of(pipe, 2, 1.0)
    assert error_of(pipe, 3, 1.0) < 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"interpolation_type": "log_linear"},
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
    ],
)
def test_timesteps_of_another_conditioning_are_refused(options):
    pipe = point_pipeline(diffusers.EulerDiscreteScheduler.from_config(PATH.config, **options))
    with pytest.raises(
        ValueError, match="EulerDiscreteScheduler would give the model the timestep .* another conditioning"
    ):
        error_of(pipe, 20, 1.0)


def test_a_consistency_sampler_says_which_models_it_is_for():
    with pytest.warns(UserWarning, match="LCMScheduler is for models that were distilled to consistency"):
        point_pipeline(diffusers.LCMScheduler.from_config(PATH.config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        point_pipeline(diffusers.TCDScheduler.from_config(PATH.config))


def test_an_evaluation_refuses_a_scheduler_of_another_path(tmp_path):
    folder = str(save_run(tmp_path / "run"))
    assert type(load_pipeline(folder, "LMSDiscreteScheduler").scheduler) is diffusers.LMSDiscreteScheduler
    for name in ("FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "DDIMInverseScheduler"):
        with pytest.raises(ValueError, match=f"for GuidedDiffusionPipeline, got {name}"):
            load_pipeline(folder, name)
