"""Images in a folder: the same whatever the batch size, labels in turn, with what is known of each."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, LDMPipeline, VQModel
from PIL import Image

from diffusers_ext import ExtDDIMScheduler, GuidedDiffusionPipeline, TextGuidedDiffusionPipeline
from diffusers_ext.commands.sample import SampleConfig, label_id, main, to_picture
from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.draws import between_draws
from diffusers_ext.evaluation.animation import interpolation_frames
from diffusers_ext.evaluation.generate import generate_images
from diffusers_ext.evaluation.subject import load_pipeline
from diffusers_ext.figures import check_animation_format, labelled_grid
from processes import in_ranks
from tiny import tiny_stock_unet, tiny_unet
from tiny_text import tiny_clip, tiny_text_unet, tiny_tokenizer


QUICK = {"num_threads": 1, "mixed_precision": "no", "num_inference_steps": 3}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline of three labels, one of texts, and one of diffusers without either."""
    root, schedule = tmp_path_factory.mktemp("pipelines"), ExtDDIMScheduler(timestep_spacing="trailing")
    torch.manual_seed(0)
    names = {0: "cat", 1: "dog", 2: "7"}
    GuidedDiffusionPipeline(tiny_unet(num_classes=3), schedule, id2label=names).save_pretrained(root / "labels")
    tokenizer = tiny_tokenizer()
    parts = {"tokenizer": tokenizer, "text_encoder": tiny_clip(tokenizer)}
    TextGuidedDiffusionPipeline(tiny_text_unet(), schedule, **parts).save_pretrained(root / "texts")
    DDPMPipeline(tiny_stock_unet(), DDPMScheduler()).save_pretrained(root / "stock")
    return root


@pytest.fixture(scope="module")
def made(saved, tmp_path_factory):
    """The folder of a call with all that there is."""
    folder = tmp_path_factory.mktemp("made") / "samples"
    asked = {"class_labels": ("dog", "cat"), "num_images": 5, "batch_size": 2, "seed": 3, "upscale": 3}
    animated = {"denoising": "gif", "interpolation": "gif", "num_animated": 2}
    return main(SampleConfig(str(saved / "labels"), output_dir=str(folder), **asked, **animated, **QUICK))


def read(folder, name):
    return np.asarray(Image.open(folder / "images" / name))


def records(folder):
    return [json.loads(line) for line in (folder / "images" / "metadata.jsonl").read_text().splitlines()]


def test_a_folder_without_a_whole_pipeline_is_answered_in_a_sentence(saved, tmp_path):
    for folder, message in (
        (saved, "must hold a pipeline, but has no model_index.json: give the folder of a run"),
        (saved / "labels" / "denoiser", f"but has no model_index.json: {saved / 'labels'} has one"),
    ):
        with pytest.raises(ValueError, match=message):
            load_pipeline(str(folder))
    broken = shutil.copytree(saved / "labels", tmp_path / "broken")
    next(Path(broken, "denoiser").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="broken must hold a whole pipeline, which cannot be loaded: .*denoiser"):
        load_pipeline(str(broken))


def test_each_image_has_its_label_and_the_seed_that_makes_it_again(made, saved):
    known = records(made)
    assert [each["label"] for each in known] == ["dog", "cat", "dog", "cat", "dog"]
    assert [each["seed"] for each in known] == [3_000_000 + i for i in range(5)]
    assert [each["file_name"] for each in known][:2] == ["dog/00000.png", "cat/00001.png"]
    pipe = GuidedDiffusionPipeline.from_pretrained(saved / "labels")
    generator = torch.Generator().manual_seed(known[3]["seed"])
    image = pipe(class_labels="cat", num_inference_steps=3, generator=[generator]).images[0]
    shown = read(made, known[3]["file_name"])[1::3, 1::3]
    assert np.abs(shown.astype(int) - np.asarray(image).astype(int)).max() <= 1  # another batch's rounding


def test_images_do_not_depend_on_the_batch_size(made, saved, tmp_path):
    config = SampleConfig(
        str(saved / "labels"), class_labels=("dog", "cat"), num_images=5, batch_size=5, seed=3, **QUICK
    )
    images = generate_images(
        GuidedDiffusionPipeline.from_pretrained(saved / "labels"),
        range(5),
        labels=[1, 0, 1, 0, 1],
        settings=config.settings,
        batch_size=5,
        seed=3,
    )
    for image, each in zip(images, records(made), strict=True):
        here = np.asarray(to_picture(image, 3, "png"))
        assert (
            np.abs(here.astype(int) - read(made, each["file_name"]).astype(int)).max() <= 1
        )  # kernels differ by batch


def test_two_processes_make_the_images_of_one(made, saved, tmp_path):
    asked = {"class_labels": ("dog", "cat"), "num_images": 5, "batch_size": 2, "seed": 3, "upscale": 3}
    config = SampleConfig(str(saved / "labels"), output_dir=str(tmp_path / "two"), **asked, **QUICK)
    assert in_ranks(lambda: main(config)).count("5 images in") == 1
    assert records(tmp_path / "two") == records(made) and (tmp_path / "two" / "grid.png").is_file()
    for each in records(made):
        here, there = (read(folder, each["file_name"]).astype(int) for folder in (tmp_path / "two", made))
        assert np.abs(here - there).max() <= 1  # kernels differ by batch


def test_a_pixel_is_enlarged_as_a_square():
    image = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    large = np.asarray(to_picture(image, 2, "png"))
    assert (large == image.permute(1, 2, 0).numpy().repeat(2, axis=0).repeat(2, axis=1)).all()
    assert to_picture(image[:1], 1, "jpg").mode == "L"
    with pytest.raises(ValueError, match="jpg holds images of 1, 3 channels, got 4"):
        to_picture(torch.zeros(4, 2, 2, dtype=torch.uint8), 1, "jpg")


def test_the_folder_is_a_data_set_of_its_labels(made):
    data = prepare_images(str(made / "images"))
    assert len(data) == 5 and data.id2label == {0: "cat", 1: "dog"}


def test_the_animations_have_a_frame_for_each_step_and_for_each_share_of_the_way(made):
    with Image.open(made / "denoising.gif") as denoising, Image.open(made / "interpolation.gif") as interpolation:
        assert denoising.n_frames == 3 and denoising.info["loop"] == 0
        assert interpolation.n_frames <= 24  # equal ones are one, which stays longer
        size = denoising.size
    with Image.open(made / "grid.png") as grid:
        assert min(grid.size) > 100 and min(size) > 100


def test_an_interpolation_goes_through_the_images_of_its_seeds(saved):
    pipe = GuidedDiffusionPipeline.from_pretrained(saved / "labels")
    pipe.set_progress_bar_config(disable=True)
    frames = interpolation_frames(pipe, [5, 6], label=1, num_between=1, num_inference_steps=2)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    images = pipe(class_labels=1, batch_size=2, num_inference_steps=2, generator=generators, output_type="pt").images
    for frame, image in zip(frames[::2], images, strict=True):
        expected = np.asarray(labelled_grid([image[None]])).astype(int)
        assert np.abs(expected - np.asarray(frame).astype(int)).max() <= 1  # another batch's rounding
    assert len(frames) == 4


def test_noise_between_two_draws_has_their_norm_and_ends_at_them():
    first, second = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    for share in (0.0, 0.3, 1.0):
        angle = torch.tensor(share * torch.pi / 2)
        assert torch.allclose(
            between_draws(first, second, share), 2 * torch.stack([angle.cos(), angle.sin()]), atol=1e-6
        )
    first, second = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    assert abs(between_draws(first, second, 0.5).norm() / first.norm() - 1) < 0.05  # the line's middle has 0.7 of it
    assert torch.allclose(between_draws(first, first, 0.5), first)


def test_texts_and_a_pipeline_of_diffusers_are_sampled_too(saved, tmp_path):
    texts = SampleConfig(
        str(saved / "texts"), prompts=("red dot",), num_images=2, output_dir=str(tmp_path / "t"), **QUICK
    )
    assert [each["text"] for each in records(main(texts))] == ["red dot"] * 2
    stock = SampleConfig(
        str(saved / "stock"), num_images=2, image_format="jpg", output_dir=str(tmp_path / "s"), **QUICK
    )
    assert sorted(path.name for path in (main(stock) / "images").iterdir()) == [
        "00000.jpg",
        "00001.jpg",
        "metadata.jsonl",
    ]
    record = json.loads((tmp_path / "s" / "sampling.json").read_text())
    assert record["pipeline_class"] == "DDPMPipeline" and record["num_inference_steps"] == 3


@pytest.mark.parametrize(
    "pipeline, options, message",
    [
        ("labels", {"class_labels": ("cow",)}, r"class_labels must be among the 3 of the model \(cat, dog, 7\)"),
        ("labels", {"prompts": ("cat",)}, "takes no texts: leave prompts out"),
        ("texts", {}, "makes images from texts: give --prompts TEXT"),
        ("stock", {"class_labels": ("1",)}, "takes no labels: leave class_labels out"),
        ("stock", {"denoising": "gif"}, "animations are of pipelines of this package, got a DDPMPipeline"),
    ],
)
def test_what_a_pipeline_cannot_make_is_refused_before_anything_is_written(
    saved, tmp_path, pipeline, options, message
):
    folder = tmp_path / "none"
    with pytest.raises(ValueError, match=message):
        main(SampleConfig(str(saved / pipeline), output_dir=str(folder), **options, **QUICK))
    assert not folder.exists()


def test_a_folder_is_replaced_if_this_command_has_made_it_and_is_asked_to(made, saved, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "thesis.tex").write_text("years of work")
    config = {"num_images": 1, "output_dir": str(tmp_path), **QUICK}
    with pytest.raises(ValueError, match="is not empty: give another one, or --overwrite_output_dir"):
        main(SampleConfig(str(saved / "labels"), **config))
    with pytest.raises(ValueError, match="holds nothing that this command has saved, and is left as it is"):
        main(SampleConfig(str(saved / "labels"), overwrite_output_dir=True, **config))
    assert (tmp_path / "images" / "thesis.tex").read_text() == "years of work"
    again = SampleConfig(
        str(saved / "labels"), overwrite_output_dir=True, num_images=1, output_dir=str(tmp_path / "new"), **QUICK
    )
    assert main(again) == main(again) and len(records(tmp_path / "new")) == 1


@pytest.mark.parametrize(
    "pipeline, options, message",
    [
        ("stock", {"guidance_scale": 2.0}, "DDPMPipeline takes no guidance_scale: leave what says it out"),
        ("labels", {"num_inference_steps": 5000}, "num_inference_steps must be .* got 5000"),
    ],
)
def test_what_a_call_refuses_leaves_the_images_that_were_there(saved, tmp_path, pipeline, options, message):
    config = {"num_images": 2, "output_dir": str(tmp_path / "new"), **QUICK}
    before = {path: path.read_bytes() for path in main(SampleConfig(str(saved / pipeline), **config)).rglob("*.*")}
    with pytest.raises(ValueError, match=message):
        main(SampleConfig(str(saved / pipeline), overwrite_output_dir=True, **(config | options)))
    assert before == {path: path.read_bytes() for path in (tmp_path / "new").rglob("*.*")}


def test_the_record_says_what_guided_a_call_that_did_not(saved, tmp_path):
    pipe = GuidedDiffusionPipeline.from_pretrained(saved / "labels")
    chosen = {"guidance_scale": 3.0, "guidance_interval": {"sigma": [0.1, 2.0]}}
    pipe.register_to_config(call_defaults=chosen)
    pipe.save_pretrained(tmp_path / "chosen")
    for scale, expected in ((None, chosen), (2.0, {"guidance_scale": 2.0, "guidance_interval": None})):
        folder = tmp_path / f"images {scale}"
        main(
            SampleConfig(str(tmp_path / "chosen"), guidance_scale=scale, num_images=1, output_dir=str(folder), **QUICK)
        )
        record = json.loads((folder / "sampling.json").read_text())
        assert {name: record[name] for name in expected} == expected


def test_a_pipeline_whose_images_cannot_be_in_bf16_is_sampled_in_float32(tmp_path):
    """`LDMPipeline` hands its autoencoder's output to numpy as it is."""
    vqvae = VQModel(3, 3, block_out_channels=(8, 8), latent_channels=3, num_vq_embeddings=8, norm_num_groups=4)
    unet = tiny_stock_unet(in_channels=3, out_channels=3)
    LDMPipeline(vqvae, unet, DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "ldm")
    options = {"num_threads": 1, "num_inference_steps": 2, "num_images": 1}
    folder = main(SampleConfig(str(tmp_path / "ldm"), output_dir=str(tmp_path / "images"), **options))
    assert json.loads((folder / "sampling.json").read_text())["mixed_precision"] == "no"
    with pytest.raises(ValueError, match="mixed_precision must be no for LDMPipeline"):
        main(SampleConfig(str(tmp_path / "ldm"), output_dir=str(tmp_path / "n"), mixed_precision="bf16", **options))


def test_a_label_is_its_name_before_it_is_a_number():
    assert label_id("7", ["cat", "dog", "7"]) == 2 and label_id("1", ["cat", "dog", "7"]) == 1
    with pytest.raises(ValueError, match="got 3"):
        label_id("3", ["cat", "dog", "7"])


def test_a_film_needs_what_writes_it(monkeypatch):
    monkeypatch.setattr("diffusers_ext.figures.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"mp4 needs imageio with ffmpeg \(pip install 'imageio\[ffmpeg\]'\)"):
        check_animation_format("mp4")
    check_animation_format("gif")
