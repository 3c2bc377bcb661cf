"""What a call is given at its edges: generators, scales, and networks in other modules."""

import dataclasses
import inspect
import re

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.guiders import AutoGuidance
from torch.nn.parallel import DataParallel, DistributedDataParallel

from diffusers_ext import (
    ClassifierGuidance,
    DiTModel,
    ExtDDIMScheduler,
    ExtDDPMScheduler,
    FlowScheduler,
    GuidedDiffusionPipeline,
    NoisyClassifierModel,
    TextGuidedDiffusionPipeline,
    UNetModel,
    VAEModel,
    WeakModelGuidance,
)
from diffusers_ext.draws import as_generators, check_seed
from diffusers_ext.guidance.guiding import choose_guider
from diffusers_ext.machine import fast_precision, is_fast_at_bf16
from diffusers_ext.models.vae_likelihood import DiagonalGaussian
from diffusers_ext.pipelines.label_condition import LabelCondition
from diffusers_ext.pipelines.sampling import CallOptions
from tiny import tiny_unet
from tiny_text import tiny_clip, tiny_text_unet, tiny_tokenizer


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def pipeline(num_classes=None, scheduler=None):
    pipe = GuidedDiffusionPipeline(tiny_unet(num_classes), scheduler or ExtDDPMScheduler(timestep_spacing="trailing"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, **kwargs):
    return pipe(**{"num_inference_steps": 3, "output_type": "pt"} | kwargs).images


def step(scheduler, generator):
    scheduler.set_timesteps(4)
    zeros = torch.zeros(2, 1, 4, 4)
    options = {"eta": 1.0} if isinstance(scheduler, ExtDDIMScheduler) else {}
    return scheduler.step(zeros, scheduler.timesteps[0], zeros, generator=generator, **options).prev_sample


DRAWS = {
    "pipeline": lambda generator: sample(pipeline(), batch_size=2, generator=generator),
    "DDPM": lambda generator: step(ExtDDPMScheduler(timestep_spacing="trailing"), generator),
    "DDIM": lambda generator: step(ExtDDIMScheduler(timestep_spacing="trailing"), generator),
    "prior": lambda generator: VAEModel(8, 1, 1, (8, 16), 2).sample_prior(2, generator),
    "posterior": lambda generator: DiagonalGaussian(torch.zeros(2, 3), torch.zeros(2, 3)).sample(generator),
}


@pytest.mark.product
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize(
    "generator, error, message",
    [
        (0, TypeError, "got 0; for a seed give torch.Generator().manual_seed(0)"),
        (2**70, TypeError, f"for a seed give torch.Generator().manual_seed({2**70})"),
        (False, TypeError, "generator must be a torch.Generator or a list with one for each sample, got False"),
        ("cpu", TypeError, "got 'cpu'"),
        ([0, 1], TypeError, "generator must be a list of torch.Generator, got 0 in it"),
        ((torch.Generator(), None), TypeError, "got None in it"),
        (seeded(0), ValueError, "generator must be one or one for each of 2 samples, got 1"),
        (seeded(0, 1, 2), ValueError, "generator must be one or one for each of 2 samples, got 3"),
        ([], ValueError, "got 0"),
    ],
    ids=[
        "a seed",
        "a large seed",
        "a bool",
        "a name",
        "seeds",
        "none among them",
        "one too few",
        "one too many",
        "none",
    ],
)
def test_what_is_no_generator_for_each_sample_is_refused(draw, generator, error, message):
    with pytest.raises(error, match=re.escape(message)):
        draw(generator)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_tuple_of_generators_is_a_list(draw):
    listed, alone = draw(seeded(5, 6)), draw(tuple(seeded(5, 6)))
    assert torch.equal(listed, alone)


def test_the_scheduler_of_diffusers_gets_a_tuple_as_a_list_too():
    pipes = [pipeline(scheduler=DDIMScheduler(timestep_spacing="trailing")) for _ in range(2)]
    given = (seeded(5, 6), tuple(seeded(5, 6)))
    first, second = (
        sample(pipe, batch_size=2, eta=1.0, generator=generator) for pipe, generator in zip(pipes, given, strict=True)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("stock, scheduler", [(DDPMPipeline, ExtDDPMScheduler), (DDIMPipeline, DDIMScheduler)])
def test_one_generator_for_two_images_is_drawn_from_as_diffusers_does(stock, scheduler):
    one, other = seeded(3, 3)
    scheduler = scheduler(timestep_spacing="trailing")
    theirs = stock(tiny_unet(), scheduler)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(batch_size=2, generator=one, num_inference_steps=3, output_type="np").images
    got = sample(pipeline(scheduler=scheduler), batch_size=2, generator=other, output_type="np")
    # Kernels may round by the alignment of a network's weights.
    torch.testing.assert_close(torch.from_numpy(got), torch.from_numpy(expected), atol=1e-4, rtol=0)


def test_a_seed_is_of_32_bits_or_refused():
    check_seed(0), check_seed(2**32 - 1)
    for seed in (-1, 2**32, 2**63, 2**64):
        with pytest.raises(ValueError, match=rf"seed must be in \[0, 4294967295\], got {seed}"):
            check_seed(seed)
    assert as_generators(None, 3) is None


@pytest.mark.parametrize("scale", [-1.0, -0.5, float("nan"), float("inf"), -float("inf")])
def test_a_scale_below_none_is_refused_by_all_that_take_one(scale):
    message = f"guidance_scale must be finite and at least 0, got {scale}"
    with pytest.raises(ValueError, match=message):
        sample(pipeline(2), class_labels=1, guidance_scale=scale)
    with pytest.raises(ValueError, match=message):
        sample(pipeline(2), class_labels=1, classifier_scale=1.0, guidance_scale=scale)
    with pytest.raises(ValueError, match=message):
        WeakModelGuidance(scale)
    with pytest.raises(ValueError, match=message):
        ClassifierGuidance(1.0, guidance_scale=scale)
    tokenizer = tiny_tokenizer()
    texts = TextGuidedDiffusionPipeline(tiny_text_unet(), ExtDDIMScheduler(), tokenizer, tiny_clip(tokenizer))
    with pytest.raises(ValueError, match=message):
        texts("red dot", guidance_scale=scale)


def test_a_negative_weight_is_what_a_negative_scale_would_be():
    """At a weight of -1, `null - (label - null)`."""
    pipe = pipeline(2)
    label, null = (torch.tensor([n]) for n in (1, 2))
    x, t = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    with torch.no_grad():
        of_label, of_null = (pipe.denoiser(x, t, labels).sample for labels in (label, null))
    weights = LabelCondition(pipe, {1: -1.0})
    guider = choose_guider(None, weighted=weights.weighted)
    with torch.no_grad():
        got = pipe._denoiser(pipe.scheduler, guider, weights, 1, "cpu")(x, t)
    torch.testing.assert_close(got, 2 * of_null - of_label)


def with_a_vae():
    vae = VAEModel(16, 1, 1, (8, 16), 1)
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    return GuidedDiffusionPipeline(tiny_unet(2), ExtDDIMScheduler(timestep_spacing="trailing"), vae)


def with_a_transformer():
    denoiser = DiTModel(8, 2, 1, hidden_size=16, num_layers=1, num_attention_heads=2, num_classes=2)
    return GuidedDiffusionPipeline(denoiser, ExtDDIMScheduler(timestep_spacing="trailing"))


def with_a_classifier():
    pipe = pipeline(2)
    return GuidedDiffusionPipeline(pipe.denoiser, pipe.scheduler, classifier=NoisyClassifierModel(8, 1, 2, (8, 16), 1))


@pytest.mark.parametrize(
    "make, options, message",
    [
        (lambda: pipeline(2), {"guidance_scale": 2.0, "guidance_interval": (0.0, 0.1)}, "none of the 3 steps"),
        (with_a_vae, {}, "the range of images and not of latents"),
        (with_a_classifier, {"classifier_scale": 1.0}, "has no noise_schedule"),
        (
            with_a_transformer,
            {"guider": AutoGuidance(2.0, auto_guidance_layers=[0], dropout=0.5)},
            "with a dropout below 1",
        ),
    ],
)
def test_a_warning_of_a_call_points_at_the_call(make, options, message):
    pipe = make()
    with pytest.warns(UserWarning, match=message) as warned:
        pipe(class_labels=1, num_inference_steps=3, output_type="pt", **options)
    assert {each.filename for each in warned if re.search(message, str(each.message))} == {__file__}


def test_a_guider_that_cannot_act_is_refused_before_a_network_is_called():
    pipe, called = with_a_vae(), []
    for network in (pipe.denoiser, pipe.vae.encoder):
        network.register_forward_pre_hook(lambda *_: called.append(1))
    picture = torch.full((1, 1, 16, 16), 0.5)
    with pytest.raises(ValueError, match="needs class_labels to guide to"):
        sample(pipe, image=picture, guidance_scale=2.0)
    with pytest.raises(ValueError, match="mask_image must have the size of image, 16x16, got 8x8"):
        sample(pipe, class_labels=1, image=picture, mask_image=torch.ones(1, 1, 8, 8))
    assert not called
    sample(pipe, class_labels=1, image=picture)
    assert called


IMAGES_AND_REGIONS = {"condition_image", "condition_noise_level", "regions"}
LABELS = {"class_labels"} | IMAGES_AND_REGIONS
TEXTS = {"prompt", "num_images_per_prompt", "prompt_embeds", "prompt_attention_mask"}
TEXTS |= {"negative_prompt", "negative_prompt_embeds", "negative_prompt_attention_mask"} | IMAGES_AND_REGIONS


@pytest.mark.parametrize(
    "cls, own, without",
    [
        (GuidedDiffusionPipeline, LABELS, set()),
        (TextGuidedDiffusionPipeline, TEXTS, {"batch_size", "classifier_scale"}),
    ],
)
def test_every_argument_of_a_call_is_one_of_its_options_or_of_its_condition(cls, own, without):
    arguments = set(inspect.signature(cls.__call__).parameters) - {"self"}
    assert arguments - own == {field.name for field in dataclasses.fields(CallOptions)} - without


COMPONENTS = {
    "denoiser": lambda: UNetModel(8, 1, 1, (8, 16), 1),
    "weak_denoiser": lambda: DiTModel(8, 2, 1, hidden_size=16, num_layers=1, num_attention_heads=2),
    "vae": lambda: VAEModel(16, 3, 3, (8, 16), 1),
    "classifier": lambda: NoisyClassifierModel(8, 1, 3, (8, 16), 1),
}


@pytest.mark.product
@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize("wrap", [DataParallel, DistributedDataParallel])
def test_a_network_in_a_parallel_module_is_refused_with_what_to_give(name, wrap, tmp_path):
    started = False
    if wrap is DistributedDataParallel:
        store = f"file://{tmp_path}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        started = True
    try:
        wrapped = wrap(COMPONENTS[name]())
        with pytest.raises(
            ValueError, match=f"{name} must be the network itself, got it in a {wrap.__name__}: give its"
        ):
            GuidedDiffusionPipeline(
                **{"denoiser": COMPONENTS["denoiser"](), name: wrapped}, scheduler=ExtDDIMScheduler()
            )
    finally:
        if started:
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["denoiser", "weak_denoiser", "text_encoder"])
def test_and_so_in_a_pipeline_of_texts(name):
    tokenizer = tiny_tokenizer()
    parts = {"denoiser": tiny_text_unet(), "tokenizer": tokenizer, "text_encoder": tiny_clip(tokenizer)}
    parts |= {"weak_denoiser": tiny_text_unet()}
    parts[name] = DataParallel(parts[name])
    with pytest.raises(ValueError, match=f"{name} must be the network itself, got it in a DataParallel"):
        TextGuidedDiffusionPipeline(scheduler=ExtDDIMScheduler(), **parts)


def test_compiled_networks_are_networks(tmp_path):
    plain = pipeline(2)
    compiled = GuidedDiffusionPipeline(torch.compile(plain.denoiser, backend="eager"), plain.scheduler)
    compiled.set_progress_bar_config(disable=True)
    asked = {"class_labels": [1, 0], "guidance_scale": 2.0}
    images = [sample(pipe, generator=seeded(1, 2), **asked) for pipe in (plain, compiled)]
    torch.testing.assert_close(*images, atol=1e-4, rtol=0)
    compiled.save_pretrained(tmp_path)
    assert type(GuidedDiffusionPipeline.from_pretrained(tmp_path).denoiser) is UNetModel
    vae = torch.compile(VAEModel(32, 1, 1, (8, 16), 1), backend="eager")
    with pytest.raises(ValueError, match="vae must have latents of the denoiser's size, 8x8, got 16x16"):
        GuidedDiffusionPipeline(plain.denoiser, plain.scheduler, vae=vae)


@pytest.mark.parametrize("make", COMPONENTS.values(), ids=COMPONENTS)
def test_a_network_in_data_parallel_computes_what_it_does_alone(make):
    """On one device, where DataParallel calls the module."""
    torch.manual_seed(0)
    network = make().eval()
    inputs = (torch.randn(2, 3, 16, 16),) if isinstance(network, VAEModel) else (torch.randn(2, 1, 8, 8), 5)
    with torch.no_grad():
        alone, wrapped = (each(*inputs, return_dict=False)[0] for each in (network, DataParallel(network)))
    assert torch.equal(alone, wrapped)


def precisions_of(pipe):
    """The dtypes of the outputs of the denoiser in calls that follow."""
    seen = []
    pipe.denoiser.conv_out.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    return seen


def test_under_autocast_the_networks_run_in_half_precision_and_the_steps_do_not():
    pipe = pipeline(num_classes=3)
    options = {"class_labels": [0, 2], "guidance_scale": 2.0, "output_type": "latent"}
    exact = sample(pipe, generator=seeded(1, 2), **options)
    seen = precisions_of(pipe)
    assert pipe.enable_autocast(torch.bfloat16) == torch.bfloat16
    fast = sample(pipe, generator=seeded(1, 2), **options)
    assert set(seen) == {torch.bfloat16} and fast.dtype == torch.float32
    assert all(weight.dtype == torch.float32 for weight in pipe.denoiser.parameters())
    assert 0 < (fast - exact).abs().max() < 0.1  # of values up to 3; bf16 has 3 digits
    pipe.disable_autocast()
    seen.clear()
    torch.testing.assert_close(sample(pipe, generator=seeded(1, 2), **options), exact)
    assert set(seen) == {torch.float32}


def test_both_sides_of_an_interpolation_run_in_half_precision():
    pipe = pipeline(3, FlowScheduler())
    pipe.enable_autocast(torch.bfloat16)
    seen, ends = precisions_of(pipe), torch.rand(2, 1, 1, 8, 8).unbind()
    pipe.interpolate(*ends, 2, class_labels=1, num_inference_steps=2, output_type="pt")
    assert seen == [torch.bfloat16] * 6


def test_a_text_and_the_empty_text_are_encoded_in_one_precision():
    tokenizer = tiny_tokenizer()
    encoder, seen = tiny_clip(tokenizer), []
    pipe = TextGuidedDiffusionPipeline(tiny_text_unet(), ExtDDIMScheduler(), tokenizer, encoder)
    pipe.enable_autocast(torch.bfloat16)
    layer = next(module for module in encoder.modules() if isinstance(module, torch.nn.Linear))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    sample(pipe, prompt="red dot", guidance_scale=2.0)
    assert seen == [torch.bfloat16] * 2


def test_an_interpolation_takes_what_the_call_takes():
    """A network with a learned variance that the path does not use; and no output that the call refuses."""
    torch.manual_seed(0)
    unet = UNetModel(8, 1, 2, block_out_channels=(8, 16), layers_per_block=1)
    pipe, ends = GuidedDiffusionPipeline(unet, FlowScheduler()), torch.rand(2, 1, 1, 8, 8).unbind()
    assert pipe.interpolate(*ends, 3, num_inference_steps=2, output_type="np").shape == (3, 8, 8, 1)
    with pytest.raises(ValueError, match="output_type must be one of pil, np, pt, latent, got 'jpg'"):
        pipe.interpolate(*ends, 3, output_type="jpg")
    with pytest.raises(ValueError, match="num_images must be an integer of at least 2, the two ends, got 2.5"):
        pipe.interpolate(*ends, 2.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_noise_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="latents must be finite"):
        sample(pipeline(), latents=torch.full((1, 1, 8, 8), value))


def test_networks_of_another_kind_are_refused():
    conditional = UNet2DConditionModel(
        8, 1, 1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(32,)
    )
    with pytest.raises(ValueError, match="weak_denoiser .*UNet2DConditionModel"):
        GuidedDiffusionPipeline(tiny_unet(), ExtDDIMScheduler(), weak_denoiser=conditional)
    with pytest.raises(ValueError, match="weak_denoiser .*sample_size"):
        GuidedDiffusionPipeline(tiny_unet(), ExtDDIMScheduler(), weak_denoiser=UNet2DModel())
    with pytest.raises(ValueError, match="classifier must have logits of labels, .* got a UNetModel"):
        GuidedDiffusionPipeline(tiny_unet(3), ExtDDIMScheduler(), classifier=tiny_unet(3))


@pytest.mark.parametrize(
    "id2label, message",
    [
        ({1: "a", 2: "b", 3: "c"}, "id2label must name labels from 0 to 2, got names of '3'"),
        ({i: str(i) for i in range(9)}, "got names of '3', '4', '5', '6', '7', ..."),
        ({"zero": "a"}, "got names of 'zero'"),
    ],
)
def test_names_of_what_is_no_label_are_refused(id2label, message):
    with pytest.raises(ValueError, match=message):
        GuidedDiffusionPipeline(tiny_unet(3), ExtDDIMScheduler(), id2label=id2label)


def test_a_name_of_two_labels_does_not_say_which():
    pipe = GuidedDiffusionPipeline(tiny_unet(3), ExtDDIMScheduler(), id2label={0: "crane", 1: "duck", 2: "crane"})
    assert pipe.get_label_ids("duck") == [1]
    with pytest.raises(ValueError, match="'crane' is the name of the labels 0, 2: give the number of one of them"):
        pipe.get_label_ids(["duck", "crane"])


def test_a_set_is_of_all_images_and_a_label_may_be_a_tensor():
    pipe = pipeline(3)
    assert pipe.label_tensor({0, 2}).tolist() == [[True, False, True]]
    assert pipe.label_tensor(frozenset([1])).tolist() == [[False, True, False]]
    assert pipe.label_tensor([torch.tensor(2), np.int64(1)]).tolist() == [2, 1]


def test_images_may_be_one_for_each_prompt():
    """As often as each prompt has images; so with masks."""
    tokenizer = tiny_tokenizer()
    pipe = TextGuidedDiffusionPipeline(
        tiny_text_unet(), ExtDDIMScheduler(clip_sample=False), tokenizer, tiny_clip(tokenizer)
    )
    prompts, images = ["red dot", "blue bar"], torch.rand(2, 3, 8, 8)
    masks = torch.stack([torch.zeros(8, 8), torch.cat([torch.ones(4, 8), torch.zeros(4, 8)])])[:, None]
    options = {"strength": 0.5, "mask_image": masks, "guidance_scale": 1.0, "num_images_per_prompt": 2}
    got = sample(pipe, prompt=prompts, image=images, generator=seeded(1, 2, 3, 4), **options)
    options |= {"mask_image": masks.repeat_interleave(2, 0)}
    every = sample(pipe, prompt=prompts, image=images.repeat_interleave(2, 0), generator=seeded(1, 2, 3, 4), **options)
    assert torch.equal(got, every)
    torch.testing.assert_close(got[:2], images[:1].expand(2, -1, -1, -1))  # nothing of it is made anew
    with pytest.raises(ValueError, match="num_images_per_prompt must be an integer of at least 1, got 2.0"):
        sample(pipe, prompt=prompts, num_images_per_prompt=2.0)


def test_the_precision_by_default_is_what_the_machine_is_fast_at():
    assert pipeline().enable_autocast() == fast_precision("cpu")
    assert fast_precision("cpu") == (torch.bfloat16 if is_fast_at_bf16("cpu") else torch.float32)
    with pytest.raises(
        ValueError, match="dtype must be torch.bfloat16, torch.float16 or torch.float32, got torch.int8"
    ):
        pipeline().enable_autocast(torch.int8)


def test_a_text_pipeline_refuses_another_word_for_the_clipped_noise_too():
    tokenizer = tiny_tokenizer()
    parts = (tiny_text_unet(), ExtDDIMScheduler(), tokenizer, tiny_clip(tokenizer))
    with pytest.raises(ValueError, match="clip_guided_noise must be False, True or \"always\", got 'never'"):
        TextGuidedDiffusionPipeline(*parts, clip_guided_noise="never")
