"""Pipelines on an accelerator: generators of either device, guidance, latents, texts, offloading; and features of images."""

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler

from devices import DEVICES, assert_near, moved, no_host_sync
from diffusers_ext import ExtDDIMScheduler, ExtDDPMScheduler, GuidedDiffusionPipeline, TextGuidedDiffusionPipeline
from diffusers_ext.metrics import FeatureClassifierModel
from tiny import tiny_unet
from tiny_text import tiny_clip, tiny_text_unet, tiny_tokenizer
from tiny_vae import tiny_vae


pytestmark = pytest.mark.device

STEPS = 4
# What users do with the pipeline before they call it.
PLACEMENTS = ["moved", "offloaded"] if DEVICES == ["cuda"] else ["moved"]


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_label(scheduler_class=ExtDDIMScheduler):
    scheduler = scheduler_class(timestep_spacing="trailing")
    return quiet(GuidedDiffusionPipeline(tiny_unet(num_classes=3).eval(), scheduler))


def in_latents():
    network = tiny_unet()
    network = type(network).from_config(network.config, in_channels=4, out_channels=4).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    scheduler = ExtDDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    return quiet(GuidedDiffusionPipeline(network, scheduler, vae=tiny_vae()))


def by_text():
    tokenizer, scheduler = tiny_tokenizer(), ExtDDIMScheduler(timestep_spacing="trailing")
    return quiet(TextGuidedDiffusionPipeline(tiny_text_unet(), scheduler, tokenizer, tiny_clip(tokenizer)))


PIPELINES = {
    "guided": (by_label, {"class_labels": [0, 2], "guidance_scale": 3.0}),
    "guided, ancestral": (lambda: by_label(ExtDDPMScheduler), {"class_labels": [0, 2], "guidance_scale": 3.0}),
    "latents": (in_latents, {"batch_size": 2}),
    "text": (by_text, {"prompt": ["red dot", "blue bar"], "guidance_scale": 2.0}),
}


def images_of(pipe, generator, **arguments):
    return pipe(**arguments, generator=generator, num_inference_steps=STEPS, output_type="pt").images


def seeded(device, count=None, first=0):
    if count is None:
        return torch.Generator(device).manual_seed(first)
    return [torch.Generator(device).manual_seed(first + i) for i in range(count)]


@pytest.mark.product
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", PIPELINES)
def test_a_generator_of_the_cpu_gives_the_cpu_s_images(name, placement, device):
    make, arguments = PIPELINES[name]
    expected = images_of(make(), seeded("cpu"), **arguments)
    pipe = make()
    if placement == "moved":
        pipe.to(device)
    else:
        pipe.enable_model_cpu_offload(device=device)
    assert_near(images_of(pipe, seeded("cpu"), **arguments), expected, 2e-3)
    if placement == "offloaded":
        assert pipe.denoiser.device.type == "cpu" and torch.device(pipe._execution_device).type == device


@pytest.mark.parametrize("name", PIPELINES)
def test_generators_of_the_device_make_each_image_by_itself(name, device):
    make, arguments = PIPELINES[name]
    pipe = make().to(device)
    both = images_of(pipe, seeded(device, 2), **arguments)
    assert both.device.type == device
    one = {key: value[1:] if isinstance(value, list) else value for key, value in arguments.items()}
    one |= {"batch_size": 1} if "batch_size" in one else {}
    alone = images_of(pipe, seeded(device, 1, first=1), **one)
    assert_near(alone[0], both[1], 2e-3)


@pytest.mark.parametrize("name", PIPELINES)
def test_between_its_first_and_last_step_a_pipeline_waits_for_nothing(name, device):
    make, arguments = PIPELINES[name]
    pipe, steps = make().to(device), []
    images_of(pipe, None, **arguments)

    watched = None

    def watch(pipe, step, timestep, tensors):
        nonlocal watched
        steps.append(step)
        if step == 0:
            watched = no_host_sync(device)
            watched.__enter__()
        if step == STEPS - 1:
            watched.__exit__(None, None, None)
        return {}

    try:
        images_of(pipe, None, callback_on_step_end=watch, **arguments)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert steps == list(range(STEPS))


def test_stock_s_pipeline_makes_the_same_images_with_the_same_seed(device):
    """From one network, on one device, by a generator of it."""
    network = tiny_unet().to(device).eval()
    ours = quiet(GuidedDiffusionPipeline(network, ExtDDIMScheduler()))
    stock = quiet(DDIMPipeline(network, DDIMScheduler()))
    kwargs = {"batch_size": 3, "num_inference_steps": 20, "output_type": "np"}
    images = [torch.as_tensor(pipe(**kwargs, generator=seeded(device)).images) for pipe in (ours, stock)]
    assert_near(*images, 2e-3)


def test_a_compiled_denoiser_makes_the_images_of_an_eager_one(device):
    torch._dynamo.reset()
    pipe, arguments = by_label().to(device), PIPELINES["guided"][1]
    expected = images_of(pipe, seeded(device), **arguments)
    # For the CPU tracing alone: making machine code takes long and is no claim about devices.
    pipe.denoiser.compile(backend="inductor" if device == "cuda" else "eager")
    assert_near(images_of(pipe, seeded(device), **arguments), expected, 5e-3)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_features_of_images_are_those_of_the_cpu(shape, device):
    torch.manual_seed(0)
    here = FeatureClassifierModel.for_images(shape, ("zero", "one"))
    there = moved(here, device)
    images = torch.randint(0, 256, (10, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(there.measure(images, batch_size=4), here.measure(images), strict=True):
        assert ours.device.type == "cpu"
        assert_near(ours, theirs.double() if theirs.is_floating_point() else theirs, 1e-3)
