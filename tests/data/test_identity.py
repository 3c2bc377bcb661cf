"""A run goes on with the data that it began with: the contents, the order and the labels of images are compared."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from diffusers_ext.data.identity import IDENTITY_FILE, describe_change, identify
from diffusers_ext.data.prepare import prepare_images, prepare_stream
from runs import trainer


def fill(root, values, name="{}"):
    """A folder of two classes with a picture of each value, noise that the value draws."""
    for number, value in enumerate(values):
        path = root / ("cat", "dog")[number % 2] / name.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(value).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(path.with_suffix(".bmp"))  # all of one size
    return root


def prepare(root, **options):
    return prepare_images(str(root), cache_dir=str(root.parent / "cache"), **options)


def change(before, now):
    return describe_change(identify(before), identify(now))


@pytest.fixture
def root(tmp_path):
    return fill(tmp_path / "data", range(8))


def test_the_same_contents_are_the_same_data_wherever_and_whenever(root, tmp_path):
    before = identify(prepare(root))
    assert describe_change(before, identify(prepare(root))) is None
    for path in root.rglob("*.bmp"):
        os.utime(path, (1, 1))
    assert describe_change(before, identify(prepare(root))) is None
    shutil.move(root, tmp_path / "elsewhere")
    assert describe_change(before, identify(prepare(tmp_path / "elsewhere"))) is None


def test_other_decoding_is_not_other_data(root):
    assert change(prepare(root), prepare(root, resolution=(4,))) is None


def test_a_replaced_image_of_the_same_name_and_size_is_seen(root):
    before = prepare(root)
    fill(root, [0, 1, 2, 99])
    assert change(before, prepare(root)) == (
        "the contents of images were replaced, the first of them among the images 5 to 5"
    )


def test_images_that_change_places_are_seen(root):
    before = prepare(root)
    os.rename(root / "cat/0.bmp", root / "cat/9.bmp")
    now = prepare(root)
    assert change(before, now) == "the images are in another order, the first of them among the images 0 to 0"


def test_labels_that_are_renamed_reordered_added_or_given_to_others_are_named(root):
    before = prepare(root)
    os.rename(root / "dog", root / "doggy")
    assert change(before, prepare(root)) == "its labels have other names: label 1 was 'dog', and is 'doggy'"
    os.rename(root / "doggy", root / "dog")
    fill(root / "fox", [7])
    assert change(before, prepare(root)) == "it had 8 images, and has 9"
    shutil.rmtree(root / "fox")
    swapped = dataclasses.replace(before, id2label={0: "dog", 1: "cat"})
    assert change(before, swapped) == "its labels are in another order: label 0 was 'cat', and is 'dog'"
    more = dataclasses.replace(before, id2label={0: "cat", 1: "dog", 2: "fox"})
    assert change(before, more) == "it had 2 labels, and has 3 (with fox)"
    assert change(before, prepare(root, unconditional=True)) == "it had 2 labels, and has no"
    other = dataclasses.replace(before, labels=before.labels[::-1].copy())
    assert change(before, other) == "images have other labels than they had"
    many = dataclasses.replace(before, id2label={number: f"caption {number}" for number in range(2000)})
    renamed = dataclasses.replace(many, id2label=many.id2label | {7: "another"})
    assert change(many, renamed) == "some of its 2000 labels have other names, or another order"
    assert change(many, many) is None


@pytest.mark.parametrize("resize_mode", ["crop", "random_crop"])
def test_rows_of_a_table_have_the_digests_of_their_own_pictures(root, resize_mode):
    data = prepare(root, resize_mode=resize_mode, resolution=(4,))
    some = prepare(root, resize_mode=resize_mode, resolution=(4,), max_samples=4)
    assert (some.digests() == data.digests()[some.rows]).all()
    assert len(np.unique(data.digests(), axis=0)) == 8


@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_a_stream_is_known_by_its_labels_its_first_images_and_its_files(tmp_path, form):
    root = fill(tmp_path / "data", range(200))

    def stream():
        if form == "folder":
            return prepare_stream(str(root))
        cells = [path.read_bytes() for path in sorted(root.rglob("*.bmp"))]
        rows = pd.DataFrame({"image": cells, "label": [number % 2 for number in range(200)]})
        (tmp_path / "rows").mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / "rows" / "train.parquet")
        return prepare_stream(str(tmp_path / "rows"), label_names=["0", "1"])

    before = stream()
    assert change(before, stream()) is None
    fill(root, [*range(199), 1000])  # one that is not among the first
    assert change(before, stream()) == "the contents of images were replaced"


def test_a_run_goes_on_with_its_own_data_only(root, tmp_path, capsys):
    settings = {"checkpointing_steps": 2, "max_train_steps": 2}
    run = trainer(prepare(root), tmp_path / "run", **settings)
    run.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    more = settings | {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    trainer(prepare(root), tmp_path / "run", **more).train()
    fill(root, [0, 1, 2, 99])
    with pytest.raises(
        ValueError, match="checkpoint-2 is of a run on other data .*images were replaced.* --output_dir"
    ):
        trainer(prepare(root), tmp_path / "copy", **more).train()
    # A checkpoint from before identities were kept.
    manifest = (tmp_path / "copy" / checkpoint.name / "manifest.json").read_text()
    assert IDENTITY_FILE in manifest
    (tmp_path / "copy" / checkpoint.name / IDENTITY_FILE).unlink()
    content = json.loads(manifest)
    del content["files"][IDENTITY_FILE]
    (tmp_path / "copy" / checkpoint.name / "manifest.json").write_text(json.dumps(content))
    trainer(prepare(root), tmp_path / "copy", **more).train()
    assert f"has no {IDENTITY_FILE}: it is not known whether the data are those of the run" in capsys.readouterr().out
