"""What diffusers' users and its own test suites take for granted of a pipeline."""

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from diffusers.guiders import ClassifierFreeGuidance
from torch import nn

from diffusers_ext import ExtDDIMScheduler, ExtDDPMScheduler, GuidedDiffusionPipeline, UNetModel


def tiny_pipeline(scheduler=None, out_channels: int = 1) -> GuidedDiffusionPipeline:
    torch.manual_seed(0)
    unet = UNetModel(8, 1, out_channels, block_out_channels=(8, 16), layers_per_block=1, num_classes=3)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.2)
    pipeline = GuidedDiffusionPipeline(unet, scheduler or ExtDDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: GuidedDiffusionPipeline, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    kwargs = {"class_labels": [1], "num_inference_steps": 4, "output_type": "latent", **kwargs}
    return pipeline(generator=generator, **kwargs).images


@pytest.mark.parametrize(
    "cls",
    [
        DPMSolverMultistepScheduler,
        DPMSolverSinglestepScheduler,
        EulerDiscreteScheduler,
        KDPM2DiscreteScheduler,
        PNDMScheduler,
        SASolverScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_a_learned_variance_is_left_away_by_schedulers_that_draw_none(cls):
    """Made from the config of one that does, as users switch samplers; that config keeps the foreign key."""
    learned = tiny_pipeline(ExtDDPMScheduler(variance_type="learned_range"), out_channels=2)
    learned.scheduler = cls.from_config(learned.scheduler.config)
    assert learned.scheduler.config["variance_type"] == "learned_range"

    plain = tiny_pipeline(cls.from_config(ExtDDPMScheduler().config))
    weights = learned.denoiser.state_dict()
    first = {name: value[:1] if name.startswith("conv_out") else value for name, value in weights.items()}
    plain.denoiser.load_state_dict(first)
    torch.testing.assert_close(sample(learned), sample(plain))


@torch.no_grad()
def test_a_solver_that_keeps_three_channels_is_refused_for_four():
    """Solvers of diffusers cut what they are given to the channels of an RGB image if the variance is learned."""
    scheduler = DPMSolverMultistepScheduler.from_config(ExtDDPMScheduler(variance_type="learned_range").config)
    unet = UNetModel(8, 4, 8, block_out_channels=(8, 16), layers_per_block=1)
    pipeline = GuidedDiffusionPipeline(unet, scheduler)
    with pytest.raises(ValueError, match=r"from_config\(config, variance_type=None\)"):
        pipeline(num_inference_steps=2, output_type="latent")
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config, variance_type=None)
    assert pipeline(num_inference_steps=2, output_type="latent").images.shape == (1, 4, 8, 8)


def test_a_callback_knows_which_step_is_the_last():
    def clear_at_the_end(pipeline, step, timestep, tensors):
        return {"latents": tensors["latents"] * (step < pipeline.num_timesteps - 1)}

    assert sample(tiny_pipeline(), callback_on_step_end=clear_at_the_end).abs().sum() == 0


@pytest.mark.parametrize("start, change", [(3.0, 1.0), (1.0, 3.0), (2.0, 5.0)])
def test_a_callback_sets_the_guidance_of_the_steps_that_follow(start, change):
    """From the second step on it is a call at the new scale from the latents of the first."""
    pipeline, seen = tiny_pipeline(), []

    def set_scale(pipeline, step, timestep, tensors):
        seen.append(tensors["latents"])
        pipeline._guidance_scale = change
        return tensors

    changed = sample(pipeline, guidance_scale=start, callback_on_step_end=set_scale)
    assert pipeline.guidance_scale == change

    rest = pipeline.scheduler.timesteps[1:].tolist()
    expected = sample(pipeline, guidance_scale=change, latents=seen[0], num_inference_steps=None, timesteps=rest)
    torch.testing.assert_close(changed, expected)


def test_a_callback_cannot_scale_a_guider_that_was_given():
    def set_scale(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = 3.0

    with pytest.raises(ValueError, match="guidance_scale must not be given together with a guider"):
        sample(tiny_pipeline(), guider=ClassifierFreeGuidance(guidance_scale=2.0), callback_on_step_end=set_scale)


def test_a_callback_may_end_a_call_early():
    """Its images are those of the last step, and the next call is whole again."""
    pipeline, seen = tiny_pipeline(), []

    def stop(pipeline, step, timestep, tensors):
        seen.append(tensors["latents"])
        pipeline._interrupt = step == 1

    stopped = sample(pipeline, callback_on_step_end=stop)
    assert pipeline.interrupt and len(seen) == 2
    assert torch.equal(stopped, seen[-1])
    whole = sample(pipeline)
    assert not pipeline.interrupt and not torch.equal(whole, stopped)


def test_a_callback_of_diffusers_says_itself_which_tensors_it_changes():
    class Halve(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": callback_kwargs["latents"] * 0.5}

    def halve(pipeline, step, timestep, tensors):
        return {"latents": tensors["latents"] * 0.5}

    expected = sample(tiny_pipeline(), callback_on_step_end=halve)
    for callback in (Halve(), MultiPipelineCallbacks([Halve()])):
        assert torch.equal(sample(tiny_pipeline(), callback_on_step_end=callback), expected)
    calls = []
    pipeline = tiny_pipeline()
    pipeline.denoiser.register_forward_hook(lambda *args: calls.append(1))
    with pytest.raises(
        ValueError, match=r"among \['latents'\], got \['prompt_embeds'\], which SDCFGCutoffCallback asks"
    ):
        sample(pipeline, callback_on_step_end=SDCFGCutoffCallback(0.5))
    assert not calls


def test_a_pipeline_is_called_while_its_weights_are_elsewhere():
    """With sequential offload they stand on the meta device between the layers' turns."""
    torch.manual_seed(0)
    vae = AutoencoderKL(1, 1, latent_channels=1, norm_num_groups=4, block_out_channels=(4,))
    unet = tiny_pipeline().denoiser

    def one_step(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        return sample(pipeline, num_inference_steps=1, output_type="pt")

    expected = one_step(GuidedDiffusionPipeline(unet, ExtDDIMScheduler(timestep_spacing="trailing"), vae))
    pipeline = GuidedDiffusionPipeline(unet, ExtDDIMScheduler(timestep_spacing="trailing"), vae)
    for model in (unet, vae):
        cpu_offload(model, "cpu")
    assert {parameter.device.type for parameter in vae.parameters()} == {"meta"}
    torch.testing.assert_close(one_step(pipeline), expected)
    assert {parameter.device.type for parameter in unet.parameters()} == {"meta"}
