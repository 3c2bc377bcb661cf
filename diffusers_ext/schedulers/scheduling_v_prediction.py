"""Sampling of models that predict v (Salimans & Ho 2022, arXiv 2202.00512)."""

from collections.abc import Sequence

import numpy as np
from diffusers.configuration_utils import register_to_config

from diffusers_ext.schedulers.scheduling_ddim import ExtDDIMScheduler


class VPredictionScheduler(ExtDDIMScheduler):
    """`ExtDDIMScheduler` for v-prediction with zero terminal SNR and "trailing" timesteps.

    The defaults are those that Lin et al. 2023 (arXiv 2305.08891) recommend. The deterministic step of a v-prediction is
    a rotation of (x_t, v) by the angle between the levels (Salimans & Ho 2022, Appendix D), so nothing grows where
    alpha_bar_T = 0. Of another scheduler's config it takes all that belongs to the model, such as Stable Diffusion
    2.1-v's `rescale_betas_zero_snr=False`, and what was set explicitly of the rest. A config that does not say
    "v_prediction" means "epsilon", as everywhere in diffusers.

    Args: as `ExtDDIMScheduler`; `prediction_type` must be "v_prediction".

    Raises:
        ValueError: As there, and if `prediction_type` is another.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | Sequence[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "v_prediction",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "trailing",
        rescale_betas_zero_snr: bool = True,
        beta_reference_timesteps: int | None = None,
        variance_type: str | None = None,
        analytic_variance: dict | None = None,
        optimal_timesteps: dict | None = None,
        multistep_order: int = 1,
    ):
        if prediction_type != "v_prediction":
            raise ValueError(
                f"prediction_type must be 'v_prediction', got {prediction_type!r}; use ExtDDIMScheduler for the others, "
                "or pass prediction_type='v_prediction' if the model predicts v and its config does not say so"
            )
        # Other classes have other defaults for these, so `from_config` must hand them on.
        self._register_explicitly(
            prediction_type=prediction_type,
            timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        self._setup()
