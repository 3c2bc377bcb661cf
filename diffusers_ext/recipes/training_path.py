"""The noising path of a training run: its options, what they mean for one another, and the scheduler that is saved.

Every path but one is trained as the variance-preserving path that it is at unit scale (see `diffusers_ext.diffusion.paths`):
the network sees x_t / sqrt(alpha_t^2 + sigma_t^2), and every sampler of a table of betas samples it. The linear path is
trained as it is, with T t for timestep, as networks of rectified flow are. What becomes of a learned path is a table of
betas too (see `diffusers_ext.recipes.variational_objective`).
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from diffusers_ext.diffusion.betas import BETA_SCHEDULES
from diffusers_ext.diffusion.noising import PREDICTION_TYPES
from diffusers_ext.diffusion.paths import PATHS, Path, PathSchedule, SubVariancePreserving, VarianceExploding
from diffusers_ext.models.learned_schedule import LearnedSchedule, learned_betas
from diffusers_ext.options import fixed_option
from diffusers_ext.recipes.networks import NetworkConfig
from diffusers_ext.recipes.pretrained import PRETRAINED_PATH, read_pretrained
from diffusers_ext.schedulers import ExtDDIMScheduler, ExtDDPMScheduler, FlowScheduler, ScoreSDEScheduler


if TYPE_CHECKING:
    from diffusers_ext.recipes.denoising import DenoisingConfig


SCHEDULERS = {
    "ddpm": ExtDDPMScheduler,
    "ddim": ExtDDIMScheduler,
    "score_sde": ScoreSDEScheduler,
    "flow": FlowScheduler,
}

# The beta_schedule of the paths that are tables, where it is left open; None is no path by name.
TABLES = {None: "cosine", "vp": "linear", "cosine": "cosine"}

# The length of the chain that beta_start and beta_end of the linear schedule are for, whose continuous limit path vp is.
REFERENCE_TIMESTEPS = 1000

# Of the schedules that are given by their first and last beta.
beta_option = partial(fixed_option, needs={"beta_schedule": ("linear", "scaled_linear", "sigmoid")})
_ve_option = partial(fixed_option, needs={"path": ("ve",)})
_subvp_option = partial(fixed_option, needs={"path": ("subvp",)})
_learned_option = partial(fixed_option, needs={"path": ("learned",)})


@dataclass(frozen=True)
class PathConfig(NetworkConfig):
    """Options of a training run with a noising path.

    Raises:
        ValueError: if options contradict one another, are out of range, or are those of another path.
    """

    path: Literal[(*PATHS, "learned", PRETRAINED_PATH)] | None = fixed_option(
        None,
        "noising path: vp, the linear beta schedule; the cosine one; ve and subvp, the other two SDEs of Song et al.; "
        "linear, rectified flow; one that is learned with the network; or pretrained, the only one of a pretrained_pipeline. By "
        "default that of beta_schedule",
        "diffusion",
    )
    num_train_timesteps: int = fixed_option(1000, "noise levels", alias="ddpm_num_steps", at_least=1)
    beta_schedule: Literal[BETA_SCHEDULES] | None = fixed_option(
        None, "noise schedule by name; by default cosine, or linear with path vp", alias="ddpm_beta_schedule"
    )
    beta_start: float = beta_option(1e-4, "first beta of linear, scaled_linear and sigmoid")
    beta_end: float = beta_option(0.02, "last beta of linear, scaled_linear and sigmoid")
    beta_reference_timesteps: int | None = beta_option(
        None,
        "length of the chain that beta_start and beta_end are for, such as 1000, whose alpha_bar a chain of another "
        "num_train_timesteps then has; by default its own, and 1000 with path vp",
        at_least=1,
    )
    rescale_betas_zero_snr: bool = fixed_option(False, "let the last level be pure noise; not with epsilon")
    beta_min: float = _subvp_option(SubVariancePreserving.beta_min, "beta of subvp at the data, by unit of time")
    beta_max: float = _subvp_option(SubVariancePreserving.beta_max, "beta of subvp at the noise")
    sigma_min: float = _ve_option(VarianceExploding.sigma_min, "standard deviation of ve's noise at the data")
    sigma_max: float = _ve_option(
        VarianceExploding.sigma_max, "and at the noise; as large as the largest distance between two images"
    )
    log_snr_max: float = _learned_option(13.3, "log snr at the data that learning starts from")
    log_snr_min: float = _learned_option(-5.0, "log snr at the noise that learning starts from")
    schedule_features: int = _learned_option(
        256, "width of the monotone network between the two; 0 for log snr that falls evenly", at_least=0
    )
    bound_steps: int | None = _learned_option(
        None, "steps of the chain whose bound is trained; by default infinitely many, continuous time", at_least=1
    )
    prediction_type: Literal[PREDICTION_TYPES] | None = fixed_option(
        None, "what the model outputs; by default v_prediction, and flow, eps - x_0, with path linear"
    )

    def __post_init__(self):
        # Resolved here, so that a run's options say what it was.
        if self.beta_schedule is None:
            object.__setattr__(self, "beta_schedule", TABLES.get(self.path))
        if self.prediction_type is None:
            object.__setattr__(self, "prediction_type", "flow" if self.is_linear else "v_prediction")
        super().__post_init__()
        if (self.path == PRETRAINED_PATH) != (self.pretrained_pipeline is not None):
            raise ValueError(f"path {PRETRAINED_PATH} is that of a pretrained_pipeline: give both or neither")
        fitting = BETA_SCHEDULES if self.path in (None, "vp") else (TABLES.get(self.path),)
        if self.beta_schedule not in fitting:
            raise ValueError(
                f"path {self.path} and beta_schedule {self.beta_schedule} both say which noise levels to train on: give "
                "one of them"
            )
        if self.rescale_betas_zero_snr and self.path not in TABLES:
            raise ValueError(
                f"rescale_betas_zero_snr is of a beta_schedule, which path {self.path} is not: leave it out"
            )
        if self.is_linear and self.prediction_type in ("epsilon", "score"):
            raise ValueError(
                "prediction_type must be flow, v_prediction or sample with path linear, whose last level holds no signal to "
                f"divide by, got {self.prediction_type}"
            )
        if self.path in PATHS:
            self.make_path()  # which checks the numbers
        if not self.log_snr_min < self.log_snr_max:
            raise ValueError(
                f"log_snr_min must be less than log_snr_max, got {self.log_snr_min:g} and {self.log_snr_max:g}"
            )

    def make_path(self) -> Path:
        """The path in continuous time that `path` names."""
        match self.path:
            case "ve":
                return PATHS["ve"](self.sigma_min, self.sigma_max)
            case "subvp":
                return PATHS["subvp"](self.beta_min, self.beta_max)
        return PATHS[self.path]()

    def make_noise_schedule(self) -> LearnedSchedule:
        """That of path "learned", as it is before training."""
        return LearnedSchedule(-self.log_snr_max, -self.log_snr_min, self.schedule_features)

    @property
    def is_linear(self) -> bool:
        """Whether the path is that of rectified flow."""
        if self.path == PRETRAINED_PATH and self.pretrained_pipeline is not None:
            return read_pretrained(self.pretrained_pipeline).is_linear
        return self.path == "linear"

    @property
    def default_scheduler(self) -> str:
        """Of `SCHEDULERS`, the one that samples this path in the way of its papers."""
        if self.path == PRETRAINED_PATH:
            scheduler = read_pretrained(self.pretrained_pipeline).scheduler
            same = [name for name, cls in SCHEDULERS.items() if type(scheduler) is cls]
            return same[0] if same else "flow" if self.is_linear else "ddim"
        return {"ve": "score_sde", "subvp": "score_sde", "linear": "flow"}.get(self.path, "ddim")


def build_scheduler(
    config: "DenoisingConfig", noise_schedule: LearnedSchedule | None = None, largest_x0: float = 1.0
) -> SchedulerMixin:
    """The scheduler that is saved with the pipeline; its path is the training's.

    Args:
        noise_schedule: Of path "learned", as it stands; by default as it is before training.
        largest_x0: Of images, as the denoiser knows them: the predicted ones are clipped to it.
    """
    cls, length = SCHEDULERS[config.scheduler], config.num_train_timesteps
    if config.path == PRETRAINED_PATH:
        return _scheduler_as_before(config, cls)
    options = {
        "num_train_timesteps": length,
        "prediction_type": config.prediction_type,
        "timestep_spacing": config.timestep_spacing,
    }
    if config.path == "linear":
        return cls(**options)
    # Images end somewhere, latents do not.
    clip = {"clip_sample": config.vae is None, "clip_sample_range": largest_x0}
    learned = {}
    if config.path == "learned":
        learned = learned_betas(noise_schedule or config.make_noise_schedule(), length)
        options["trained_betas"] = learned.pop("trained_betas")
    scheduler = cls(**options, **clip, **_path_options(config))
    scheduler.register_to_config(**learned)
    if config.learns_variance:
        # Of those too that have no use for it, so that whoever makes another scheduler from the config knows.
        scheduler = type(scheduler).from_config(scheduler.config, variance_type="learned_range")
        scheduler.register_to_config(variance_type="learned_range")
    return scheduler


# Of a scheduler's config, what was measured of the network as it was.
_MEASURED = ("optimal_timesteps", "analytic_variance", "multistep_order")


def _scheduler_as_before(config: "DenoisingConfig", cls: type[SchedulerMixin]) -> SchedulerMixin:
    """That of `pretrained_pipeline`, or one of another class on its path."""
    before = dict(read_pretrained(config.pretrained_pipeline).scheduler.config)
    kept = {key: value for key, value in before.items() if key not in _MEASURED}
    if kept.get("variance_type") == "analytic":
        del kept["variance_type"]
    scheduler = cls.from_config(kept, timestep_spacing=config.timestep_spacing)
    if config.learns_variance:
        scheduler.register_to_config(variance_type="learned_range")
    return scheduler


def _path_options(config: "DenoisingConfig") -> dict[str, Any]:
    """The options of the scheduler's path."""
    if config.path in TABLES:
        options = {
            "beta_schedule": config.beta_schedule,
            "beta_start": config.beta_start,
            "beta_end": config.beta_end,
            "rescale_betas_zero_snr": config.rescale_betas_zero_snr,
        }
        reference = config.beta_reference_timesteps
        if reference is None and config.path == "vp":
            reference = REFERENCE_TIMESTEPS
        if reference is not None and reference != config.num_train_timesteps:
            options["beta_reference_timesteps"] = reference
        return options
    if config.path == "learned":
        return {}
    path = config.make_path()
    if config.scheduler == "score_sde":
        # The scheduler makes the betas itself; of its predictors the flow is the one that few steps suffice for.
        return {"path": config.path, "unit_scale_input": True, "predictor": "ode"} | dataclasses.asdict(path)
    return {"trained_betas": PathSchedule(path, config.num_train_timesteps).betas.tolist()}
