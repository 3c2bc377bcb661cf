"""Sampling by the reverse-time SDE of a Gaussian path (Song et al. 2020, arXiv 2011.13456)."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from diffusers_ext.diffusion.betas import check_integer
from diffusers_ext.diffusion.noising import predict_eps, weighted_sum
from diffusers_ext.diffusion.paths import ContinuousTime
from diffusers_ext.diffusion.probability_flow import solve_flow
from diffusers_ext.diffusion.reverse_sde import CORRECTORS, PREDICTORS, SDEStep, corrector_step_size, langevin
from diffusers_ext.diffusion.variational_bound import Denoise
from diffusers_ext.schedulers.any_path import AnyPathSchedulerMixin
from diffusers_ext.schedulers.gaussian import as_output, check_choice, check_output, draw_noise, has_no_noise, wide


# Predictors that draw nothing: the probability flow.
FLOWS = ("ode", "heun")


class ScoreSDEScheduler(AnyPathSchedulerMixin):
    """Predictor-corrector sampling on the VP, VE, sub-VP or cosine path (Song et al. 2020, Algorithms 1-5).

    The predictors, from the level t to the next listed level s:

    - "reverse_diffusion": Eq. 46 (Appendix E), with f and G of the noising chain between the two levels.
    - "euler_maruyama": the reverse SDE with drift and diffusion as they are at t. On the VP path beta(t) = T beta_t.
    - "ancestral": the posterior of the noising chain, on the VE path Eq. 47 (Appendix F), on the VP path
      `ExtDDPMScheduler` with "fixed_small".
    - "ode": the probability flow by steps that are exact where the predicted x_0 stays the same: `ExtDDIMScheduler`.
    - "heun": the same with the mean of the x_0 predicted at both ends, of second order; two calls of the network a step.

    On Gaussian data all of them but "heun" have an error of first order in the number of steps, and "ancestral" and "ode"
    none for data that are a single point. The last step, to the clean end, is the predicted x_0 for each (Tweedie's
    formula; Appendix G).

    At each level but the first, where x_t is noise anyway, `corrector_steps` steps of Langevin dynamics come before the
    predictor. `timesteps` then lists these levels once for each call of the network, and the loop must go through them
    in order: n steps take n + (n - 1) corrector_steps calls. With a timestep for each sample, all samples must be at the
    same call.

    The VP path is the table of the beta keys, those of diffusers, so that any of its models can be sampled; that of the
    other paths is at the times 1/T, 2/T, ..., 1, and timestep i at (i + 1) / T. There the network sees x_t itself, as in
    the paper's code, or with `unit_scale_input` x_t / sqrt(alpha^2 + sigma^2). In the second case the config has
    `trained_betas` with which every scheduler of a VP path samples the same network.

    Args:
        num_train_timesteps: T, the number of levels that the model was trained on.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr, beta_reference_timesteps: Of the VP
            path, as in `ExtDDIMScheduler`.
        path: "vp", "ve", "subvp" or "cosine".
        sigma_min, sigma_max: Of "ve", see `diffusers_ext.diffusion.paths.VarianceExploding`.
        beta_min, beta_max: Of "subvp", see `diffusers_ext.diffusion.paths.SubVariancePreserving`.
        unit_scale_input: Whether the network sees x_t / sqrt(alpha^2 + sigma^2), and so predicts what it would on the
            path at unit scale.
        predictor: See above.
        corrector: Step size of the corrector, see `diffusers_ext.diffusion.reverse_sde.corrector_step_size`.
        corrector_steps: Steps of the corrector at a level.
        snr: Signal-to-noise ratio r of the corrector's step; the paper uses 0.16 for VE and smaller ones for large images.
        prediction_type: One of `diffusers_ext.diffusion.noising.PREDICTION_TYPES`.
        clip_sample, clip_sample_range: Whether to clip the predicted x_0, and to which magnitude.
        thresholding, dynamic_thresholding_ratio, sample_max_value: Dynamic thresholding, as in `ExtDDIMScheduler`.
        timestep_spacing: One of `diffusers_ext.diffusion.timesteps.TIMESTEP_SPACINGS`.
        steps_offset: Added to the timesteps of "leading".

    Raises:
        ValueError: If a value is unknown or out of range, or the prediction type is undefined at a level without signal.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | Sequence[float] | None = None,
        path: str = "vp",
        sigma_min: float | None = 0.01,
        sigma_max: float | None = 50.0,
        beta_min: float | None = 0.1,
        beta_max: float | None = 20.0,
        unit_scale_input: bool = False,
        predictor: str = "reverse_diffusion",
        corrector: str = "langevin",
        corrector_steps: int = 0,
        snr: float = 0.16,
        prediction_type: str = "epsilon",
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "trailing",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        beta_reference_timesteps: int | None = None,
    ):
        check_choice("predictor", predictor, PREDICTORS)
        check_choice("corrector", corrector, CORRECTORS)
        check_integer("corrector_steps", corrector_steps, at_least=0)
        if not 0 < snr < 1:
            raise ValueError(f"snr must be above 0 and below 1, got {snr}")
        self.calls = ("mean",) * (predictor == "heun") + ("correct",) * corrector_steps + ("predict",)
        self._first_call = len(self.calls) - 1
        self._predictor = predictor
        self._setup()
        if predictor == "euler_maruyama" and self.schedule.alpha[-2] == 0:
            raise ValueError(
                "predictor must not be 'euler_maruyama' on a path that ends without signal, where the drift is infinite; "
                "take 'reverse_diffusion' or 'ancestral'"
            )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        super().set_timesteps(num_inference_steps, device, timesteps)
        if self.config.predictor == "euler_maruyama" and self._is_unstable():
            warnings.warn(
                f"{self.num_inference_steps} steps are too few for 'euler_maruyama', whose errors grow from step to step "
                "where g^2 dt is above 2 sigma^2: take more steps, or 'reverse_diffusion' or 'ancestral'",
                stacklevel=2,
            )

    def _is_unstable(self) -> bool:
        listed = self.timesteps.cpu()
        steps = self._steps_between(listed, self.previous_timestep(listed))
        return bool((steps.std**2 > 2 * steps.t.sigma**2).any())

    def _visit(self, descending: np.ndarray, device) -> None:
        self._begun: tuple[SDEStep, Tensor, Tensor] | None = None  # of Heun's step: it, x_t and the x_0 there
        super()._visit(descending, device)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        variance_noise: Tensor | None = None,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """The predictor's step from x_t to x_s, s the next lower timestep of the list, or a corrector's step at t.

        Args:
            model_output: The model's output at `scale_model_input(sample, timestep)`, of its shape or with twice the
                channels (a learned variance, for which the SDE has no use).
            timestep: In [0, num_train_timesteps), one or one for each sample, shape `(batch,)`. One between the
                listed ones steps to the next lower listed one.
            sample: x_t, shape `(batch, channels, ...)`.
            generator: Source of the noise. With a list, that of sample i comes from generator i alone.
            variance_noise: The unit noise itself, of the shape of `sample`, instead of a generator.

        Returns: `prev_sample` is x_s, or x_t corrected; `pred_original_sample` the predicted x_0.

        Raises:
            ValueError: If a shape does not fit or a timestep is out of range.
        """
        output, _ = check_output(model_output, sample, takes_variance=True)
        at = self._transition(timestep, sample)
        x_t = wide(sample)
        x0 = self._predict_x0(at, wide(output), x_t)

        def noise() -> Tensor:
            return wide(draw_noise(output, generator, variance_noise))

        match self._next_call():
            case "mean":
                x = self._end_with_mean(x0)
            case "correct":
                eps = predict_eps(x0, x_t, at.t)
                step_size = corrector_step_size(self.config.corrector, self.config.snr, eps, at.kept)
                x = langevin(x_t, eps, at.t, step_size, noise())
            case "predict":
                if self.config.predictor == "heun":
                    self._begun = at, x_t, x0
                draws = self.config.predictor not in FLOWS and not has_no_noise(at.s)
                x = weighted_sum((at.mean_of_x0, x0), (at.mean_of_x_t, x_t), (at.std, noise() if draws else None))

        return as_output(DDIMSchedulerOutput, x, x0, torch.promote_types(sample.dtype, output.dtype), return_dict)

    def solve_ode(
        self, denoise: Denoise, sample: Tensor, *, rtol: float = 1e-5, atol: float = 1e-5
    ) -> tuple[Tensor, int]:
        """The data that the probability flow takes noise to, solved to tolerances (Song et al. 2020, Appendix D.4).

        By SciPy's RK45 from the noisiest timestep to timestep 0, and from there the predicted x_0. It needs no
        `set_timesteps` and clips nothing on the way. For the likelihood see `diffusers_ext.diffusion.probability_flow`.

        Args:
            denoise: The model, `denoise(x, timesteps)` with x as it sees it and fractional timesteps in [0, T - 1], shape
                `(batch,)`, in the dtype of `sample`. As in `step` it may have twice the channels.
            sample: x_T, such as N(0, 1) times `init_noise_sigma`, shape `(batch, channels, ...)`.
            rtol, atol: Tolerances of x_t / sqrt(alpha^2 + sigma^2) in each step.

        Returns: The sample, and how often the model was called.

        Raises:
            ImportError: If SciPy is not installed.
            RuntimeError: If the tolerances cannot be kept.
            ValueError: If the model's output has another shape.
        """

        def predict(x: Tensor, timesteps: Tensor) -> Tensor:
            return check_output(denoise(x, timesteps), x, takes_variance=True)[0]

        config, last = self.config, len(self.schedule) - 1
        x, num_calls = solve_flow(
            predict,
            sample,
            ContinuousTime(self.schedule),
            (last, 0),
            config.prediction_type,
            unit_scale_input=config.unit_scale_input,
            rtol=rtol,
            atol=atol,
        )
        with torch.no_grad():
            output = predict(self.scale_model_input(x, 0), x.new_zeros(len(x))).to(x.dtype)
        return self._predict_x0(self._transition(0, x), output, x), num_calls + 1

    def _end_with_mean(self, x0: Tensor) -> Tensor:
        """The step begun at the level before again, with the mean of its x_0 and the one at its end."""
        if self._begun is None:
            raise ValueError(
                "a loop must go through `timesteps` in its order, from its start or from a multiple of `order`; call "
                "set_timesteps before a new one"
            )
        (at, x_t, first), self._begun = self._begun, None
        return weighted_sum((at.mean_of_x0 / 2, first), (at.mean_of_x0 / 2, x0), (at.mean_of_x_t, x_t))
