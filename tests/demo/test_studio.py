"""What the demo makes, without a page: this needs no gradio."""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import diffusers_ext
from diffusers_ext import ExtDDIMScheduler, GaussianPriorModel, GuidedDiffusionPipeline, TextGuidedDiffusionPipeline
from diffusers_ext.calibration.guidance import Guidance
from diffusers_ext.demo.settings import AS_SAVED, Settings
from diffusers_ext.demo.studio import Studio, evenly, painted
from tiny import tiny_unet
from tiny_text import tiny_clip, tiny_text_unet, tiny_tokenizer


FEW = {"labels": ["3", "7"], "num_images": 2, "num_steps": 3}


@pytest.fixture(scope="module")
def studio():
    return Studio(diffusers_ext.example("digits"))


def values(picture):
    return np.asarray(picture, dtype=float)


def test_the_images_are_those_of_the_pipeline(studio):
    made = studio.generate(Settings(**FEW, guidance_scale=2.0, guidance_start=0.2, guidance_stop=0.9, seed=5))
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    expected = diffusers_ext.example("digits")(
        ["3", "7"], num_inference_steps=3, guidance_scale=2.0, guidance_interval=(0.2, 0.9), generator=generators
    ).images
    for picture, image in zip(made.images, expected, strict=True):
        assert picture.size == (128, 128)
        # Each pixel is a square of 16; rounding may go either way.
        assert np.abs(values(picture)[::16, ::16] - values(image)).max() <= 1


def test_the_steps_show_x_t_above_the_predicted_x_0(studio):
    made = studio.generate(Settings(**FEW))
    assert len(made.steps) == 3 and made.steps[0].head == "t = 999"
    last = values(made.steps[-1].picture.convert("L"))
    left = last.shape[1] - 2 * 66
    below = last[-66:][1:65, left : left + 64]
    # After the last step nothing is left to do but to take the predicted x_0.
    assert np.abs(below[4::8, 4::8] - values(made.images[0])[::16, ::16]).max() <= 1
    noise = values(made.steps[0].picture.convert("L"))[3:65, left : left + 64]
    assert noise.std() > 60


def test_a_pipeline_that_starts_lower_is_offered_with_samplers_that_can_and_with_no_other():
    prior = GaussianPriorModel(8, 1, rank=2)
    defaults = {"num_inference_steps": 3, "start_timestep": 600}
    pipe = GuidedDiffusionPipeline(tiny_unet(), ExtDDIMScheduler(), prior=prior, call_defaults=defaults)
    studio = Studio(pipe)
    assert not {"UniPCMultistepScheduler", "EulerAncestralDiscreteScheduler"} & {*studio.schedulers}
    assert {"ExtDDIMScheduler", "DPMSolverMultistepScheduler"} <= {*studio.schedulers}
    for name in studio.schedulers:
        made = studio.generate(Settings(num_images=1, num_steps=3, scheduler=name))
        assert made.steps[0].head == "t = 600"
    picture = Image.new("L", (8, 8), 128)
    assert studio.from_image(Settings(num_images=1, num_steps=4), picture, 1.0).steps[0].head != "t = 600"
    pipe.register_modules(scheduler=diffusers.UniPCMultistepScheduler())
    with pytest.raises(
        ValueError, match="take timesteps where calls start at start_timestep 600, got UniPC.*: take Ext"
    ):
        pipe()


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "ExtDDPMScheduler"])
def test_each_scheduler_makes_its_own_images_and_leaves_the_saved_one(studio, name):
    before = studio.generate(Settings(**FEW))
    other = studio.generate(Settings(**FEW, scheduler=name))
    assert len(other.steps) >= 3 and not np.array_equal(values(other.images[0]), values(before.images[0]))
    assert np.array_equal(values(studio.generate(Settings(**FEW)).images[0]), values(before.images[0]))


def test_schedulers_that_cannot_sample_the_model_are_not_offered():
    linear = ExtDDIMScheduler(prediction_type="epsilon", clip_sample=False)
    offered = Studio(GuidedDiffusionPipeline(tiny_unet(), linear)).schedulers
    assert offered[0] == AS_SAVED and "ExtDDPMScheduler" in offered and "FlowScheduler" not in offered


def test_strength_goes_from_the_picture_to_images_that_do_not_look_at_it(studio):
    picture = Image.fromarray(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)).resize((40, 24), 0)
    settings = Settings(**FEW)
    kept = studio.from_image(settings, picture, 0.0)
    assert kept.steps == [] and np.array_equal(values(kept.images[0]), values(kept.images[1]))
    assert len(studio.from_image(settings, picture, 0.7).steps) == 2
    alone = studio.from_image(settings, picture, 1.0)
    assert np.array_equal(values(alone.images[0]), values(studio.generate(settings).images[0]))


def test_inpainting_keeps_what_was_not_painted_over(studio):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8))
    layer = Image.new("RGBA", (8, 8))
    layer.paste((255, 0, 0, 255), (0, 0, 4, 8))
    made = studio.inpaint(Settings(**FEW), picture, [None, layer])
    for image in made.images:
        small = values(image)[::16, ::16]
        assert np.abs(small[:, 4:] - values(picture)[:, 4:]).max() <= 1
        assert np.abs(small[:, :4] - values(picture)[:, :4]).max() > 50


def test_an_interpolation_begins_and_ends_with_the_images_of_its_seeds(studio):
    one = {"labels": ["3"], "num_images": 1, "num_steps": 3}
    way = studio.interpolate(Settings(**one, seed=1), 9, 4)
    for picture, seed in ((way[0], 1), (way[3], 9)):
        # The batch is of another size, so kernels may round otherwise.
        assert np.abs(values(picture) - values(studio.generate(Settings(**one, seed=seed)).images[0])).max() <= 2
    assert len(way) == 4


def test_a_text_makes_the_images_of_its_pipeline():
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    pipe = TextGuidedDiffusionPipeline(tiny_text_unet(), ExtDDIMScheduler(), tokenizer, tiny_clip(tokenizer))
    studio = Studio(pipe)
    assert studio.takes_prompts and studio.labels is None and studio.default_guidance == (4.0, 0.0, 1.0)
    made = studio.generate(Settings(prompt="red dot", num_images=1, num_steps=2, guidance_scale=2.0))
    expected = pipe("red dot", num_inference_steps=2, guidance_scale=2.0, generator=torch.Generator().manual_seed(0))
    side = expected.images[0].size[0]
    zoom = made.images[0].size[0] // side
    assert np.abs(values(made.images[0])[::zoom, ::zoom] - values(expected.images[0])).max() <= 1


@pytest.mark.parametrize("start, stop", [(0.0, 0.8), (0.25, 0.5), (0.2, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("num_steps", [4, 10, 49])
def test_the_fields_begin_with_what_a_plain_call_does(start, stop, num_steps):
    scheduler = ExtDDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    defaults = Guidance(3.0, start, stop).call(scheduler.timesteps.tolist()) | {"num_inference_steps": num_steps}
    pipe = GuidedDiffusionPipeline(tiny_unet(num_classes=2), scheduler, call_defaults=defaults)
    studio = Studio(pipe)
    scale, first, last = studio.default_guidance
    shown = Settings(["1"], num_images=1, num_steps=studio.default_steps, guidance_scale=scale)
    shown = dataclasses.replace(shown, guidance_start=first, guidance_stop=last)
    plain = pipe(1, generator=[torch.Generator().manual_seed(0)], output_type="pt").images
    asked = {"num_inference_steps": num_steps, **shown.guidance}
    assert torch.equal(pipe(1, generator=[torch.Generator().manual_seed(0)], output_type="pt", **asked).images, plain)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"num_steps": 0}, "The number of steps must be a whole number from 1 to 1000, got 0."),
        ({"num_steps": 2.5}, "The number of steps must be a whole number from 1 to 1000, got 2.5."),
        ({"num_images": None}, "The number of images must be a whole number from 1 to 16, got nothing."),
        ({"seed": -1}, "The seed must be a whole number from 0 to 4294967295, got -1."),
        ({"seed": float("nan")}, "The seed must be a whole number from 0 to 4294967295, got nan."),
        ({"seed": "abc"}, "The seed must be a whole number from 0 to 4294967295, got 'abc'."),
        ({"guidance_scale": float("inf")}, "The guidance scale must be a number from 0 to 100, got inf."),
        (
            {"guidance_start": 0.8, "guidance_stop": 0.3},
            "The guidance must end after its start, got 0.8 to 0.3 of the steps.",
        ),
    ],
)
def test_settings_say_what_is_wrong_with_them_in_a_sentence(wrong, sentence):
    with pytest.raises(ValueError) as error:
        Settings(**wrong)
    assert str(error.value) == sentence


def test_what_is_asked_is_checked_against_the_model(studio):
    with pytest.raises(ValueError, match="The label 'cat' is none of the model's: 0, 1, 2"):
        studio.generate(Settings(labels=["cat"]))
    with pytest.raises(ValueError, match="The scheduler must be one of as saved, .*, got 'Mine'"):
        studio.generate(Settings(scheduler="Mine"))
    with pytest.raises(ValueError, match="Give a picture to begin with"):
        studio.from_image(Settings(), None, 0.5)
    with pytest.raises(ValueError, match=r"The strength must be a number from 0 to 1, got 2\."):
        studio.from_image(Settings(), Image.new("L", (8, 8)), 2.0)
    with pytest.raises(ValueError, match="Paint over the part that is to be made anew"):
        studio.inpaint(Settings(), Image.new("L", (8, 8)), [Image.new("RGBA", (8, 8))])
    with pytest.raises(ValueError, match="The number of images must be a whole number from 2 to 32, got 1"):
        studio.interpolate(Settings(), 3, 1)
    with pytest.raises(ValueError, match="the demo takes pipelines of diffusers_ext, got str"):
        Studio("runs/digits")


def test_layers_are_painted_where_one_of_them_is_not_transparent():
    first, second = Image.new("RGBA", (4, 4)), Image.new("RGBA", (8, 8))
    first.putpixel((0, 0), (0, 0, 0, 1))
    second.paste((9, 9, 9, 255), (6, 6, 8, 8))
    assert np.argwhere(np.asarray(painted([first, None, second], (4, 4)))).tolist() == [[0, 0], [3, 3]]


def test_steps_to_look_at_are_evenly_spaced():
    assert evenly(3, 5) == [0, 1, 2] and evenly(0, 5) == []
    chosen = evenly(1000, 50)
    assert len(chosen) == 50 and chosen[0] == 0 and chosen[-1] == 999 and set(np.diff(chosen)) <= {20, 21}
