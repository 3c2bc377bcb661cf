"""The options of likelihood, and what refuses data and models that have none."""

from dataclasses import dataclass
from typing import Literal

from diffusers_ext.diffusion.probability_flow import DEQUANTIZATIONS
from diffusers_ext.evaluation.bits_per_dim import FIXED_VARIANCES, measure_bits_per_dim
from diffusers_ext.evaluation.flow_settings import FlowSettings
from diffusers_ext.evaluation.real_images import RealImages
from diffusers_ext.options import option


@dataclass(frozen=True)
class LikelihoodOptions:
    """Whether and how the likelihood of held-out images is measured."""

    bits_per_dim: bool = option(
        False,
        "measure what a lossless code by the model would take for held-out images in 8 bits: the variational bound",
        "likelihood",
    )
    num_likelihood_images: int | None = option(
        None,
        "held-out images to measure it on; 1000 if left open, at most all",
        at_least=1,
        needs="bits_per_dim",
    )
    num_likelihood_steps: int | None = option(
        None,
        "timesteps of the sampler whose bound it is; by default all that the model was trained on",
        at_least=1,
        needs="bits_per_dim",
    )
    num_likelihood_terms: int | None = option(
        None,
        "timesteps of these to look at for each image, drawn without bias; 100 if left open, more make the standard "
        "error smaller",
        at_least=1,
        needs="bits_per_dim",
    )
    likelihood_variance: Literal[FIXED_VARIANCES] | None = option(
        None,
        "variance of the sampler's steps; by default learned if the model learned it, else the scheduler's, else that of "
        "its path: fixed_large, or optimal where the schedule is learned or the path does not preserve the variance; "
        "analytic is what training/calibrate.py measured; optimal is measured on a batch of training images",
        needs="bits_per_dim",
    )
    num_flow_steps: int | None = option(
        None,
        "measure the bound by the probability flow too, in this number of steps; each asks the model four times",
        at_least=1,
        needs="bits_per_dim",
    )
    flow_tolerance: float | None = option(
        None,
        "or to this tolerance, by SciPy's RK45; the number of calls is reported",
        needs="bits_per_dim",
    )
    dequantization: Literal[DEQUANTIZATIONS] = option(
        "decoder",
        "where the flow starts: at the cleanest noise level, from which the decoder gives the image; or within the bin of each "
        "value, at a uniform point or by the path's own noise, truncated to the bin (arXiv 2305.03935)",
        needs="bits_per_dim",
    )
    likelihood_curves: bool = option(
        False,
        "rate-distortion curve and the bound's term of each timestep, in the result and as likelihood.png beside it",
        needs="bits_per_dim",
    )

    def check_likelihood(self) -> None:
        """Refuses options that contradict one another.

        Raises:
            ValueError: with what to do.
        """
        if self.flow_tolerance is not None and not 0 < self.flow_tolerance < 1:
            raise ValueError(f"flow_tolerance must be in (0, 1), got {self.flow_tolerance}")
        if self.bits_per_dim:
            FlowSettings.of(self.num_flow_steps, self.flow_tolerance, self.dequantization)

    def check_likelihood_of(self, pipeline) -> None:
        """Refuses more timesteps than a pipeline has, before any data are read.

        Raises:
            ValueError: with their number.
        """
        length, asked = pipeline.scheduler.config.get("num_train_timesteps"), self.num_likelihood_steps
        if None not in (length, asked) and asked > length:
            raise ValueError(
                f"num_likelihood_steps must be at most the {length} timesteps that the model was trained on, got {asked}"
            )

    def measure_likelihood(self, pipeline, real: RealImages, *, batch_size: int, bf16: bool, seed: int) -> dict:
        """The variational bound of held-out images, see `measure_bits_per_dim`.

        Raises:
            ValueError: if the data have no probabilities, or no images that the model was not trained on.
        """
        if real.value_scale is not None:
            raise ValueError(
                f"--bits_per_dim is of images in 8 bits, and {real.name} holds sequences of numbers, which have a density and "
                "no probability, so that no lossless code has a length"
            )
        if real.held_out is None:
            raise ValueError(
                f"--bits_per_dim is of images not trained on: name a split of {real.name} by --held_out_split"
            )
        return measure_bits_per_dim(
            pipeline,
            real.held_out,
            train=real.train,
            num_images=self.num_likelihood_images or 1000,
            num_steps=self.num_likelihood_steps,
            num_terms=self.num_likelihood_terms or 100,
            variance=self.likelihood_variance,
            num_flow_steps=self.num_flow_steps,
            flow_tolerance=self.flow_tolerance,
            dequantization=self.dequantization,
            with_curves=self.likelihood_curves,
            batch_size=batch_size,
            bf16=bf16,
            seed=seed,
        )
