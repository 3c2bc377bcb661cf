"""Runs of the script on made-up pictures, whose captions say what they show."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.guiders import ClassifierFreeGuidance
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer

from diffusers_ext import ExtDDIMScheduler, TextGuidedDiffusionPipeline, VAEModel
from diffusers_ext.commands.train_text_to_image import main
from diffusers_ext.figures import labelled_grid
from diffusers_ext.options import parse_config
from diffusers_ext.recipes.text_encoder import train_tokenizer
from diffusers_ext.recipes.text_to_image import TextConfig, Texts
from diffusers_ext.trainer.run_folder import read_metrics
from processes import in_ranks
from runs import assert_same_run, forget_accelerate
from tiny_text import (
    CAPTIONS,
    COLOURS,
    SHAPES,
    WIDTH,
    picture,
    save_pictures,
    tiny_clip,
    tiny_t5,
    tiny_text_unet,
    tiny_tokenizer,
)
from training.cache_latents import CacheConfig
from training.cache_latents import main as cache
from training.reconstruct_ema import ReconstructConfig
from training.reconstruct_ema import main as reconstruct
from training.sample_prompts import SampleConfig
from training.sample_prompts import main as draw


SMALL = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "text_hidden_size": WIDTH,
    "text_num_layers": 1,
    "vocab_size": 300,
    "train_batch_size": 8,
    "max_train_steps": 4,
    "lr_warmup_steps": 1,
    "num_inference_steps": 2,
    "sample_columns": 2,
    "logging_steps": 2,
    "mixed_precision": "no",
    "num_threads": 1,
    "validation_prompts": ("red dot", "green bar"),
}
FROZEN = {name: value for name, value in SMALL.items() if name not in TextConfig.OF_NEW_ENCODER}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 pictures with their captions, and 12 held out, one of them with words that the others do not have."""
    path = tmp_path_factory.mktemp("data") / "shapes"
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(40)]
    save_pictures(path, "train", captions)
    save_pictures(path, "test", CAPTIONS, ["something else", *CAPTIONS[1:]])
    return str(path)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders of text encoders with their tokenizers."""
    path = tmp_path_factory.mktemp("encoders")
    for name, make in (("clip", tiny_clip), ("t5", tiny_t5)):
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained(path / name)
        make(tokenizer).save_pretrained(path / name)
    return path


def config_of(folder, output_dir, **settings):
    small = FROZEN if "pretrained_text_encoder" in settings else SMALL
    if settings.get("model") == "dit":
        small = {
            name: value for name, value in small.items() if name not in ("block_out_channels", "layers_per_block")
        }
    return TextConfig(**small | {"dataset_name": folder, "output_dir": str(output_dir)} | settings)


def losses_by_caption(pipe, captions):
    """Squared error of the prediction of x_0 at some noise levels, with these captions for the pictures of CAPTIONS."""
    x0 = torch.stack([torch.from_numpy(picture(caption)).permute(2, 0, 1) for caption in CAPTIONS]) / 127.5 - 1
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    embeds = pipe.encode_prompt(captions)
    total = 0.0
    for t in (400, 600, 800):
        times = torch.full((len(x0),), t)
        level = pipe.scheduler.schedule.level(times, x0)
        x_t = level.alpha * x0 + level.sigma * eps
        with torch.no_grad():
            v = pipe.denoiser(
                x_t, times, encoder_hidden_states=embeds.states, encoder_attention_mask=embeds.mask
            ).sample
        total += (v - (level.alpha * eps - level.sigma * x0)).square().mean().item()
    return total / 3


def test_a_short_run_learns_that_the_caption_matters(folder, tmp_path, capsys):
    settings = {
        "max_train_steps": 150,
        "learning_rate": 5e-3,
        "train_batch_size": 24,
        "block_out_channels": (16, 32),
        "validation_split": "test",
        "save_images_steps": 100,
        "num_inference_steps": 10,
    }
    output_dir = main(config_of(folder, tmp_path / "run", **settings))
    assert "captions of the column text" in capsys.readouterr().out
    pipe = DiffusionPipeline.from_pretrained(output_dir)
    assert type(pipe) is TextGuidedDiffusionPipeline
    shuffled = CAPTIONS[1:] + CAPTIONS[:1]
    right, wrong = losses_by_caption(pipe, CAPTIONS), losses_by_caption(pipe, shuffled)
    assert right < 0.8 * wrong
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(8)]
    prompts = [f"{colour} dot" for colour in COLOURS[:2]]
    images = pipe(
        prompts, num_inference_steps=10, num_images_per_prompt=4, generator=generators, output_type="pt"
    ).images
    red, green = images[:, :, 3:5, 3:5].mean((2, 3)).unflatten(0, (2, 4)).mean(1)
    assert red[0] > red[1] + 0.1 and green[1] > green[0] + 0.1
    for name in ("samples.png", "denoising.png", "samples/step-0000100.png", "README.md"):
        assert (output_dir / name).stat().st_size > 0
    assert "text-to-image" in (output_dir / "README.md").read_text()
    assert "val_loss" in (output_dir / "metrics.jsonl").read_text()
    path = draw(SampleConfig(run=str(output_dir), prompts=("red dot", "blue bar"), num_inference_steps=2))
    assert Image.open(path).size[0] > 4 * 48


@pytest.mark.parametrize("frozen", [False, True])
def test_a_run_that_goes_on_is_the_run(folder, encoders, tmp_path, frozen):
    settings = {"max_train_steps": 6, "checkpointing_steps": 3, "checkpoints_total_limit": None, "random_flip": True}
    settings |= {} if frozen else {"bpe_dropout": 0.5}
    if frozen:
        settings |= {"pretrained_text_encoder": str(encoders / "clip"), "cache_dir": str(tmp_path / "cache")}
    whole = main(config_of(folder, tmp_path / "whole", **settings))
    parts = main(config_of(folder, tmp_path / "parts", **settings))
    for path in (parts / "checkpoint-6").iterdir():
        path.unlink()
    (parts / "checkpoint-6").rmdir()
    main(config_of(folder, tmp_path / "parts", **settings, resume_from_checkpoint="checkpoint-3"))
    assert_same_run(whole, parts, 6)


def test_two_processes_make_the_run_of_one(folder, tmp_path):
    """With half of the batch each: denoiser and encoder, their averages, the losses and the grids."""
    settings = {"max_train_steps": 3, "save_images_steps": 2, "validation_split": "test", "validation_steps": 2}
    settings |= {"caption_dropout": 0.3, "logging_steps": 1, "max_grad_norm": 0.1, "model_guidance_scale": 2.0}
    settings |= {"bpe_dropout": 0.5}
    whole = main(config_of(folder, tmp_path / "one", **settings))
    options = ["--config", str(whole / "train_config.yaml"), "--output_dir", str(tmp_path / "two")]
    half = parse_config(TextConfig, [*options, "--train_batch_size", "4", "--num_threads", "1"])
    assert in_ranks(lambda: main(half)).count("captions of the column text") == 1
    for name in ("model", "average"):
        one, two = (load_file(tmp_path / run / "checkpoint-3" / f"{name}.safetensors") for run in ("one", "two"))
        assert one.keys() == two.keys() and any(key.startswith("text_encoder.") for key in one)
        for key in one:
            torch.testing.assert_close(
                one[key], two[key], rtol=1e-4, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}"
            )
    for mine, theirs in zip(*(read_metrics(tmp_path / run / "metrics.jsonl") for run in ("one", "two")), strict=True):
        for loss in {"loss", "val_loss"} & mine.keys():
            assert theirs[loss] == pytest.approx(mine[loss], rel=1e-4)
    for grid in ("samples.png", "samples/step-0000002.png"):
        pixels = [np.asarray(Image.open(tmp_path / run / grid)).astype(int) for run in ("one", "two")]
        assert abs(pixels[0] - pixels[1]).max() <= 2


@pytest.mark.parametrize("dropout", [0.0, 1 - 1e-9])
def test_dropped_captions_teach_the_encoder_nothing(folder, tmp_path, dropout):
    """The tokens of a word get no gradient from the empty text, and that of its end does."""
    # What is zero in a new network takes some steps to hand gradients on.
    settings = {"max_train_steps": 6, "learning_rate": 1e-2, "adam_weight_decay": 0.0, "use_ema": False}
    config = config_of(folder, tmp_path / "run", caption_dropout=dropout, guidance_scale=1.0, **settings)
    pipe = DiffusionPipeline.from_pretrained(main(config))
    assert pipe.knows_empty_text == (dropout > 0)
    new = Texts.of(config, sorted(CAPTIONS))
    assert new.tokenizer.get_vocab() == pipe.tokenizer.get_vocab()
    tokens = [encoder.get_input_embeddings().weight for encoder in (new.text_encoder, pipe.text_encoder)]
    changed = (tokens[0] - tokens[1]).abs().amax(1) > 1e-6
    (word,) = pipe.tokenizer("red", add_special_tokens=False).input_ids
    assert changed[pipe.tokenizer.eos_token_id] and changed[word] == (dropout == 0)


@pytest.mark.product
@pytest.mark.parametrize("kind", ["clip", "t5"])
@pytest.mark.parametrize("model", ["unet", "dit"])
def test_a_frozen_encoder_stays_as_it_is_and_its_pipeline_sees_what_training_saw(
    folder, encoders, tmp_path, kind, model
):
    options = {"patch_size": 2, "hidden_size": 16, "num_layers": 1} if model == "dit" else {}
    length, masked = 8, kind == "t5"
    if model == "dit":  # and not what is the default for the encoder
        length, masked = 6, kind == "clip"
        options |= {"max_text_length": length, "mask_padding": masked}
    config = config_of(
        folder,
        tmp_path / "run",
        pretrained_text_encoder=str(encoders / kind),
        cache_dir=str(tmp_path / "cache"),
        text_cache="disk" if model == "dit" else "memory",
        text_cache_dtype="fp32",
        model=model,
        **options,
    )
    pipe = DiffusionPipeline.from_pretrained(main(config))
    assert pipe.mask_padding == masked and pipe.max_text_length == length
    before = (tiny_clip if kind == "clip" else tiny_t5)(tiny_tokenizer()).state_dict()
    after = pipe.text_encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in after)
    (states,) = [path for path in (tmp_path / "cache").rglob("text_embeddings-*.npy") if "mask" not in path.name]
    cached = torch.from_numpy(np.load(states))
    assert cached.shape[0] == len(CAPTIONS) + 1 and cached.dtype == torch.float32
    own = pipe.encode_prompt([*sorted(CAPTIONS), ""])
    if masked:
        mask = torch.from_numpy(np.load(states.with_name(f"{states.stem}.mask.npy")))
        assert torch.equal(own.mask, mask[:, : own.mask.shape[1]]) and not mask[:, own.mask.shape[1] :].any()
        cached, own_states = cached[mask], own.states[own.mask]
    else:
        own_states = own.states
    torch.testing.assert_close(cached, own_states, atol=1e-4, rtol=1e-4)


def test_averages_of_both_networks_are_made_afterwards(folder, tmp_path):
    settings = {"ema_snapshot_steps": 1, "max_train_steps": 8, "ema_std": 0.1, "learning_rate": 1e-2}
    run = main(config_of(folder, tmp_path / "run", **settings))
    made = reconstruct(ReconstructConfig(run=str(run), ema_std=0.1, output_dir=str(tmp_path / "made")))
    pipes = [DiffusionPipeline.from_pretrained(path) for path in (run, made)]
    for name in ("denoiser", "text_encoder"):
        trained, again = (getattr(pipe, name).state_dict() for pipe in pipes)
        assert all(torch.allclose(trained[key], again[key], atol=1e-4) for key in trained), name


@pytest.mark.parametrize("cached", [False, True])
def test_latents_of_a_vae_can_be_trained_on(folder, tmp_path, cached):
    """Encoded at each batch, or once, with the captions kept beside the latents."""
    torch.manual_seed(0)
    vae = VAEModel(sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), latent_channels=4)
    vae.register_to_config(scaling_factor=1.3, shift_factor=0.1)
    vae.save_pretrained(tmp_path / "vae")
    name = folder
    if cached:
        name = str(tmp_path / "latents")
        options = {"dataset_name": folder, "output_dir": name, "label_column": "text", "num_threads": 1}
        cache(CacheConfig(**options, vae=str(tmp_path / "vae")))
        forget_accelerate()
    output_dir = main(config_of(name, tmp_path / "run", vae=str(tmp_path / "vae")))
    pipe = DiffusionPipeline.from_pretrained(output_dir)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("red dot", num_inference_steps=2, output_type="pt").images.shape == (1, 3, 8, 8)
    assert f"{len(CAPTIONS)} different captions" in (output_dir / "README.md").read_text()


def test_captions_are_the_names_of_labels_where_there_are_no_texts(tmp_path):
    config = config_of("digits", tmp_path / "run", max_train_samples=20, max_train_steps=1)
    pipe = DiffusionPipeline.from_pretrained(main(dataclasses.replace(config, validation_prompts=("3",))))
    assert pipe.tokenizer.decode(pipe.tokenizer("3").input_ids, skip_special_tokens=True).strip() == "3"


def test_tokenizer_goes_through_disk_and_is_the_same_each_time(tmp_path):
    texts = [*CAPTIONS, "", "Something never seen: ß 漢 🍏"]
    tokenizer = train_tokenizer(CAPTIONS, 300, 40)
    assert tokenizer(texts).input_ids == train_tokenizer(CAPTIONS, 300, 40)(texts).input_ids
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(texts).input_ids == tokenizer(texts).input_ids and loaded.model_max_length == 40
    assert loaded.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id
    for text in texts:
        assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True).strip() == text.lower()
    # A word of the captions is one token, between those of start and end.
    assert all(len(loaded(word).input_ids) == 3 for word in (*COLOURS, *SHAPES))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label_column", "x"], "captions are the condition"),
        (["--unconditional"], "captions are the condition"),
        (["--text_cache", "disk"], "text_cache has no meaning without pretrained_text_encoder"),
        (["--text_encoder", "x", "--vocab_size", "300"], "leave it or pretrained_text_encoder out"),
        (["--vocab_size", "100"], "at least 258"),
        (["--caption_dropout", "1"], r"in \[0, 1\)"),
        (["--bpe_dropout", "1"], r"bpe_dropout must be in \[0, 1\)"),
        (["--text_encoder", "x", "--bpe_dropout", "0.1"], "leave it or pretrained_text_encoder out"),
        (["--text_hidden_size", "30", "--text_num_attention_heads", "4"], "must be a multiple"),
        (["--streaming"], "reads no captions ahead"),
        (["--validation_prompts", *["a"] * 17], "must be 1 to 16 texts, a row each, got 17"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        parse_config(TextConfig, options)
    assert re.search(message, capsys.readouterr().err)


def test_a_column_that_holds_no_captions_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="caption_column 'image' holds no text; its columns are"):
        main(config_of(folder, tmp_path / "run", caption_column="image"))
    assert not (tmp_path / "run").exists()


def test_grids_are_not_guided_by_an_empty_text_that_is_not_trained(folder, tmp_path):
    with pytest.raises(ValueError, match="guidance_scale, .* must be 1 with a caption_dropout of 0, .* got 4"):
        main(config_of(folder, tmp_path / "run", caption_dropout=0.0))
    with pytest.raises(ValueError, match="model_guidance_scale leads away from .* caption_dropout of 0 trains none"):
        main(config_of(folder, tmp_path / "run", caption_dropout=0.0, guidance_scale=1.0, model_guidance_scale=2.0))
    assert not (tmp_path / "run").exists()


def test_an_empty_text_among_the_captions_is_one_to_lead_away_from(tmp_path):
    save_pictures(tmp_path / "data", "train", CAPTIONS, ["", *CAPTIONS[1:]])
    settings = {"caption_dropout": 0.0, "max_train_steps": 1, "guidance_scale": 2.0}
    run = main(config_of(str(tmp_path / "data"), tmp_path / "run", **settings))
    assert DiffusionPipeline.from_pretrained(run).knows_empty_text


def tiny_pipeline(**components):
    tokenizer = tiny_tokenizer()
    parts = {"tokenizer": tokenizer, "text_encoder": tiny_clip(tokenizer)} | components
    return TextGuidedDiffusionPipeline(tiny_text_unet(), ExtDDIMScheduler(timestep_spacing="trailing"), **parts)


def test_the_columns_of_a_picture_of_prompts_are_the_scales(tmp_path, capsys):
    """Each from the same noise; a guider that was saved with the pipeline gives way."""
    tiny_pipeline(guider=ClassifierFreeGuidance(7.0)).save_pretrained(tmp_path / "run")
    options = {"prompts": ("red dot", "blue bar"), "num_inference_steps": 2, "seed": 5, "num_images_per_prompt": 2}
    output = tmp_path / "new" / "scales.png"
    path = draw(SampleConfig(run=str(tmp_path / "run"), guidance_scales=(1.0, 3.0), output=str(output), **options))
    assert path == output and "own guider, ClassifierFreeGuidance, gives way" in capsys.readouterr().out
    pipe, images = tiny_pipeline(), []
    for prompt in options["prompts"]:
        for scale in (1.0, 3.0):
            for seed in (5, 6):
                generator = torch.Generator().manual_seed(seed)
                call = {"num_inference_steps": 2, "guidance_scale": scale, "generator": generator, "output_type": "pt"}
                images.append(pipe(prompt, **call).images)
    expected = labelled_grid(
        torch.cat(images).unflatten(0, (2, 4)), ["red dot", "blue bar"], ["w = 1", "", "w = 3", ""]
    )
    assert np.abs(np.asarray(Image.open(path)).astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "say which pipeline: training/sample_prompts.py RUN"),
        ({"run": "."}, "prompts must be given: --prompts TEXT"),
        ({"run": ".", "prompts": ("a",), "guidance_scales": ()}, "guidance_scales must be given"),
        ({"run": ".", "prompts": ("a",), "num_images_per_prompt": 0}, "must be at least 1"),
        ({"run": ".", "prompts": ("a",), "output": "here.txt"}, "must be the path of a picture, .* got here.txt"),
        (
            {"run": "someone/something", "prompts": ("a",)},
            "output must be given for a pipeline that is not in a folder",
        ),
        ({"run": ".", "prompts": ("a",), "negative_prompt": "b"}, "no meaning at a guidance scale of 1: leave that"),
    ],
)
def test_a_picture_of_prompts_is_refused_before_a_pipeline_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        SampleConfig(**options)


def test_a_picture_of_prompts_needs_a_pipeline_that_takes_them(tmp_path):
    unet = UNet2DModel(8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="must be a pipeline that makes images from texts, got a DDIMPipeline"):
        draw(SampleConfig(run=str(tmp_path / "stock"), prompts=("a",)))
    output = str(tmp_path / "a.png")
    with pytest.raises(ValueError, match="is no folder here, and no name of a pipeline on the Hub"):
        draw(SampleConfig(run=str(tmp_path / "nothing"), prompts=("a",), output=output))
    assert not Path(output).exists()
