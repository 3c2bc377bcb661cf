"""Several labels an image: read from any kind of column, dropped as a whole, learned, and sampled by."""

import dataclasses

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, List, Value
from PIL import Image

from diffusers_ext import GuidedDiffusionPipeline, UNetModel, VAEModel
from diffusers_ext.commands.train_ddpm import TrainConfig, build_objective, build_scheduler, main
from diffusers_ext.data.batches import BatchOptions, TrainingBatches, make_batches
from diffusers_ext.data.latent_cache import prepare_samples
from diffusers_ext.data.prepare import prepare_images, prepare_stream
from diffusers_ext.data.validation import prepare_validation
from runs import forget_accelerate
from training.cache_latents import CacheConfig
from training.cache_latents import main as cache_latents
from training.train_classifier import TrainClassifierConfig
from training.train_classifier import main as train_classifier


NAMES = ["left", "right", "top"]
SETS = [[0], [0, 2], [], [1], [2, 1], [0, 1, 2]]
EXPECTED = np.array([[k in members for k in range(3)] for members in SETS])


def picture_of(members):
    """A bright side for each label: left, right, top."""
    picture = np.zeros((8, 8), np.uint8)
    for number in members:
        picture[[np.s_[:, :3], np.s_[:, 5:], np.s_[:2, :]][number]] = 255
    return Image.fromarray(picture)


def save(folder, column, feature, sets=SETS, splits=("train",)):
    """A folder of parquet with these pictures and this column."""
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "labels": feature})
    for split in splits:
        rows = {"image": [picture_of(members) for members in sets], "labels": column}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def multi_hot(kind):
    return [[kind(k in members) for k in range(3)] for members in SETS]


COLUMNS = {
    "class labels": (SETS, List(ClassLabel(names=NAMES)), NAMES),
    "integers": (SETS, List(Value("int32")), ["0", "1", "2"]),
    "names": ([[NAMES[k] for k in members] for members in SETS], List(Value("string")), NAMES),
    "bools": (multi_hot(bool), List(Value("bool")), ["0", "1", "2"]),
    "floats": (multi_hot(float), List(Value("float32"), length=3), ["0", "1", "2"]),
    "zeros and ones": (multi_hot(int), List(Value("int64")), ["0", "1", "2"]),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_column_of_lists_is_read_as_sets(tmp_path, kind):
    column, feature, names = COLUMNS[kind]
    data = prepare_images(save(tmp_path / "data", column, feature), label_column="labels")
    assert data.has_label_sets and data.labels.dtype == bool
    assert np.array_equal(data.labels, EXPECTED)
    assert list(data.id2label.values()) == names and data.num_classes == 3


@pytest.mark.parametrize("sets, expected", [(SETS, True), ([members or [1] for members in SETS], False)])
def test_an_empty_set_among_the_labels_is_known(tmp_path, sets, expected):
    """It trains the null label."""
    data = prepare_images(save(tmp_path / "data", sets, List(ClassLabel(names=NAMES)), sets))
    assert data.has_unlabelled == expected


@pytest.mark.parametrize("kind", ["class labels", "integers", "names", "bools", "floats"])
def test_a_stream_gives_the_sets_of_the_table(tmp_path, kind):
    column, feature, names = COLUMNS[kind]
    folder = save(tmp_path / "data", column, feature)
    given = {"label_column": "labels", "label_names": names}
    data = prepare_stream(folder, **given)
    assert data.has_label_sets and data.num_classes == 3
    batch = next(make_batches(data, BatchOptions(seed=0, batch_size=len(SETS))))
    seen = {
        (tuple(image.flatten().tolist()), tuple(row))
        for image, row in zip(batch["pixels"], batch["labels"].tolist(), strict=True)
    }
    table = prepare_images(folder, **given)
    pixels = table.pixels[np.arange(len(SETS))].reshape(len(SETS), -1)
    assert seen == {(tuple(image), tuple(row)) for image, row in zip(pixels.tolist(), EXPECTED.tolist(), strict=True)}
    assert batch["labels"].dtype == torch.bool


def test_the_only_column_of_sets_needs_no_name(tmp_path):
    data = prepare_images(save(tmp_path / "data", *COLUMNS["class labels"][:2]))
    assert np.array_equal(data.labels, EXPECTED)


@pytest.mark.parametrize(
    "column, feature, names, message",
    [
        ([[0, 0], [1], [2], [0], [0], [1]], List(Value("int64")), None, "must hold each label once, got .0, 0."),
        ([[0, 3], [1], [2], [0], [0], [1]], List(Value("int64")), NAMES, r"lists of integers in \[0, 2\], got .0, 3."),
        ([[-1], [1], [2], [0], [0], [1]], List(Value("int64")), None, "lists of integers from 0 on, got -1"),
        ([["up"], [], [], [], [], []], List(Value("string")), NAMES, "lists of the label_names, got .'up'."),
        ([[0.5, 1.0]] * 6, List(Value("float32")), None, "must hold 2 zeros and ones in every row, got .0.5, 1.0."),
        ([[True], [True, False]] * 3, List(Value("bool")), None, r"must hold lists of one length, got \[1, 2\]"),
        ([[]] * 6, List(Value("int64")), None, "holds no label in any row; see --unconditional"),
        ([None, [1], [1], [1], [1], [1]], List(Value("int64")), None, "must hold a label in every row, got 1 empty"),
    ],
)
def test_what_is_no_set_is_refused(tmp_path, column, feature, names, message):
    with pytest.raises(ValueError, match=message):
        prepare_images(save(tmp_path / "data", column, feature), label_column="labels", label_names=names)


def test_a_stream_of_sets_without_known_names_says_what_to_give(tmp_path):
    folder = save(tmp_path / "data", *COLUMNS["integers"][:2])
    with pytest.raises(
        ValueError, match="holds lists of integers, and a stream is not read ahead .* give --num_classes"
    ):
        prepare_stream(folder, label_column="labels")


@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("sets", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_label_dropout_has_its_rate_and_leaves_the_other_labels(num_classes, sets, rate):
    """Within 4 standard deviations of a binomial share; the null label is num_classes, or the empty set."""
    data = prepare_images("digits", max_samples=40)
    labels = np.arange(40) % num_classes
    known = np.eye(num_classes, dtype=bool)[labels] if sets else labels
    data = dataclasses.replace(data, labels=known, id2label={k: str(k) for k in range(num_classes)})
    batches = TrainingBatches(data, BatchOptions(seed=3, batch_size=200, label_dropout=rate))
    drawn = torch.cat([batches[number]["labels"] for number in range(10)])
    dropped = ~drawn.any(1) if sets else drawn == num_classes
    share, std = dropped.double().mean().item(), (rate * (1 - rate) / len(drawn)) ** 0.5
    assert abs(share - rate) <= 4 * std
    rows = np.concatenate([batches._rows(batches._maker.positions(number)) for number in range(10)])
    assert torch.equal(drawn[~dropped], torch.from_numpy(known[rows])[~dropped])


def test_sets_of_one_drop_where_single_labels_do(tmp_path):
    data = prepare_images("digits", max_samples=40)
    sets = dataclasses.replace(data, labels=np.eye(10, dtype=bool)[data.labels])
    options = BatchOptions(seed=3, batch_size=32, label_dropout=0.4)
    one, other = TrainingBatches(data, options)[2], TrainingBatches(sets, options)[2]
    as_sets = torch.nn.functional.one_hot(one["labels"], 11)[:, :10].bool()
    assert torch.equal(other["labels"], as_sets) and not as_sets.any(1).all()
    for name in ("pixels", "noise", "time"):
        assert torch.equal(one[name], other[name])


def test_held_out_sets_get_the_numbers_of_the_training(tmp_path):
    """Where labels are names, a split may have other ones, and so other numbers."""
    folder = save(tmp_path / "data", *COLUMNS["names"][:2])
    held_out = [["top"], ["right", "top"], [], [], [], []]
    save(tmp_path / "data", held_out, List(Value("string")), splits=("test",))
    config = TrainConfig(dataset_name=folder, label_column="labels", validation_split="test", resolution=(8,))
    data = prepare_images(folder, label_column="labels")
    read = prepare_validation(config, data)
    assert read.labels.tolist() == [[False, False, True], [False, True, True]] + [[False] * 3] * 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on made-up pictures with two labels each: which half is bright, left or right, and whether the top is."""
    forget_accelerate()
    folder = tmp_path_factory.mktemp("sets")
    sets = [[side, 2] if top else [side] for side in (0, 1) for top in (0, 1)] * 8
    save(folder / "data", sets, List(ClassLabel(names=NAMES)), sets=sets)
    config = TrainConfig(
        dataset_name=str(folder / "data"),
        output_dir=str(folder / "run"),
        block_out_channels=(16, 16),
        layers_per_block=1,
        attention_resolutions=(),
        train_batch_size=16,
        max_train_steps=100,
        learning_rate=3e-3,
        lr_warmup_steps=5,
        num_inference_steps=4,
        sample_columns=2,
        mixed_precision="no",
        num_threads=1,
        ema_std=0.05,
    )
    main(config)
    forget_accelerate()
    return config, GuidedDiffusionPipeline.from_pretrained(folder / "run")


def test_a_run_learns_all_labels_of_an_image(trained):
    """At much noise, the loss with an image's own set is lower than with a label of it taken out or put in."""
    config, pipe = trained
    objective = build_objective(config, build_scheduler(config)).eval()
    generator = torch.Generator().manual_seed(0)
    sets = [[side, 2] if top else [side] for side in (0, 1) for top in (0, 1)] * 16
    images = np.stack([np.asarray(picture_of(members)) for members in sets])
    batch = {
        "images": torch.from_numpy(images)[:, None].float() / 127.5 - 1,
        "noise": torch.randn(len(sets), 1, 8, 8, generator=generator),
        "time": torch.full((len(sets),), 0.8, dtype=torch.float64),
    }

    def loss(change):
        labels = torch.tensor([[k in change(members) for k in range(3)] for members in sets])
        with torch.no_grad():
            return objective(pipe.denoiser, batch | {"labels": labels}).item()

    right = loss(lambda members: members)
    assert right < 0.8 * loss(lambda members: [1 - members[0], *members[1:]])  # the other half
    assert right < 0.8 * loss(lambda members: members[:1] if 2 in members else [*members, 2])  # the other top
    assert right < 0.8 * loss(lambda members: [])  # the null label


def test_the_pipeline_samples_by_sets_of_names(trained):
    _, pipe = trained
    assert pipe.labels == {"left": 0, "right": 1, "top": 2}
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    images = pipe(
        class_labels=[["left"], ["right", "top"]] * 4, num_inference_steps=8, generator=generators, output_type="pt"
    ).images
    left, right, top = (
        images[..., 3:, :3].mean((1, 2, 3)),
        images[..., 3:, 5:].mean((1, 2, 3)),
        images[..., :2, 3:5].mean((1, 2, 3)),
    )
    assert ((left > right) == torch.tensor([True, False] * 4)).all()
    assert top[1::2].mean() > top[::2].mean() + 0.3


def test_a_set_of_one_is_the_label_itself(trained):
    _, pipe = trained
    assert isinstance(pipe.denoiser, UNetModel)
    pipe.set_progress_bar_config(disable=True)
    one, other = (
        pipe(
            class_labels=labels, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt"
        ).images
        for labels in ([1], [[1]])
    )
    assert (one - other).abs().max() < 1e-6


def test_a_classifier_refuses_several_labels_an_image(tmp_path):
    folder = save(tmp_path / "data", *COLUMNS["class labels"][:2])
    forget_accelerate()
    config = TrainClassifierConfig(dataset_name=folder, output_dir=str(tmp_path / "run"), mixed_precision="no")
    with pytest.raises(ValueError, match="has several labels an image"):
        train_classifier(config)
    forget_accelerate()


def test_sets_are_kept_beside_latents(tmp_path):
    folder = save(tmp_path / "data", *COLUMNS["class labels"][:2])
    vae = VAEModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), latent_channels=2)
    vae.register_to_config(scaling_factor=1.7, shift_factor=0.3)
    vae.save_pretrained(tmp_path / "vae")
    options = {"vae": str(tmp_path / "vae"), "output_dir": str(tmp_path / "latents"), "mixed_precision": "no"}
    forget_accelerate()
    cache_latents(CacheConfig(dataset_name=folder, random_flip=True, **options))
    forget_accelerate()
    config = TrainConfig(dataset_name=options["output_dir"], vae=options["vae"])
    data = prepare_samples(config, vae.eval())
    assert data.has_label_sets and np.array_equal(data.labels, EXPECTED)
    assert data.id2label == dict(enumerate(NAMES))
