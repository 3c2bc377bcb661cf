"""What a call does where it does not say it, as the pipeline was saved."""

import pytest
import torch
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.guiders import ClassifierFreeGuidance

from diffusers_ext import ExtDDIMScheduler, GuidedDiffusionPipeline, TextGuidedDiffusionPipeline
from diffusers_ext.evaluation.pipeline_facts import default_of
from diffusers_ext.evaluation.subject import default_scale
from tiny import assert_same_output, tiny_unet
from tiny_text import tiny_clip, tiny_text_unet, tiny_tokenizer


DEFAULTS = {"num_inference_steps": 4, "guidance_scale": 3.0, "guidance_interval": {"sigma": [0.1, 2.0]}}


def make(**config):
    pipe = GuidedDiffusionPipeline(tiny_unet(num_classes=3), ExtDDIMScheduler(timestep_spacing="trailing"), **config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, **call):
    generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return pipe(generator=generator, output_type="pt", **call).images


@pytest.fixture(scope="module")
def plain():
    return make()


@pytest.fixture(scope="module")
def chosen():
    return make(call_defaults=DEFAULTS)


def test_a_call_that_says_nothing_has_the_defaults(plain, chosen, tmp_path):
    expected = images(plain, class_labels=[0, 2], **DEFAULTS)
    assert torch.equal(images(chosen, class_labels=[0, 2]), expected)
    assert not torch.equal(expected, images(plain, class_labels=[0, 2], num_inference_steps=4, guidance_scale=3.0))
    chosen.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.config.call_defaults == DEFAULTS
    assert_same_output(images(loaded, class_labels=[0, 2]), expected)


@pytest.mark.parametrize(
    "said",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 2.0},
        {"guidance_scale": 2.0, "guidance_rescale": 0.5},
        {"guider": ClassifierFreeGuidance(2.0)},
    ],
)
def test_a_call_that_says_how_to_guide_has_none_of_the_defaults_of_guidance(plain, chosen, said):
    got = images(chosen, class_labels=[0, 2], **said)
    assert torch.equal(got, images(plain, class_labels=[0, 2], num_inference_steps=4, **said))


@pytest.mark.parametrize("said", [{"guidance_rescale": 0.5}, {"guidance_interval": (0.0, 1.0)}])
def test_a_call_that_says_where_or_how_much_of_it_has_the_default_scale(plain, chosen, said):
    got = images(chosen, class_labels=[0, 2], **said)
    assert torch.equal(got, images(plain, class_labels=[0, 2], **(DEFAULTS | said)))
    with pytest.raises(ValueError, match=f"{next(iter(said))} would do nothing, since nothing guides this call"):
        images(plain, class_labels=[0, 2], **said)
    images(plain, class_labels=[0, 2], guidance_scale=1.0, **said)  # one of a row of scales


def test_numbers_of_steps_are_the_calls_own(plain, chosen):
    more = {name: DEFAULTS[name] for name in ("guidance_scale", "guidance_interval")}
    got = images(chosen, class_labels=[0, 2], num_inference_steps=2)
    assert torch.equal(got, images(plain, class_labels=[0, 2], num_inference_steps=2, **more))
    assert len(chosen(class_labels=1, timesteps=[900, 100], trajectory_steps=[0, 1]).trajectory) == 2


def test_without_labels_or_with_weights_of_them_nothing_is_guided_by_default(plain, chosen):
    for condition in ({"batch_size": 2}, {"class_labels": [{0: 1.0, 1: 2.0}, {2: 1.5}]}):
        got, expected = images(chosen, **condition), images(plain, num_inference_steps=4, **condition)
        assert torch.equal(got, expected)


def test_a_guider_of_the_pipeline_goes_before_the_defaults(plain):
    guider = ClassifierFreeGuidance(2.0)
    pipe = make(call_defaults=DEFAULTS, guider=guider)
    expected = images(plain, class_labels=[0, 2], num_inference_steps=4, guider=guider)
    assert torch.equal(images(pipe, class_labels=[0, 2]), expected)


def test_scripts_know_the_defaults(plain, chosen):
    assert default_of(chosen, "num_inference_steps") == 4 and default_of(chosen, "guidance_scale") == 3.0
    assert default_of(plain, "num_inference_steps") == 50 and default_of(plain, "guidance_scale") is None


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        (
            {"steps": 5},
            "call_defaults must be among num_inference_steps, guidance_scale, guidance_interval, start_timestep, got 'steps'",
        ),
        ({"num_inference_steps": 0}, "num_inference_steps of call_defaults must be an integer of at least 1, got 0"),
        ({"start_timestep": -1}, "start_timestep of call_defaults must be an integer of at least 0, got -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be .*, got nan"),
        (
            {"guidance_scale": 2.0, "guidance_interval": (0.2, 0.8)},
            "guidance_interval of call_defaults must be a dict",
        ),
        ({"guidance_interval": {"sigma": (0.2, 0.8)}}, "must be a dict of its unit, .* beside a guidance_scale"),
    ],
)
def test_what_are_no_defaults_is_refused(defaults, message):
    with pytest.raises(ValueError, match=message):
        make(call_defaults=defaults)


def test_texts_are_guided_by_four_where_neither_call_nor_pipeline_says_more(tmp_path):
    tokenizer = tiny_tokenizer()
    parts = {"tokenizer": tokenizer, "text_encoder": tiny_clip(tokenizer)}

    def make_texts(**config):
        scheduler = ExtDDIMScheduler(timestep_spacing="trailing", clip_sample=False)
        pipe = TextGuidedDiffusionPipeline(tiny_text_unet(), scheduler, **parts, **config)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    plain, chosen, prompts = make_texts(), make_texts(call_defaults=DEFAULTS), ["red dot", "blue bar"]
    expected = images(plain, prompt=prompts, **DEFAULTS)
    assert torch.equal(images(chosen, prompt=prompts), expected)
    usual = images(plain, prompt=prompts, num_inference_steps=4, guidance_scale=4.0)
    assert torch.equal(images(plain, prompt=prompts, num_inference_steps=4), usual)
    assert not torch.equal(usual, expected)
    got, by_plain = (
        images(pipe, prompt=prompts, num_inference_steps=4, guidance_scale=1.0) for pipe in (chosen, plain)
    )
    assert torch.equal(got, by_plain)
    early = {"guidance_interval": (0.0, 0.5)}
    assert torch.equal(images(chosen, prompt=prompts, **early), images(plain, prompt=prompts, **(DEFAULTS | early)))
    usual = images(plain, prompt=prompts, guidance_scale=4.0, **early)
    assert torch.equal(images(plain, prompt=prompts, **early), usual)
    chosen.save_pretrained(tmp_path)
    assert_same_output(images(DiffusionPipeline.from_pretrained(tmp_path), prompt=prompts), expected)
    blocks = ModularPipeline.from_pretrained(tmp_path)
    blocks.load_components()
    blocks.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
    got = blocks(prompt=prompts, generator=generator, output_type="pt", output="images")
    assert_same_output(got, expected)
    assert default_of(chosen, "num_inference_steps") == 4 and default_of(plain, "num_inference_steps") == 50
    assert (default_scale(chosen), default_scale(plain)) == (3.0, 4.0)
