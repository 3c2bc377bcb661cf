"""The whole command on tiny networks, with a feature classifier of random weights, and as the last stage of a run."""

import json
import re

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import diffusers_ext
from calibrations import make_little
from diffusers_ext import ExtDDIMScheduler, ExtDDPMScheduler, FlowScheduler, GuidedDiffusionPipeline
from diffusers_ext.calibration.run import forget_calibration
from diffusers_ext.calibration.subject import Subject
from diffusers_ext.evaluation.feature_folders import FEATURES_FILE
from diffusers_ext.evaluation.pipeline_facts import default_of
from diffusers_ext.hub.cards import write_card
from diffusers_ext.metrics.features import FeatureClassifierModel
from diffusers_ext.recipes import calibration as recipe
from processes import in_ranks
from tiny import assert_same_output, tiny_unet
from training import calibrate, train_ddpm


pytestmark = pytest.mark.filterwarnings("ignore:the Fréchet distance of 128 features is unreliable")
LABELS = ["cat", "dog"]


@pytest.fixture(autouse=True, scope="module")
def little():
    with pytest.MonkeyPatch.context() as patch:
        make_little(patch)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline, images by label in a training and a test split, and features of them."""
    folder = tmp_path_factory.mktemp("calibrate")
    pixels = np.random.default_rng(0)
    for split, number in (("train", 16), ("test", 4)):
        for index, label in enumerate(LABELS):
            (folder / "data" / split / label).mkdir(parents=True)
            for i in range(number):
                picture = pixels.integers(60 + 100 * index, size=(8, 8)).astype(np.uint8)
                Image.fromarray(picture).save(folder / "data" / split / label / f"{i}.png")
                if split == "train":
                    (folder / "plain").mkdir(exist_ok=True)
                    Image.fromarray(picture).save(folder / "plain" / f"{label}{i}.png")
    scheduler = ExtDDIMScheduler(timestep_spacing="trailing", num_train_timesteps=40, beta_reference_timesteps=1000)
    pipe = GuidedDiffusionPipeline(tiny_unet(num_classes=2), scheduler, id2label=dict(enumerate(LABELS)))
    pipe.save_pretrained(folder / "pipe")
    write_card(folder / "pipe", data="Noise.")
    torch.manual_seed(1)
    features = FeatureClassifierModel(8, 1, 2, label_names=LABELS)
    features.save_pretrained(folder / "features")
    about = {"dataset_name": "data", "num_train_images": 32, "num_held_out_images": 8, "held_out_accuracy": 0.5}
    (folder / "features" / FEATURES_FILE).write_text(json.dumps(about))
    return folder


def command(folders, *more):
    return calibrate.parse(
        [
            *(str(folders / "pipe"), "--dataset_name", str(folders / "data"), "--features", str(folders / "features")),
            *(
                "--max_time",
                "1s",
                "--num_inference_steps",
                "4",
                "--num_threads",
                "1",
                "--mixed_precision",
                "no",
                *more,
            ),
        ]
    )


@pytest.fixture(scope="module")
def calibrated(folders):
    found = calibrate.main(command(folders, "--output_dir", str(folders / "out")))
    return folders / "out", found


def images(pipe, **call):
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return pipe(class_labels=[0, 1], generator=generator, output_type="pt", **call).images


def test_what_was_chosen_is_what_a_plain_call_does(calibrated):
    folder, found = calibrated
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    config = pipe.scheduler.config
    chosen = config.optimal_timesteps["trajectory"]["4"]
    assert pipe.config.call_defaults == found["call_defaults"] and default_of(pipe, "num_inference_steps") == 4
    assert config.variance_type == "analytic" and config.timestep_spacing == "trailing"
    assert config.multistep_order == found["steps"]["chosen"]["order"]
    own = ExtDDIMScheduler.from_config(config, optimal_timesteps=None).list_timesteps(4).tolist()
    assert found["steps"]["chosen"]["timesteps"] == "trajectory" or chosen == own
    expected = images(
        pipe, timesteps=chosen, **{n: v for n, v in found["call_defaults"].items() if n != "num_inference_steps"}
    )
    assert torch.equal(images(pipe), expected)
    pipe.save_pretrained(folder / "again")
    assert_same_output(images(diffusers.DiffusionPipeline.from_pretrained(folder / "again")), expected)


def test_figures_and_card_say_what_was_found(folders, calibrated):
    folder, found = calibrated
    saved = json.loads((folder / "calibration.json").read_text())
    assert saved["gained"] == found["gained"] and saved["guidance"]["tried"][0]["scale"] == 1
    assert {"before", "after", "num_images", "num_inference_steps"} <= saved["gained"][0].keys()
    tried = {(each["order"], each["timesteps"]) for each in found["steps"]["tried"]}
    assert {(1, "spacing"), (2, "spacing")} <= tried and any("ways to make 4 steps" in line for line in saved["lines"])
    assert saved["lines"] and (folder / "calibration.png").stat().st_size > 1000
    again = calibrate.main(command(folders))  # in place, where there is a card
    card = (folders / "pipe" / "README.md").read_text()
    assert card.count("## Calibration") == 1 and card.index("## Calibration") < card.index("## Limitations")
    assert again["analytic_variance"] == found["analytic_variance"]
    calibrate.main(command(folders, "--seed", "1"))
    card = (folders / "pipe" / "README.md").read_text()
    assert card.count("## Calibration") == 1 and "--seed 1" in card


def test_calibrating_again_starts_from_what_the_training_left(calibrated):
    folder, _ = calibrated
    subject = Subject.of(diffusers_ext.DiffusionPipeline.from_pretrained(folder), 4)
    subject.choose(multistep_order=2)
    forget_calibration(subject)
    config = subject.pipe.scheduler.config
    assert config.analytic_variance is None and config.optimal_timesteps is None and config.variance_type is None
    assert subject.pipe.config.call_defaults is None and config.timestep_spacing == "trailing"
    assert config.multistep_order == 1


def test_a_pipeline_of_diffusers_gets_a_scheduler_that_swaps_in(folders, tmp_path):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = diffusers.UNet2DModel(8, 1, 1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, **blocks)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=40, beta_end=0.3)).save_pretrained(
        tmp_path / "in"
    )
    options = calibrate.parse(
        [
            *(str(tmp_path / "in"), "--dataset_name", str(folders / "data"), "--features", str(folders / "features")),
            *("--max_time", "1s", "--num_inference_steps", "3", "--output_dir", str(tmp_path / "out")),
            *("--num_threads", "1"),
        ]
    )
    found = calibrate.main(options)
    assert "guidance" not in found and found["gained"]
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe) is diffusers.DDPMPipeline and type(pipe.scheduler) is ExtDDPMScheduler
    pipe.set_progress_bar_config(disable=True)
    assert np.isfinite(pipe(num_inference_steps=3, output_type="np").images).all()
    assert pipe.scheduler.timesteps.tolist() == pipe.scheduler.config.optimal_timesteps["trajectory"]["3"]
    stock = diffusers.DDPMScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    stock.set_timesteps(3)
    assert len(stock.timesteps) == 3


def test_two_processes_choose_alike_and_make_the_images_of_one(folders, calibrated, tmp_path):
    output = in_ranks(lambda: calibrate.main(command(folders, "--output_dir", str(tmp_path / "out"))))
    assert output.count("saved in") == 1
    two = json.loads((tmp_path / "out" / "calibration.json").read_text())
    mine, theirs = (found["gained"][0]["before"]["frechet_distance"] for found in (two, calibrated[1]))
    assert mine == pytest.approx(theirs, rel=1e-3)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipe.config.call_defaults == two["call_defaults"] and images(pipe).isfinite().all()


def test_a_run_ends_calibrated_if_it_is_long_or_asked_to(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recipe, "quick_features", lambda real, seconds: None)  # for want of time
    settings = {
        "dataset_name": str(folders / "plain"),  # no labels, for a classifier that is trained in a moment
        "output_dir": str(tmp_path / "run"),
        "num_train_timesteps": 20,
        "max_train_steps": 2,
        "train_batch_size": 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "num_inference_steps": 2,
        "sample_columns": 2,
        "num_threads": 1,
    }
    folder = train_ddpm.main(train_ddpm.TrainConfig(**settings, calibrate=True))
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert pipe.scheduler.config.variance_type == "analytic" and pipe.config.call_defaults == {
        "num_inference_steps": 2
    }
    assert "there is no network of features" in (folder / "README.md").read_text()
    linear = settings | {"path": "linear", "output_dir": str(tmp_path / "linear"), "calibrate": True}
    output = in_ranks(lambda: train_ddpm.main(train_ddpm.TrainConfig(**linear)))
    assert output.count("calibrating for") == 1
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "linear")
    assert type(pipe.scheduler) is FlowScheduler
    own = FlowScheduler.from_config(pipe.scheduler.config, optimal_timesteps=None)
    own.set_timesteps(2)  # what was not compared is not chosen
    assert pipe.scheduler.config.optimal_timesteps["trajectory"]["2"] == own.timesteps.round().long().tolist()
    assert pipe.config.call_defaults == {"num_inference_steps": 2}
    folder = train_ddpm.main(train_ddpm.TrainConfig(**settings, overwrite_output_dir=True))
    assert (
        diffusers.DiffusionPipeline.from_pretrained(folder).config.call_defaults is None
    )  # too short for it by default
    assert not (folder / "calibration.json").exists()
    capsys.readouterr()
    train_ddpm.main(train_ddpm.TrainConfig(**settings, overwrite_output_dir=True, max_train_time="1000"))
    trained = re.search(r"(\d+) s of the 1000 s are for the training", capsys.readouterr().out)
    assert 800 < int(trained[1]) < 900  # a tenth is kept for the calibration
    assert (folder / "calibration.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say what to calibrate: training/calibrate.py PIPELINE"),
        (["a/name"], "a/name is no folder here: say by --output_dir where the pipeline is to be saved"),
        ([".", "--max_time", "soon"], "a duration must look like 600 .*, got 'soon'"),
        ([".", "--num_inference_steps", "0"], "num_inference_steps must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(options, message, capsys):
    with pytest.raises((ValueError, SystemExit)) as error:
        calibrate.parse(options)
    assert re.search(message, str(error.value) + capsys.readouterr().err.replace("\n", " "))
