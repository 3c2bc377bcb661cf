"""The Fréchet distance of a calibrated pipeline by sampler and number of network calls, with and without its guidance.

    python benchmarks/bench_few_calls.py runs/digits --num_steps 5 10 --num_images 300

PIPELINE was calibrated by training/calibrate.py. Image i of every set is made from the same noise, none of which the
calibration saw, and compared with all training images. Calls of the network an image are the number of steps, twice in the
steps that are guided; the solvers of diffusers have the spacing that the chosen timesteps take the place of. The bits/dim of
held-out images follow, of the bound of as many steps.
"""

import argparse
import warnings

import diffusers
import torch
from accelerate import PartialState

import diffusers_ext
from diffusers_ext.evaluation.bits_per_dim import measure_bits_per_dim
from diffusers_ext.evaluation.evaluator import Evaluator
from diffusers_ext.evaluation.feature_folders import features_for
from diffusers_ext.evaluation.generate import generate_images
from diffusers_ext.evaluation.network_calls import counted_calls
from diffusers_ext.evaluation.options import DataOptions, take_options_of_run
from diffusers_ext.evaluation.pipeline_facts import image_size_of
from diffusers_ext.evaluation.real_images import load_real_images
from diffusers_ext.evaluation.subject import labels_for, load_pipeline


SEED = 900  # of the sets, far from those that anything is chosen by
PLAIN = {"optimal_timesteps": None, "variance_type": "fixed_small"}


def samplers(config):
    """Schedulers by name, and options of the call with them."""
    ours, eta = diffusers_ext, {"eta": 1e-3}
    chosen = config["optimal_timesteps"]

    def lists_of(objective):
        return {"optimal_timesteps": {"spacing": chosen["spacing"], objective: chosen[objective]}}

    yield "DDPM, fixed_small", ours.ExtDDPMScheduler.from_config(config, **PLAIN), {}
    yield (
        "DDPM, fixed_large",
        ours.ExtDDPMScheduler.from_config(config, **PLAIN | {"variance_type": "fixed_large"}),
        {},
    )
    yield "DDPM, analytic", ours.ExtDDPMScheduler.from_config(config, optimal_timesteps=None), {}
    yield "DDPM, analytic, by the bound", ours.ExtDDPMScheduler.from_config(config, **lists_of("bound")), {}
    yield "DDPM, analytic, by the trajectory", ours.ExtDDPMScheduler.from_config(config, **lists_of("trajectory")), {}
    yield "DDIM", ours.ExtDDIMScheduler.from_config(config, **PLAIN), {}
    yield "analytic DDIM", ours.ExtDDIMScheduler.from_config(config, optimal_timesteps=None), eta
    yield "DDIM, by the trajectory", ours.ExtDDIMScheduler.from_config(config), {}
    yield "DDIM, by the bound", ours.ExtDDIMScheduler.from_config(config, **lists_of("bound")), {}
    plain = ours.ExtDDIMScheduler.from_config(config, **PLAIN).config
    for name in (
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
        "EulerDiscreteScheduler",
    ):
        yield f"diffusers' {name.removesuffix('Scheduler')}", getattr(diffusers, name).from_config(plain), {}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("--num_steps", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--num_likelihood_images", type=int, default=100)
    options = parser.parse_args()
    warnings.simplefilter("ignore")

    state, pipe = PartialState(), load_pipeline(options.pipeline)
    data = take_options_of_run(DataOptions(resolution=image_size_of(pipe)), options.pipeline)
    real = load_real_images(data.for_data())
    features, _ = features_for(real, None, state)
    evaluator = Evaluator(real.train, features, 1000, in_pixels=False)
    labels, _ = labels_for(real, pipe.num_classes, options.num_images)
    config, defaults = dict(pipe.scheduler.config), dict(pipe.config.call_defaults)
    guidance = {name: value for name, value in defaults.items() if name != "num_inference_steps"} or {
        "guidance_scale": 1.0
    }
    held_out = evaluator.measure_held_out(real.held_out, options.num_images)["frechet_distance"]
    print(f"held-out real images {held_out:.3g}; guidance {guidance}\n")
    print(f"| sampler | {' | '.join(f'{n} steps | guided, {n}' for n in options.num_steps)} |")
    print("|---" * (1 + 2 * len(options.num_steps)) + "|")
    for name, scheduler, more in samplers(config):
        pipe.scheduler, cells = scheduler, []
        for number in options.num_steps:
            for settings in ({"guidance_scale": 1.0}, guidance):
                with counted_calls(pipe) as counts:
                    images = generate_images(
                        pipe,
                        range(options.num_images),
                        labels=labels,
                        num_inference_steps=number,
                        settings=settings | more,
                        seed=SEED,
                        show_progress=False,
                    )
                distance = evaluator.measure(images, torch.tensor(labels))["frechet_distance"]
                cells.append(f"{distance:.3g} ({counts['denoiser'] / options.num_images:.3g} calls)")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)

    print(f"\n| variance, timesteps | {' | '.join(f'{n} steps' for n in options.num_steps)} |")
    print("|---" * (1 + len(options.num_steps)) + "|")
    for name, scheduler, _ in samplers(config):
        if not name.startswith("DDPM"):
            continue
        pipe.scheduler, cells = scheduler, []
        for number in options.num_steps:
            bound = measure_bits_per_dim(
                pipe,
                real.held_out,
                num_images=options.num_likelihood_images,
                num_steps=number,
                num_terms=None,
                show_progress=False,
            )
            cells.append(f"{bound['bits_per_dim']:.3f}")
        print(f"| {name.removeprefix('DDPM, ')} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
