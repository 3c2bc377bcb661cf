"""Augmentation: what is done to images and what is said of it, in batches, networks and a run."""

import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from diffusers_ext import DiTModel, UNetModel
from diffusers_ext.data.batches import NUM_AUGMENTATION, BatchOptions, TrainingBatches
from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.recipes.augmentation import NUM_LABELS, augment, check_augmentation
from diffusers_ext.recipes.denoising import DenoisingConfig
from training.train_ddpm import TrainConfig, main


# The ways, in the order of the numbers that choose them, and of those that say by how much.
WAYS = ("mirror", "upside_down", "size", "turn", "aspect", "shift")


def numbers(**values):
    """Random numbers of one image, of which only those given change it at a probability of 1/2."""
    u = torch.full((1, NUM_AUGMENTATION), 0.75)
    for name, value in values.items():
        way = WAYS.index(name)
        u[0, way] = 0.25
        places = {"aspect": (10, 11), "shift": (12, 13)}.get(name, (6 + way,))
        for place, one in zip(places, np.atleast_1d(value), strict=True):
            u[0, place] = one
    return u


def cdf(z):
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


@pytest.fixture
def picture():
    return torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def test_an_image_that_is_not_chosen_stays_as_it_is_bit_for_bit(picture):
    image, label = augment(picture, numbers(), 0.5)
    assert torch.equal(image, picture) and torch.equal(label, torch.zeros(1, NUM_LABELS))
    uniform = torch.rand(4000, NUM_AUGMENTATION, generator=torch.Generator().manual_seed(0))
    images = picture.expand(4000, -1, -1, -1)
    changed, labels = augment(images, uniform, 0.12)
    same = (changed == images).flatten(1).all(1)
    assert torch.equal(same, (labels == 0).all(1)) and changed.isfinite().all()
    # Half of those that are chosen to be mirrored are.
    share = [0.06, 0.06, 0.12, 0.12, 0.12, 0.12]
    got = (labels[:, [0, 1, 2, 4, 5, 7]] != 0).double().mean(0).tolist()
    assert got == pytest.approx(share, abs=4 * math.sqrt(0.12 / 4000))
    assert torch.equal(augment(images, uniform, 0.0)[0], images)


def test_flips_shifts_and_quarter_turns_move_pixels(picture):
    for values, expected, said in [
        ({"mirror": 0.2}, picture.flip(3), {0: 1.0}),
        ({"upside_down": 0.2}, picture.flip(2), {1: 1.0}),
        ({"mirror": 0.2, "upside_down": 0.2}, picture.flip(2, 3), {0: 1.0, 1: 1.0}),
        ({"mirror": 0.7}, picture, {}),
        ({"turn": 0.75}, picture.rot90(-1, (2, 3)), {3: -1.0, 4: 1.0}),
    ]:
        image, label = augment(picture, numbers(**values), 0.5)
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(label[0], torch.tensor([said.get(i, 0.0) for i in range(9)]), rtol=0, atol=1e-6)
    # One standard deviation is an eighth of the side: a pixel down, two to the left; beyond the edge, its mirror image.
    image, label = augment(picture, numbers(shift=(cdf(1), cdf(-2))), 0.5)
    torch.testing.assert_close(image[..., 1:, :6], picture[..., :7, 2:], rtol=0, atol=1e-4)
    torch.testing.assert_close(image[..., 0, :6], picture[..., 0, 2:], rtol=0, atol=1e-4)
    torch.testing.assert_close(label[0, 7:], torch.tensor([1.0, -2.0]), rtol=0, atol=1e-4)


def test_sizes_and_aspects_scale_the_distance_from_the_middle():
    """An image whose values are its coordinates, wider than high, shows where each pixel is from."""
    y, x = torch.meshgrid(torch.arange(8.0) - 3.5, torch.arange(16.0) - 7.5, indexing="ij")
    image = torch.stack([x, y])[None]
    inner = (slice(None), slice(None), slice(2, 6), slice(4, 12))
    larger, label = augment(image, numbers(size=cdf(1)), 0.5)
    torch.testing.assert_close(larger[inner], image[inner] / 2**0.2, rtol=0, atol=1e-4)
    assert label[0, 2] == pytest.approx(1, abs=1e-4)
    for direction, (of_x, of_y) in ((0.5, (2**-0.2, 2**0.2)), (0.75, (2**0.2, 2**-0.2))):
        stretched, label = augment(image, numbers(aspect=(cdf(1), direction)), 0.5)
        expected = image * torch.tensor([of_x, of_y]).view(1, 2, 1, 1)
        torch.testing.assert_close(stretched[inner], expected[inner], rtol=0, atol=1e-4)
        turned = math.pi * (2 * direction - 1)
        assert label[0, 5:7].tolist() == pytest.approx([math.cos(turned), math.sin(turned)], abs=1e-4)


def test_batches_have_numbers_by_position_and_are_otherwise_as_they_were():
    data = prepare_images("digits", max_samples=20)
    options = BatchOptions(seed=0, batch_size=4, label_dropout=0.3)
    plain = TrainingBatches(data, options)[2]
    batch = TrainingBatches(data, dataclasses.replace(options, augmentation=True))[2]
    uniform = batch.pop("augmentation_uniform")
    assert batch.keys() == plain.keys() and all(torch.equal(batch[name], plain[name]) for name in plain)
    assert uniform.shape == (4, NUM_AUGMENTATION) and uniform.dtype == torch.float32 and len(uniform.unique()) > 50
    halves = TrainingBatches(data, dataclasses.replace(options, augmentation=True, batch_size=2))
    assert torch.equal(torch.cat([halves[i]["augmentation_uniform"] for i in (4, 5)]), uniform)


@pytest.mark.parametrize("cls", [DiTModel, UNetModel])
def test_a_network_takes_what_was_done_and_nothing_is_as_if_it_were_not_given(cls, picture):
    torch.manual_seed(0)
    options = {"hidden_size": 8, "num_layers": 1, "num_attention_heads": 1, "patch_size": 4}
    options = options if cls is DiTModel else {"block_out_channels": (8,), "layers_per_block": 1}
    options |= {"sample_size": 8, "in_channels": 2, "out_channels": 2}
    network, without = cls(augmentation_dim=NUM_LABELS, **options).eval(), cls(**options)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    plain = network(picture, 3).sample
    assert torch.equal(network(picture, 3, augmentation=torch.zeros(1, NUM_LABELS)).sample, plain)
    assert (network(picture, 3, augmentation=torch.ones(1, NUM_LABELS)).sample - plain).abs().max() > 1e-3
    assert network.state_dict().keys() - without.state_dict().keys() == {"augmentation_embedding.weight"}
    with pytest.raises(ValueError, match="takes none: it was built with augmentation_dim=0"):
        without(picture, 3, augmentation=torch.zeros(1, NUM_LABELS))
    with pytest.raises(ValueError, match=r"augmentation must have shape \(1, 9\), got \(1, 2\)"):
        network(picture, 3, augmentation=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="augmentation_dim must be at least 0, got -1"):
        cls(augmentation_dim=-1, **options)


def test_a_run_saves_a_network_that_samples_without_and_resumes_bit_for_bit(tmp_path):
    """On images that are all changed: the losses are others than without."""
    small = {"model": "dit", "hidden_size": 8, "num_layers": 1, "patch_size": 4, "max_train_samples": 30}
    small |= {"train_batch_size": 4, "max_train_steps": 4, "checkpointing_steps": 2, "num_inference_steps": 2}
    small |= {"mixed_precision": "no", "sample_columns": 1, "logging_steps": 1, "validation_split": "test"}
    config = TrainConfig(**small, augmentation_probability=1.0, output_dir=str(tmp_path / "run"))
    folder = main(config)
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert pipe.denoiser.config.augmentation_dim == NUM_LABELS
    assert (load_file(folder / "checkpoint-4" / "model.safetensors")["augmentation_embedding.weight"] != 0).any()
    pipe.set_progress_bar_config(disable=True)
    assert pipe(class_labels=[1], num_inference_steps=2, output_type="pt").images.isfinite().all()
    part = tmp_path / "part"
    shutil.copytree(folder / "checkpoint-2", part / "checkpoint-2")
    shutil.copy(folder / "metrics.jsonl", part)
    main(dataclasses.replace(config, output_dir=str(part), resume_from_checkpoint="latest"))
    one, two = (load_file(each / "checkpoint-4" / "model.safetensors") for each in (folder, part))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"augmentation_probability": 1.5}, r"augmentation_probability must be in \[0, 1\], got 1.5"),
        ({"augmentation_probability": 0.1, "random_flip": True}, "does not fit random_flip, which counts mirrored"),
        ({"augmentation_probability": 0.1, "condition": "grey"}, "does not fit condition and condition_column"),
    ],
)
def test_what_augmentation_contradicts_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DenoisingConfig(**options)


def test_sequences_are_refused(tmp_path):
    np.save(tmp_path / "train.npy", np.random.default_rng(0).normal(size=(6, 8)))
    with pytest.raises(ValueError, match="augmentation_probability is for images, and .* holds sequences"):
        check_augmentation(DenoisingConfig(augmentation_probability=0.1), prepare_images(str(tmp_path)))
