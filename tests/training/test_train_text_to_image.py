"""Runs of the script on made-up pictures, whose captions say what they show."""

import dataclasses
import re

import datasets
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import AutoTokenizer

from diffusers_ext import TextGuidedDiffusionPipeline, VAEModel
from diffusers_ext.trainer.options import parse_config
from diffusers_ext.trainer.text_encoder import train_tokenizer
from diffusers_ext.trainer.text_to_image import TextConfig
from runs import assert_same_run, forget_accelerate
from tiny_text import CAPTIONS, COLOURS, SHAPES, WIDTH, tiny_clip, tiny_t5, tiny_tokenizer
from training.cache_latents import CacheConfig
from training.cache_latents import main as cache
from training.reconstruct_ema import ReconstructConfig
from training.reconstruct_ema import main as reconstruct
from training.sample_prompts import SampleConfig
from training.sample_prompts import main as draw
from training.train_text_to_image import main


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


def picture(caption):
    """8x8 pixels: a colour on grey, at a place that the second word says."""
    colour, shape = caption.split()
    pixels = np.full((8, 8, 3), 60, np.uint8)
    place = {"dot": np.s_[2:6, 2:6], "bar": np.s_[:, 3:5], "edge": np.s_[6:, :]}[shape]
    pixels[place] = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}[colour]
    return pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 pictures with their captions, and 12 held out, one of them with words that the others do not have."""
    path = tmp_path_factory.mktemp("data") / "shapes"
    path.mkdir()
    for split, number in (("train", 40), ("test", 12)):
        captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(number)]
        pictures = [Image.fromarray(picture(caption)) for caption in captions]
        if split == "test":
            captions[0] = "something else"
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        rows = datasets.Dataset.from_dict({"image": pictures, "text": captions}, features=features)
        rows.to_parquet(path / f"{split}.parquet")
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
    if frozen:
        settings |= {"pretrained_text_encoder": str(encoders / "clip"), "cache_dir": str(tmp_path / "cache")}
    whole = main(config_of(folder, tmp_path / "whole", **settings))
    parts = main(config_of(folder, tmp_path / "parts", **settings))
    for path in (parts / "checkpoint-6").iterdir():
        path.unlink()
    (parts / "checkpoint-6").rmdir()
    main(config_of(folder, tmp_path / "parts", **settings, resume_from_checkpoint="checkpoint-3"))
    assert_same_run(whole, parts, 6)


@pytest.mark.parametrize("kind", ["clip", "t5"])
@pytest.mark.parametrize("model", ["unet", "dit"])
def test_a_frozen_encoder_stays_as_it_is_and_its_pipeline_sees_what_training_saw(
    folder, encoders, tmp_path, kind, model
):
    sizes = {"patch_size": 2, "hidden_size": 16, "num_layers": 1} if model == "dit" else {}
    config = config_of(
        folder,
        tmp_path / "run",
        pretrained_text_encoder=str(encoders / kind),
        cache_dir=str(tmp_path / "cache"),
        text_cache="disk" if model == "dit" else "memory",
        text_cache_dtype="fp32",
        model=model,
        **sizes,
    )
    pipe = DiffusionPipeline.from_pretrained(main(config))
    assert pipe.mask_padding == (kind == "t5")
    before = (tiny_clip if kind == "clip" else tiny_t5)(tiny_tokenizer()).state_dict()
    after = pipe.text_encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in after)
    (states,) = [path for path in (tmp_path / "cache").rglob("text_embeddings-*.npy") if "mask" not in path.name]
    cached = torch.from_numpy(np.load(states))
    assert cached.shape[0] == len(CAPTIONS) + 1 and cached.dtype == torch.float32
    own = pipe.encode_prompt([*sorted(CAPTIONS), ""])
    if kind == "t5":
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
        (["--text_cache", "disk"], "needs a pretrained_text_encoder"),
        (["--text_encoder", "x", "--vocab_size", "300"], "leave it or pretrained_text_encoder out"),
        (["--vocab_size", "100"], "at least 258"),
        (["--caption_dropout", "1"], r"in \[0, 1\)"),
        (["--text_hidden_size", "30", "--text_num_attention_heads", "4"], "must be a multiple"),
        (["--streaming"], "reads no captions ahead"),
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
