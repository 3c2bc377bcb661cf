"""The whole command on tiny networks, with a feature classifier of random weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext import ExtDDIMScheduler, GuidedDiffusionPipeline, NoisyClassifierModel, UNetModel
from diffusers_ext.evaluation.feature_folders import FEATURES_FILE
from diffusers_ext.evaluation.guidance_comparison import GuidanceOptions, call_settings
from diffusers_ext.evaluation.guidance_results import saved_share
from diffusers_ext.evaluation.network_calls import counted_calls
from diffusers_ext.metrics.features import FeatureClassifierModel
from diffusers_ext.schedulers.levels import describe_path
from processes import in_ranks
from training import compare_guidance, evaluate


STEPS = 5
OF_DATA = "dataset_name: digits\nresolution: [8, 8]\nmax_train_samples: 150\n"  # what a run says of its data
pytestmark = pytest.mark.filterwarnings("ignore:the Fréchet distance of 128 features is unreliable")


def randomized(model, seed):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def unet(seed, num_classes=10):
    model = UNetModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        num_classes=num_classes,
    )
    return randomized(model, seed)


def scheduler(**config):
    return ExtDDIMScheduler(
        timestep_spacing="trailing", beta_schedule="cosine", prediction_type="v_prediction", **config
    )


def classifier(**config):
    model = NoisyClassifierModel(8, 1, 10, (8, 16), noise_schedule=describe_path(scheduler()), **config)
    return randomized(model, 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guidance")
    names = {label: str(label) for label in range(10)}
    for seed, name in enumerate(("run", "weak")):
        GuidedDiffusionPipeline(unet(seed), scheduler(), id2label=names).save_pretrained(folder / name)
    (folder / "run" / "train_config.yaml").write_text(OF_DATA)
    classifier().save_pretrained(folder / "classifier")
    torch.manual_seed(0)
    FeatureClassifierModel.for_images((1, 8, 8), list(names.values())).save_pretrained(folder / "features")
    (folder / "features" / FEATURES_FILE).write_text('{"held_out_accuracy": 0.1}\n')
    return folder


def arguments(folders, *more, output_dir):
    words = [folders / "run", "--features", folders / "features", "--num_images", 12, "--num_inference_steps", STEPS]
    words += ["--guidance_scales", 1, 3, "--mixed_precision", "no", "--num_threads", 1, *more]
    return [str(word) for word in (*words, "--output_dir", output_dir)]


def compare(folders, *more, output_dir):
    return compare_guidance.main(compare_guidance.parse(arguments(folders, *more, output_dir=output_dir)))


@pytest.fixture(scope="module")
def compared(folders):
    """All methods, with every network that they need."""
    with_networks = ("--weak_pipeline", folders / "weak", "--classifier", folders / "classifier")
    return compare(folders, *with_networks, output_dir=folders / "all")


def row_of(result, method, scale=3.0):
    (row,) = [r for r in result["results"] if (r["method"], r["guidance_scale"]) == (method, scale)]
    return row


@pytest.mark.parametrize(
    "method, scale, denoiser, weak, classifier",
    [
        ("none", 1.0, STEPS, 0, 0),
        ("cfg", 3.0, 2 * STEPS, 0, 0),
        ("cfg_interval", 3.0, STEPS + 3, 0, 0),  # steps 1, 2 and 3 of 5, from a share of 0.2 to one of 0.8
        ("cfg_rescale", 3.0, 2 * STEPS, 0, 0),
        ("apg", 3.0, 2 * STEPS, 0, 0),
        ("autoguidance", 3.0, STEPS, STEPS, 0),
        ("classifier", 3.0, STEPS, 0, STEPS),
    ],
)
def test_the_calls_of_each_network_are_counted(compared, method, scale, denoiser, weak, classifier):
    calls = row_of(compared, method, scale)["calls"]
    assert calls == {"denoiser": denoiser, "weak_denoiser": weak, "classifier": classifier}


def test_what_is_the_same_to_all_methods_is_made_once_and_shown_in_each_line(folders, compared):
    assert [row["guidance_scale"] for row in compared["results"]].count(1.0) == 1
    distances = [row["frechet_distance"] for row in compared["results"]]
    assert len(set(distances)) == len(distances) == 7  # no two methods are the same
    assert (folders / "all" / "guidance.png").stat().st_size > 10_000


def test_the_picture_shows_images_that_were_measured(folders, compared):
    """A row without guidance and one for each method, of which the first is made here by the pipeline itself."""
    picture = np.asarray(Image.open(folders / "all" / "guidance_samples.png").convert("L"))
    side, margin = 64, 2  # 8x8 images enlarged
    assert picture.shape[0] == 7 * (side + margin) + margin + 23
    pipe = GuidedDiffusionPipeline.from_pretrained(folders / "run")
    generators = [torch.Generator().manual_seed(i) for i in range(10)]
    images = pipe(list(range(10)), num_inference_steps=STEPS, generator=generators, output_type="np").images
    tile = (images[3, ..., 0] * 255).repeat(8, 0).repeat(8, 1)
    # Within one grey level: another batch size may have other kernels, whose rounding moves a value across a half.
    windows = np.lib.stride_tricks.sliding_window_view(picture[: 2 * side].astype(np.float32), (side, side))
    found = np.argwhere(np.abs(windows - tile).max((2, 3)) <= 1)
    assert len(found) == 1 and found[0][0] < side


def test_the_interval_says_what_it_saves(folders, compared):
    assert saved_share(compared["results"]) == pytest.approx(1 - (STEPS + 3) / (2 * STEPS))
    text = (folders / "all" / "guidance.md").read_text()
    assert "The interval saves 20.0% of the network calls of CFG; its least distance, " in text
    assert "| autoguidance | 3 | " in text and "| 5 + 5 weaker |" in text and "| 5 + 5 classifier |" in text
    assert text.count("| no guidance | 1 |") == 1 and "| held-out real images | |" in text


def test_the_measures_are_those_of_evaluate(folders, compared, tmp_path):
    words = [folders / "run", "--features", folders / "features", "--num_images", 12, "--num_inference_steps", STEPS]
    words += [
        "--guidance_scale",
        3,
        "--mixed_precision",
        "no",
        "--output_file",
        tmp_path / "evaluation.json",
        "--no-svc",
    ]
    result = evaluate.main(evaluate.parse([*map(str, words), "--no-pixel_metrics"]))
    row = row_of(compared, "cfg")
    assert result["generated"] == {name: row[name] for name in result["generated"]}
    assert result["held_out"] == compared["held_out"]


def test_a_command_that_was_stopped_goes_on(folders, tmp_path, capsys):
    whole = compare(folders, "--methods", "cfg", "apg", output_dir=tmp_path)
    path = tmp_path / "guidance.json"
    saved = json.loads(path.read_text())
    assert saved == whole
    marked = [row for row in saved["results"] if row["method"] != "apg"]
    marked[0]["label_accuracy"] = 0.125
    path.write_text(json.dumps(saved | {"results": marked}))
    capsys.readouterr()
    again = compare(folders, "--methods", "cfg", "apg", output_dir=tmp_path)
    assert row_of(again, "none", 1.0)["label_accuracy"] == 0.125  # not made again
    mine, theirs = (
        {name: value for name, value in row_of(result, "apg").items() if name != "seconds"}
        for result in (again, whole)
    )
    assert mine == theirs
    printed = capsys.readouterr().out
    assert f"CFG at 3 (2 of 3): in {path}" in printed and "APG at 3 (3 of 3)\n" in printed

    # Other options of a method make its sets anew, others of the sampler are refused.
    other = compare(folders, "--methods", "cfg", "apg", "--apg_eta", 1.0, output_dir=tmp_path)
    assert row_of(other, "apg")["frechet_distance"] != row_of(again, "apg")["frechet_distance"]
    assert row_of(other, "none", 1.0)["label_accuracy"] == 0.125
    with pytest.raises(ValueError, match="is of another seed, 0, got 1: give --overwrite"):
        compare(folders, "--methods", "cfg", "--seed", 1, output_dir=tmp_path)
    fresh = compare(folders, "--methods", "cfg", "--overwrite", output_dir=tmp_path)
    assert row_of(fresh, "none", 1.0)["label_accuracy"] == row_of(whole, "none", 1.0)["label_accuracy"]


def test_a_method_that_lacks_something_is_left_out_and_says_why(folders, tmp_path, capsys):
    result = compare(folders, "--methods", "autoguidance", "classifier", output_dir=tmp_path / "one")
    printed = capsys.readouterr().out
    assert "classifier guidance is left out: give --classifier, a folder of training/train_classifier.py" in printed
    # Without a weaker network, layers of the denoiser are dropped.
    assert row_of(result, "autoguidance")["calls"]["denoiser"] == 2 * STEPS
    assert row_of(result, "autoguidance")["how"]["guider"]["class"] == "AutoGuidance"

    GuidedDiffusionPipeline(unet(0, None), scheduler()).save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "train_config.yaml").write_text(OF_DATA)
    result = compare(
        *(folders, "--pipeline", tmp_path / "run", "--classifier", folders / "classifier"),
        output_dir=tmp_path / "two",
    )
    assert "CFG is left out: the denoiser has no null label" in capsys.readouterr().out
    assert [(row["method"], row["guidance_scale"]) for row in result["results"]] == [
        ("classifier", 1.0),
        ("classifier", 3.0),
    ]
    assert row_of(result, "classifier")["how"]["guider"]["classifier_scale"] == 3.0


def test_apg_without_its_changes_is_classifier_free_guidance():
    """With all of the direction, no momentum and no bound on its norm."""
    pipe = GuidedDiffusionPipeline(unet(0), scheduler())
    pipe.set_progress_bar_config(disable=True)
    options = GuidanceOptions(apg_eta=1.0, apg_momentum=0.0, apg_norm_threshold=0.0)
    images = []
    for method in ("cfg", "apg"):
        settings = call_settings(method, 3.0, options, pipe)
        generator = [torch.Generator().manual_seed(0)]
        images.append(pipe([4], num_inference_steps=3, generator=generator, output_type="latent", **settings).images)
    assert (images[0] - images[1]).abs().max() < 1e-5
    assert images[0].std() > 0.01


def test_counting_ends_with_its_block():
    pipe = GuidedDiffusionPipeline(unet(0), scheduler())
    pipe.set_progress_bar_config(disable=True)
    with counted_calls(pipe) as counts:
        pipe([1, 2, 3], num_inference_steps=2, guidance_scale=2.0, low_memory=True)
    pipe([1], num_inference_steps=2)
    assert counts["denoiser"] == 3 * 2 * 2
    assert not pipe.denoiser._forward_pre_hooks


def test_two_processes_give_the_measures_of_one(folders, compared, tmp_path):
    output = in_ranks(lambda: compare(folders, "--methods", "cfg", "cfg_interval", output_dir=tmp_path))
    two = json.loads((tmp_path / "guidance.json").read_text())
    for method in ("cfg", "cfg_interval"):
        mine, theirs = row_of(two, method), row_of(compared, method)
        assert mine["calls"] == theirs["calls"]
        assert mine["frechet_distance"] == pytest.approx(theirs["frechet_distance"], rel=1e-3)
    assert output.count("written to") == 1


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "say what to guide: training/compare_guidance.py PIPELINE"),
        (["a", "--methods", "cgf"], "methods must be different ones of cfg, cfg_interval, .*, got cgf"),
        (["a", "--methods", "cfg_interval"], "cfg_interval is compared with cfg"),
        (["a", "--guidance_scales", "0.5", "2"], "guidance_scales must be different numbers of at least 1, got 0.5 2"),
        (["a", "--num_images", "5"], "num_images must be at least 6, got 5"),
        (["a", "--guidance_interval", "0.2"], "guidance_interval must be two numbers"),
        (["a", "--methods", "cfg", "--apg_eta", "0.5"], "apg_eta has no meaning without methods apg: give both"),
        (
            ["a", "--methods", "cfg", "--guidance_rescale", "0.2"],
            "guidance_rescale has no meaning without methods cfg_rescale",
        ),
        (
            ["a", "--methods", "cfg", "--weak_pipeline", "b"],
            "weak_pipeline has no meaning without methods autoguidance",
        ),
        (["a", "--methods", "cfg", "--classifier", "b"], "classifier has no meaning without methods classifier"),
        (["a", "--methods", "cfg", "--guidance_interval", "0", "1"], "no meaning without methods cfg_interval"),
        (["a", "--weak_pipeline", "b", "--auto_guidance_layers", "1"], "leave them or weak_pipeline out"),
        (["a", "--guidance_rescale", "2"], r"guidance_rescale must be in \[0, 1\], got 2"),
    ],
)
def test_wrong_options_end_with_a_line(words, message, capsys):
    with pytest.raises(SystemExit):
        compare_guidance.parse(words)
    import re

    assert re.search(message, capsys.readouterr().err)


def test_networks_that_do_not_fit_are_refused_before_anything_is_made(folders, tmp_path):
    other = ExtDDIMScheduler(beta_schedule="linear", prediction_type="v_prediction")
    GuidedDiffusionPipeline(unet(0), other).save_pretrained(tmp_path / "other")
    GuidedDiffusionPipeline(unet(0), ExtDDIMScheduler(beta_schedule="cosine")).save_pretrained(tmp_path / "epsilon")
    model = classifier()
    model.register_to_config(noise_schedule=describe_path(other))
    model.save_pretrained(tmp_path / "classifier")
    for more, message in [
        (("--weak_pipeline", tmp_path / "other"), "the weaker pipeline must have the noise levels of the pipeline"),
        (("--weak_pipeline", tmp_path / "epsilon"), "must predict what the pipeline does, v_prediction, got epsilon"),
        (("--classifier", tmp_path / "classifier"), "the classifier must be trained on the scheduler's noise levels"),
        (("--classifier", tmp_path), "is no folder of training/train_classifier.py"),
        (("--guidance_interval", 0.5, 2), "guidance_interval must be two numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare(folders, *more, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
