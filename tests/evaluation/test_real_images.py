import dataclasses
import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext.data.config import DataConfig
from diffusers_ext.data.prepare import Sample, prepare_images
from diffusers_ext.evaluation import feature_folders
from diffusers_ext.evaluation.feature_folders import (
    cached_features_folder,
    load_features,
    split_for_training,
    train_and_save_features,
)
from diffusers_ext.evaluation.feature_training import fit_feature_classifier
from diffusers_ext.evaluation.labelled_images import LabelledImages
from diffusers_ext.evaluation.real_images import find_held_out_split, load_real_images
from diffusers_ext.evaluation.subject import labels_for


def save_split(folder, split, pictures, names=("a", "b")):
    labels = [names[index % len(names)] for index in range(len(pictures))]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
    folder.mkdir(exist_ok=True)
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def pictures(count, size, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(256, size=(count, *size, 3)).astype(np.uint8)
    return [Image.fromarray(picture).convert(mode) for picture in pixels]


@pytest.fixture
def options(tmp_path):
    return DataConfig(dataset_name=str(tmp_path / "data"), cache_dir=str(tmp_path / "datasets"))


def test_images_are_those_that_the_trainer_prepares():
    real = load_real_images(DataConfig(dataset_name="digits", resolution=(12, 10), pad_value=7))
    trained_on = prepare_images("digits", resolution=(12, 10), pad_value=7)
    np.testing.assert_array_equal(real.train.images.permute(0, 2, 3, 1), trained_on.pixels[np.arange(1500)])
    np.testing.assert_array_equal(real.train.labels, trained_on.labels)
    assert len(real.held_out) == 297 and real.held_out.images.shape[1:] == real.image_shape == (1, 12, 10)


def test_held_out_images_are_prepared_like_the_training_images(tmp_path, options):
    """Colour pictures of another size become what the training images are."""
    save_split(tmp_path / "data", "train", pictures(20, (12, 8), "L"))
    save_split(tmp_path / "data", "test", pictures(6, (24, 16), "RGB"))
    real = load_real_images(options)
    assert real.image_shape == (1, 12, 8)
    assert real.held_out.images.shape == (6, 1, 12, 8)


def test_without_a_held_out_split_a_tenth_of_the_images_tests_the_classifier(tmp_path, options):
    save_split(tmp_path / "data", "train", pictures(20, (8, 8)))
    real = load_real_images(options)
    assert real.held_out is None
    train, held_out = split_for_training(real, seed=0)
    assert (len(train), len(held_out)) == (18, 2)
    both = torch.cat([train.images, held_out.images]).flatten(1).int().sort(0).values
    assert both.equal(real.train.images.flatten(1).int().sort(0).values)


@pytest.mark.parametrize(
    "used, expected", [("train", "validation"), ("validation", "test"), ("train[:50%]", "validation")]
)
def test_the_held_out_split_is_not_the_one_trained_on(tmp_path, used, expected):
    for split in ("train", "test", "validation"):
        save_split(tmp_path / "data", split, pictures(2, (8, 8)))
    assert find_held_out_split(DataConfig(dataset_name=str(tmp_path / "data"), dataset_split=used)) == expected


def test_labels_of_both_splits_have_the_same_ids(tmp_path, options):
    """Names that one split lacks must not shift the ids of the others."""
    save_split(tmp_path / "data", "train", pictures(6, (8, 8)), names=("ant", "bee", "cat"))
    save_split(tmp_path / "data", "test", pictures(4, (8, 8)), names=("cat", "bee"))
    real = load_real_images(options)
    assert real.held_out.label_names == real.train.label_names == ["ant", "bee", "cat"]
    assert real.held_out.labels.tolist() == [2, 1, 2, 1]


def save_numbered(folder, split, labels):
    cells = [{"bytes": encoded(picture), "path": None} for picture in pictures(len(labels), (8, 8))]
    columns = {"image": cells, "label": labels}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")


def encoded(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_an_integer_means_the_same_label_in_splits_of_other_integers(tmp_path, options):
    """2018 and 2020 are 0 and 1 of the training split alone, and 0 and 2 of a model that knows 2019 too."""
    save_numbered(tmp_path / "data", "train", [2020, 2018, 2020])
    save_numbered(tmp_path / "data", "test", [2020, 2020])
    real = load_real_images(options)
    assert (real.train.label_names, real.held_out.labels.tolist()) == (["2018", "2020"], [1, 1])
    real = load_real_images(options, label_names=["2018", "2019", "2020"])
    assert real.train.labels.tolist() == [2, 0, 2] and real.held_out.labels.tolist() == [2, 2]
    assert real.held_out.label_names == real.train.label_names == ["2018", "2019", "2020"]
    assert sorted(labels_for(real, 3, 6)[0]) == [0, 0, 2, 2, 2, 2]
    assert load_real_images(options, label_names=["a", "b"]).train.label_names == ["2018", "2020"]  # another model's
    save_numbered(tmp_path / "data", "test", [2020, 2019])
    with pytest.raises(
        ValueError, match="split test must have the labels of the training images, 2018, 2020, got 2019"
    ):
        load_real_images(options)


def test_a_share_of_the_training_images_is_the_one_trained_on(options, tmp_path):
    save_numbered(tmp_path / "data", "train", [0] * 20 + [1] * 10)
    real = load_real_images(dataclasses.replace(options, max_train_samples=6))
    trained_on = prepare_images(options.dataset_name, cache_dir=options.cache_dir, max_samples=6, unconditional=True)
    np.testing.assert_array_equal(real.train.images.permute(0, 2, 3, 1), trained_on.pixels[np.arange(6)])
    assert real.train.labels.bincount().tolist() == [4, 2]


def test_sixteen_bits_become_eight(tmp_path, options):
    values = np.array([0, 128, 129, 257, 65406, 65535], np.uint16)  # 257 is the value that 1 in 8 bits stands for
    pixels = np.stack([np.tile(values, (6, 1))] * 4)
    table = datasets.Dataset.from_dict({"image": [Image.fromarray(picture) for picture in pixels]})
    (tmp_path / "data").mkdir()
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "data" / "train.parquet")
    real = load_real_images(options)
    assert real.train.images[0, 0, 0].tolist() == [0, 0, 1, 1, 254, 255]
    assert not real.has_labels and real.train.labels.eq(-1).all()


def test_the_kept_classifier_is_named_by_the_content(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFUSERS_EXT_CACHE", str(tmp_path))
    some = load_real_images(DataConfig(dataset_name="digits", max_train_samples=50))
    folder = cached_features_folder(some)
    assert folder == cached_features_folder(load_real_images(DataConfig(dataset_name="digits", max_train_samples=50)))
    assert folder != cached_features_folder(load_real_images(DataConfig(dataset_name="digits", max_train_samples=51)))
    some.train.labels[0] += 1
    assert folder != cached_features_folder(some)


def test_a_saved_classifier_tells_what_it_was_trained_on(tmp_path):
    real = load_real_images(DataConfig(dataset_name="digits", max_train_samples=64))
    about = train_and_save_features(real, tmp_path, num_epochs=1, show_progress=False)
    model, loaded = load_features(tmp_path)
    assert loaded == about and about["num_train_images"] == 64 and about["num_held_out_images"] == 297
    _, labels = model.measure(real.held_out.images)
    assert about["held_out_accuracy"] == pytest.approx(
        (labels == real.held_out.labels).double().mean().item(), abs=1e-9
    )


def test_bad_input_is_refused(tmp_path, options):
    save_split(tmp_path / "data", "train", pictures(4, (8, 8)))
    save_split(tmp_path / "data", "test", pictures(4, (8, 8)), names=("a", "c"))
    with pytest.raises(ValueError, match="split test must have the labels of the training images, a, b, got a, c"):
        load_real_images(options)
    with pytest.raises(
        ValueError, match="is no folder of a feature classifier: make one with training/train_features"
    ):
        load_features(tmp_path)


def test_a_sample_of_a_table_has_of_each_label_its_share_of_those_trained_on(tmp_path, options):
    save_split(tmp_path / "data", "train", pictures(40, (8, 8)), names=("a", "a", "a", "b"))
    save_split(tmp_path / "data", "validation", pictures(12, (8, 8), seed=1), names=("a", "b"))
    options = dataclasses.replace(options, max_train_samples=24)
    trained_on = {image.numpy().tobytes() for image in load_real_images(options).train.images}
    real = load_real_images(options, sample=Sample(8))
    assert real.train.labels.bincount().tolist() == [6, 2] and real.held_out.labels.bincount().tolist() == [4, 4]
    assert {image.numpy().tobytes() for image in real.train.images} < trained_on and len(trained_on) == 24
    assert "8 of 40 images are taken, of each label its share" in real.notes
    # Of more images than suffice so many, of fewer all.
    for sample, numbers in ((Sample(1000), (24, 12)), (Sample(8, 12), (8, 12)), (Sample(8, 24), (24, 12))):
        every = load_real_images(options, sample=sample)
        assert (len(every.train), len(every.held_out)) == numbers
    assert load_real_images(options, only_train=True).held_out is None


def test_a_sample_of_a_stream_is_of_all_its_parts_or_of_the_first_images_trained_on(tmp_path, options):
    """Files whose images are as bright as their number, from 0 to 3."""
    (tmp_path / "data").mkdir()
    for number in range(4):
        pixels = [Image.fromarray(np.full((8, 8), number, np.uint8))] * 10
        features = datasets.Features({"image": datasets.Image()})
        table = datasets.Dataset.from_dict({"image": pixels}, features=features)
        table.to_parquet(tmp_path / "data" / f"train-{number:05}-of-00004.parquet")

    def counts(sample, **more):
        config = dataclasses.replace(options, **more)
        images = load_real_images(config, sample=Sample(sample, 1000), streaming=True).train.images
        return images[:, 0, 0, 0].bincount(minlength=4).tolist()

    assert counts(8) == [2, 2, 2, 2] and counts(100) == [10, 10, 10, 10]
    assert counts(6) == [2, 2, 1, 1] and sum(counts(3)) == 3 and max(counts(3)) == 1
    assert counts(8, max_train_samples=15) == [8, 0, 0, 0] and counts(20, max_train_samples=15) == [10, 5, 0, 0]
    one = datasets.load_dataset("parquet", data_files=str(tmp_path / "data" / "*.parquet"), split="train")
    (tmp_path / "one").mkdir()
    one.to_parquet(tmp_path / "one" / "train.parquet", batch_size=10)  # rows of a group of the file
    assert counts(8, dataset_name=str(tmp_path / "one")) == [2, 2, 2, 2]
    with pytest.raises(ValueError, match="captions are read from all rows, of which streaming reads some"):
        load_real_images(options, caption_column="text", streaming=True, sample=Sample(4))


def test_captions_of_both_splits_are_those_of_their_images(tmp_path, options):
    for split, count in (("train", 6), ("validation", 3)):
        rows = {"image": pictures(count, (8, 8)), "text": [f"{split} {index}" for index in range(count)]}
        if split == "train":
            rows["image"][4] = None  # which cannot be decoded
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        (tmp_path / "data").mkdir(exist_ok=True)
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(tmp_path / "data" / f"{split}.parquet")
    real = load_real_images(dataclasses.replace(options, max_bad_share=0.5), caption_column="text")
    assert real.train_captions.texts == tuple(f"train {index}" for index in (0, 1, 2, 3, 5))
    assert real.held_out_captions.texts == tuple(f"validation {index}" for index in range(3))
    assert real.captions is real.held_out_captions and len(real.train) == 5


def test_quick_features_take_as_many_steps_as_fit(monkeypatch):
    real = load_real_images(DataConfig(dataset_name="digits", max_train_samples=64))
    taken = []

    def fit(train, num_steps, **settings):
        taken.append(num_steps)
        return num_steps

    clock = iter(range(0, 1000, 2))  # a call of the clock each 2 s: four steps take 2 s, and these take 6 s
    monkeypatch.setattr(feature_folders, "fit_feature_classifier", fit)
    monkeypatch.setattr(feature_folders.time, "perf_counter", lambda: next(clock))
    model, about = feature_folders.quick_features(real, 200)
    assert taken == [4, 4, 388] and model == 388 == about["num_steps"] and about["by_label"]
    assert feature_folders.quick_features(real, 5000)[0] == 400
    assert feature_folders.quick_features(real, 100) is None and taken[-1] == 4
    unlabelled = dataclasses.replace(real, train=LabelledImages(real.train.images, torch.full([64], -1), []))
    monkeypatch.setattr(feature_folders, "fit_features_without_labels", fit)
    model, about = feature_folders.quick_features(unlabelled, 100)
    assert model == 188 == about["num_steps"] and not about["by_label"]
    few = dataclasses.replace(real, train=real.train.take(torch.arange(3)))
    assert feature_folders.quick_features(few, 1000) is None


def test_steps_of_the_training_are_counted_over_epochs():
    train = load_real_images(DataConfig(dataset_name="digits", max_train_samples=40)).train
    settings = {"batch_size": 16, "show_progress": False}
    by_steps = fit_feature_classifier(train, num_steps=6, **settings)
    by_epochs = fit_feature_classifier(train, num_epochs=3, **settings)  # of two steps
    others = fit_feature_classifier(train, num_steps=5, **settings)
    weights, same, fewer = (model.classifier.weight for model in (by_epochs, by_steps, others))
    assert torch.equal(weights, same) and not torch.equal(weights, fewer)
