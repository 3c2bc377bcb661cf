"""Modular pipelines are the pipelines that they are saved beside: the same image to the bit, whole or block by block."""

import json
from contextlib import redirect_stdout
from io import StringIO

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance, ModularPipeline, ModularPipelineBlocks, PNDMScheduler
from diffusers.commands import diffusers_cli
from diffusers.modular_pipelines import ModularPipelineBlocks as Blocks

from diffusers_ext import (
    ExtDDIMScheduler,
    ExtDDPMScheduler,
    GuidedDiffusionBlocks,
    GuidedDiffusionPipeline,
    TextGuidedDiffusionBlocks,
    TextGuidedDiffusionPipeline,
    UNetModel,
    VAEModel,
)
from diffusers_ext.pipelines import modular_blocks
from tiny import tiny_unet
from tiny_text import tiny_clip, tiny_text_unet, tiny_tokenizer


PICTURE = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8)


def labelled():
    return GuidedDiffusionPipeline(
        tiny_unet(num_classes=3),
        ExtDDIMScheduler(timestep_spacing="trailing"),
        id2label={0: "zero", 1: "one", 2: "two"},
        clip_guided_noise=True,
        call_defaults={"num_inference_steps": 5, "guidance_scale": 2.5},
    )


def latent():
    torch.manual_seed(0)
    unet = UNetModel(sample_size=4, in_channels=2, out_channels=2, block_out_channels=(8, 16), layers_per_block=1)
    vae = VAEModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), latent_channels=2, scaling_factor=1.7
    )
    for parameter in [*unet.parameters(), *vae.parameters()]:
        torch.nn.init.normal_(parameter, std=0.1)
    return GuidedDiffusionPipeline(unet, ExtDDPMScheduler(clip_sample=False, timestep_spacing="trailing"), vae)


def text():
    tokenizer = tiny_tokenizer()
    return TextGuidedDiffusionPipeline(
        tiny_text_unet(), ExtDDIMScheduler(timestep_spacing="trailing"), tokenizer, tiny_clip(tokenizer)
    )


PIPELINES = {"labelled": labelled, "latent": latent, "text": text}


@pytest.fixture(scope="module", params=PIPELINES)
def saved(request, tmp_path_factory):
    """A pipeline as it loads from its folder, and the modular one of the same folder."""
    folder = tmp_path_factory.mktemp(request.param)
    PIPELINES[request.param]().save_pretrained(folder)
    modular = ModularPipeline.from_pretrained(str(folder))
    modular.load_components()
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    # The same tensors at the same addresses, so that the CPU takes the same kernels for them.
    for name in ("denoiser", "vae", "text_encoder"):
        if getattr(modular, name, None) is not None:
            setattr(pipe, name, getattr(modular, name))
    pipe.set_progress_bar_config(disable=True)
    modular.set_progress_bar_config(disable=True)
    return request.param, folder, pipe, modular


def call(pipe, **arguments):
    arguments = {
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 3,
        "output_type": "np",
    } | arguments
    return pipe(output="images", **arguments) if isinstance(pipe, ModularPipeline) else pipe(**arguments).images


CALLS = {
    "labelled": [
        {"class_labels": ["two", "one"], "num_inference_steps": None},  # by the saved defaults
        {"class_labels": 1, "batch_size": 2, "guidance_scale": 3.0, "guidance_interval": (0.0, 0.5), "eta": 1.0},
        {"class_labels": [{"one": 1.0, "two": 0.5}]},
        {"image": PICTURE, "strength": 0.7, "batch_size": 2},
        {"image": PICTURE, "mask_image": PICTURE > 0.5, "num_resample_steps": 2, "class_labels": 0},
        {"timesteps": [900, 300, 10], "low_memory": True, "output_type": "pt", "guidance_scale": 1.0},
    ],
    "latent": [
        {"batch_size": 2},
        {"image": PICTURE, "strength": 0.5},
        {"image": PICTURE, "mask_image": PICTURE > 0.5, "output_type": "pt"},
    ],
    "text": [
        {"prompt": ["red dot", "blue bar"]},  # guided by 4, as such a pipeline is by default
        {"prompt": "red dot", "negative_prompt": "green", "num_images_per_prompt": 2, "guidance_scale": 2.0},
        {"prompt": "red dot", "guidance_scale": 1.0},
    ],
}


def test_image_is_the_pipelines_to_the_bit(saved):
    name, _, pipe, modular = saved
    for arguments in CALLS[name]:
        got, expected = call(modular, **arguments), call(pipe, **arguments)
        assert np.array_equal(np.asarray(got), np.asarray(expected)), arguments


def test_each_block_runs_alone(saved):
    """Each in a pipeline of its own that loads only what it needs, from the state that those before it have left."""
    name, folder, pipe, modular = saved
    arguments = {"batch_size": 2} if name != "text" else {"prompt": "red dot", "num_images_per_prompt": 2}
    arguments |= {"num_inference_steps": 3, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    state, loaded = None, {}
    for block_name, block in modular.blocks.sub_blocks.items():
        single = block.init_pipeline(str(folder))
        single.load_components()
        loaded[block_name] = {key for key, value in single.components.items() if value is not None}
        for component in ("denoiser", "vae", "text_encoder"):  # of the same addresses
            if component in loaded[block_name]:
                single.update_components(**{component: getattr(pipe, component)})
        wanted = set(single.blocks.input_names)
        state = single(state=state, **{key: value for key, value in arguments.items() if key in wanted})
    del arguments["generator"]
    assert np.array_equal(state.get("images"), call(pipe, **arguments))
    assert loaded["decode"] == ({"vae"} if name == "latent" else set())
    assert loaded["encode"] == ({"tokenizer", "text_encoder"} if name == "text" else {"denoiser"})
    assert loaded["denoise"] == {"denoiser"} and loaded["set_timesteps"] == {"denoiser", "scheduler"}


def test_components_are_those_of_the_folder_wherever_it_lies(saved, tmp_path):
    name, folder, _, _ = saved
    moved = folder.rename(tmp_path / "moved")
    try:
        modular = ModularPipeline.from_pretrained(str(moved))
        modular.load_components()
        index = json.loads((moved / "model_index.json").read_text())
        for key, entry in index.items():
            if isinstance(entry, list) and not key.startswith("_") and entry[0]:
                assert type(getattr(modular, key)).__name__ == entry[1]
        assert type(modular.blocks).__module__ == "diffusers_ext.pipelines.modular_blocks"
        again = tmp_path / "again"
        modular.save_pretrained(str(again), overwrite_modular_index=True)
        loaded = ModularPipeline.from_pretrained(str(again))
        loaded.load_components()
        assert type(loaded.denoiser) is type(modular.denoiser)
        assert type(loaded.blocks) is type(modular.blocks)
    finally:
        moved.rename(folder)


def test_a_guider_of_the_folder_guides():
    pipe = labelled()
    modular = GuidedDiffusionBlocks().init_pipeline()
    modular.update_components(
        denoiser=pipe.denoiser, scheduler=pipe.scheduler, guider=ClassifierFreeGuidance(guidance_scale=3.0)
    )
    modular.update_components(clip_guided_noise=True)
    arguments = {"class_labels": 1, "trajectory_steps": [1]}
    got = call(modular, **arguments)
    assert np.array_equal(got, call(pipe, **arguments, guidance_scale=3.0))
    modular.update_components(clip_guided_noise="never")
    with pytest.raises(ValueError, match="clip_guided_noise must be False, True or \"always\", got 'never'"):
        call(modular, **arguments)


def test_a_sampler_of_diffusers_starts_from_an_image():
    """PNDM from an image is another object than the pipeline's scheduler, and lies in the state."""
    pipe = GuidedDiffusionPipeline(tiny_unet(), PNDMScheduler())
    modular = GuidedDiffusionBlocks().init_pipeline()
    modular.update_components(denoiser=pipe.denoiser, scheduler=pipe.scheduler)
    arguments = {"image": PICTURE, "strength": 0.6, "num_inference_steps": 5}
    assert np.array_equal(call(modular, **arguments), call(pipe, **arguments))


def test_a_block_of_ones_own_acts_in_the_loop():
    class Half(Blocks):
        def __call__(self, components, values, i, t):
            values.latents = values.latents * 0.5
            return components, values

    pipe, blocks = GuidedDiffusionPipeline(tiny_unet(3), ExtDDIMScheduler()), GuidedDiffusionBlocks()
    blocks.sub_blocks["denoise"].sub_blocks.insert("half", Half(), 2)
    modular = blocks.init_pipeline()
    modular.update_components(denoiser=pipe.denoiser, scheduler=pipe.scheduler)
    expected = call(
        pipe, callback_on_step_end=lambda pipe, i, t, tensors: {"latents": tensors["latents"] * 0.5}, class_labels=1
    )
    assert np.array_equal(call(modular, class_labels=1), expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"class_labels": "three"}, "no label named 'three'"),
        ({"strength": 0.5}, "strength must be given together with an image"),
        ({"mask_image": PICTURE}, "mask_image must be given together with an image"),
        ({"output_type": "gif"}, "output_type must be one of"),
        ({"guidance_scale": 2.0}, "guidance needs class_labels"),
        ({"num_resample_steps": 2}, "num_resample_steps must be 1 without a mask_image"),
        ({"generator": 3}, "generator must be a torch.Generator"),
        ({"class_labels": [0, 1], "batch_size": 3}, "number of images must be the same"),
        ({"image": PICTURE, "strength": 0.5, "latents": PICTURE}, "they are noise"),
        ({"trajectory_steps": [7]}, r"trajectory_steps must be in \[0, 2\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_as_by_the_pipeline(arguments, message):
    pipe = labelled()
    modular = GuidedDiffusionBlocks().init_pipeline()
    modular.update_components(denoiser=pipe.denoiser, scheduler=pipe.scheduler, id2label=pipe.config.id2label)
    for each in (pipe, modular):
        with pytest.raises((ValueError, TypeError), match=message):
            call(each, **arguments)


def test_what_is_not_loaded_is_asked_for(saved):
    name, folder, pipe, _ = saved
    empty = ModularPipeline.from_pretrained(str(folder))
    arguments = {"prompt": "red dot", "prompt_embeds": None} if name == "text" else {}
    with pytest.raises(ValueError, match="pipe.load_components|needs a pipeline with a tokenizer"):
        call(empty, **arguments)
    if name == "latent":
        empty.update_components(denoiser=pipe.denoiser, scheduler=pipe.scheduler)
        with pytest.raises(ValueError, match="vae must be there before the blocks are called"):
            call(empty)


def test_inputs_are_those_of_the_pipelines_call():
    """With their defaults and descriptions, but for a guider, which is a component, and what only a call returns."""
    for blocks, pipeline in (
        (GuidedDiffusionBlocks(), GuidedDiffusionPipeline),
        (TextGuidedDiffusionBlocks(), TextGuidedDiffusionPipeline),
    ):
        arguments = modular_blocks.CallInputs(pipeline.__call__, GuidedDiffusionPipeline.__call__)
        inputs = {each.name: each for each in blocks.inputs}
        expected = dict(modular_blocks.CallInputs(pipeline.__call__).parameters)
        for name in ("self", "guider", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs"):
            del expected[name]
        assert expected.keys() <= inputs.keys()
        for name in expected:
            assert arguments.descriptions[name] and inputs[name].description, name
        assert inputs["eta"].default == 0.0 and "Share of the noise that DDIM puts back" in inputs["eta"].description
        assert [each.name for each in blocks.outputs] == ["images", "trajectory"]
        assert "class_labels" in blocks.doc or "prompt" in blocks.doc


def test_schema_lists_the_arguments(saved, monkeypatch):
    name, folder, _, _ = saved
    monkeypatch.setattr("sys.argv", ["diffusers-cli", "--format", "json", "schema", "--model", str(folder)])
    with redirect_stdout(StringIO()) as text:
        diffusers_cli.main()
    schema = json.loads(text.getvalue())
    assert schema["pipeline_class"] == ("Text" if name == "text" else "") + "GuidedDiffusionPipeline"
    assert ("prompt" if name == "text" else "class_labels") in {each["name"] for each in schema["inputs"]}


def test_blocks_are_taken_from_the_package_without_consent(saved):
    name, folder, _, _ = saved
    expected = TextGuidedDiffusionBlocks if name == "text" else GuidedDiffusionBlocks
    for consent in ({}, {"trust_remote_code": True}):
        assert type(ModularPipelineBlocks.from_pretrained(str(folder), **consent)) is expected


def test_blocks_of_others_are_theirs(tmp_path):
    """A class of theirs of the same name is run with consent alone."""
    (tmp_path / "pipeline.py").write_text("raise RuntimeError('theirs')\n")
    theirs = {"auto_map": {"ModularPipelineBlocks": "pipeline.GuidedDiffusionBlocks"}}
    for config in (
        theirs | {"_class_name": "GuidedDiffusionBlocks"},
        theirs | {"_class_name": "OfALaterVersion", "_library": "diffusers_ext"},
        theirs | {"_class_name": "GuidedDiffusionPipeline", "_library": "diffusers_ext"},
    ):
        (tmp_path / "modular_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            ModularPipelineBlocks.from_pretrained(str(tmp_path))
