"""Real runs on streams: the loop with a small network, and the script with two processes."""

import dataclasses
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from diffusers_ext import DiffusionPipeline
from diffusers_ext.data.prepare import prepare_data, prepare_stream
from diffusers_ext.trainer.config import TrainerConfig
from diffusers_ext.trainer.run_folder import read_metrics
from processes import in_ranks
from runs import assert_same_run, metrics, stop_before_step, trainer
from training.train_ddpm import TrainConfig, main


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """60 pictures of 8x8 with labels 0, 1, 2 in four tars, and 12 others in a tar of the split `validation`."""
    folder, random = tmp_path_factory.mktemp("tars"), np.random.default_rng(0)
    for name, count in (*((f"train-{shard}", 15) for shard in range(4)), ("validation-0", 12)):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for number in range(count):
                png = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(png, "PNG")
                for extension, content in (("png", png.getvalue()), ("cls", str(number % 3).encode())):
                    entry = tarfile.TarInfo(f"{name}-{number:03}.{extension}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return str(folder)


@pytest.mark.parametrize("num_workers, accumulation", [(0, 3), (2, 1)])
def test_a_resumed_run_on_a_stream_is_the_undisturbed_one_bit_for_bit(tars, tmp_path, num_workers, accumulation):
    """Stopped at step 10 and resumed at step 7, in a window; 12 steps of 3 x 4 images are more than two passes."""
    data = prepare_stream(tars, label_names=["a", "b", "c"], shuffle_buffer=10)
    settings = {
        "gradient_accumulation_steps": accumulation,
        "dataloader_num_workers": num_workers,
        "checkpointing_steps": 7,
    }
    trainer(data, tmp_path / "whole", **settings).train()
    stop_before_step(trainer(data, tmp_path / "parts", **settings), 10)
    trainer(data, tmp_path / "parts", resume_from_checkpoint="latest", **settings).train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 12)
    states = [json.loads((tmp_path / run / "checkpoint-12/stream-0.json").read_text()) for run in ("whole", "parts")]
    assert states[0] == states[1]
    passes = 12 * accumulation * 4 // 60
    assert metrics(tmp_path / "whole")[-1]["epoch"] == passes


def test_processes_train_on_tars_and_go_on_only_together(tars, tmp_path):
    """The script with two processes of one worker each, with held-out images, crops at random and flips."""
    config = TrainConfig(
        dataset_name=tars,
        streaming=True,
        shuffle_buffer=10,
        num_classes=3,
        resize_mode="random_crop",
        random_flip=True,
        resolution=(8, 4),
        dataloader_num_workers=1,
        validation_split="validation",
        max_validation_samples=10,
        block_out_channels=(8, 16),
        layers_per_block=1,
        train_batch_size=5,
        max_train_steps=8,
        logging_steps=2,
        num_inference_steps=2,
        sample_columns=2,
        num_threads=1,
        output_dir=str(tmp_path / "run"),
    )
    output = in_ranks(lambda: main(config))
    assert f"{tars}, split train: a stream of images, 8x4 grey, 3 labels" in output
    assert "8x8 images are scaled to cover 8x4 and cropped to it at random places" in output
    assert "the loss is taken on 10 images of the split validation too" in output
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # Each process has two of the four tars, 30 images: 8 batches of 5 are one pass and 10 images.
    assert [(record["images"], record["epoch"]) for record in records] == [(20, 0), (40, 0), (60, 0), (80, 1)]
    assert records[-1]["val_loss"] > 0
    checkpoint = tmp_path / "run" / "checkpoint-8"
    states = [json.loads((checkpoint / f"stream-{process}.json").read_text()) for process in range(2)]
    assert [state["readers"][0]["good"] for state in states] == [10, 10]
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert tuple(pipeline.denoiser.config.sample_size) == (8, 4) and pipeline.denoiser.config.num_classes == 3

    config = dataclasses.replace(config, max_train_steps=9, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="of a stream with 2 processes, got 1: .* give 2, or start a new run"):
        main(config)


def test_held_out_images_of_a_stream_are_the_first_ones_read_ahead(tars):
    settings = {"dataset_name": tars, "dataset_split": "validation", "num_classes": 3}
    ahead = prepare_data(TrainerConfig(streaming=True, max_train_samples=10, **settings), read_ahead=True)
    table = prepare_data(TrainerConfig(**settings))
    assert "of the split validation, which is read as a stream, these are the first 10 images" in ahead.notes
    np.testing.assert_array_equal(ahead.pixels[range(10)], table.pixels[range(10)])
    assert ahead.labels.tolist() == table.labels[:10].tolist() == [0, 1, 2] * 3 + [0]
    assert ahead.id2label == {0: "0", 1: "1", 2: "2"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"shuffle_buffer": 10}, "shuffle_buffer has no meaning without streaming"),
        ({"streaming": True, "shuffle_buffer": 0}, "shuffle_buffer must be at least 1, got 0"),
        ({"streaming": True, "preprocessing_num_workers": 2}, "streaming decodes nothing beforehand"),
        (
            {"streaming": True, "validation_split": "test"},
            "validation_split with streaming needs max_validation_samples",
        ),
        ({"num_classes": 3, "label_names": ("a", "b")}, "must be the number of label_names, got 3 and 2"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"label_names": ("a", "a")}, "label_names must be different names, got a a"),
        ({"num_classes": 3, "unconditional": True}, "have no meaning with unconditional"),
    ],
)
def test_options_of_data_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**settings)
