import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import datasets
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext import DiTModel, ExtDDIMScheduler, GuidedDiffusionPipeline, UNetModel
from diffusers_ext.draws import LARGEST_SEED
from diffusers_ext.hub.cards import write_card
from diffusers_ext.options import parse_config
from processes import in_ranks


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "training"))
import evaluate  # noqa: E402
import evaluate_vae  # noqa: E402
import sample_prompts  # noqa: E402
import train_features  # noqa: E402


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_EXT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def features_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features") / "digits"
    config = train_features.FeaturesConfig(output_dir=str(folder), num_train_epochs=7)
    about = train_features.main(config)
    assert about["held_out_accuracy"] > 0.85
    return folder


def save_pipeline(folder, num_classes=10, sample_size=8):
    torch.manual_seed(0)
    unet = UNetModel(
        sample_size=sample_size,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        num_classes=num_classes,
    )
    names = {label: str(label) for label in range(num_classes)}
    scheduler = ExtDDIMScheduler(timestep_spacing="trailing")
    GuidedDiffusionPipeline(denoiser=unet, scheduler=scheduler, id2label=names).save_pretrained(folder)
    return folder


def save_digits(folder, split, by_label=True):
    """scikit-learn's digits as files, in a subfolder for each label."""
    from diffusers_ext.data.sources import load_digits

    for index, row in enumerate(load_digits(split)):
        place = folder / (str(row["label"]) if by_label else "")
        place.mkdir(parents=True, exist_ok=True)
        row["image"].save(place / f"{index:04}.png")
    return folder


def run(*arguments):
    return evaluate.main(evaluate.parse([str(argument) for argument in arguments]))


def test_a_run_folder_is_measured_without_options(tmp_path, features_folder, capsys):
    folder = save_pipeline(tmp_path / "run")
    (folder / "train_config.yaml").write_text("dataset_name: digits\nresolution: [8, 8]\nnum_inference_steps: 3\n")
    write_card(folder, data="Digits.")
    result = run(folder, "--num_images", 200, "--features", features_folder)

    card = (folder / "README.md").read_text()
    distance = f"{result['generated']['frechet_distance']:.4g}"
    assert f"| Fréchet distance in the features of a classifier of digits | {distance} | 200 |" in card
    assert f"\npython training/evaluate.py {folder} --dataset_name digits" in card and "name: precision\n" in card
    assert result == json.loads((folder / "evaluation.json").read_text())
    assert not list(folder.glob("*.tmp"))
    assert result["dataset_name"] == "digits" and result["num_train_images"] == 1500
    assert result["sampling"]["num_inference_steps"] == 3 and result["sampling"]["by_label"]
    generated, held_out = result["generated"], result["held_out"]
    assert generated.keys() == held_out.keys()
    assert generated["num_images"] == held_out["num_images"] == 200
    # An untrained network makes noise, which no measure should take for digits.
    assert generated["frechet_distance"] > 5 * held_out["frechet_distance"]
    assert generated["pixel_precision"] < 0.1 < 0.7 < held_out["pixel_precision"]
    assert generated["svc_label_accuracy"] < 0.3 and held_out["svc_label_accuracy"] > 0.9
    assert generated["label_accuracy"] < 0.3 and held_out["label_accuracy"] > 0.85
    printed = capsys.readouterr().out
    assert "frechet_distance" in printed and "FID" not in printed
    assert "\nreference: 1500 images of digits, split train, 8x8\n" in printed
    assert str(features_folder) in printed


def test_bits_per_dim_go_into_the_json_the_card_and_a_line(tmp_path, features_folder, capsys):
    folder = save_pipeline(tmp_path / "run")
    (folder / "train_config.yaml").write_text("dataset_name: digits\nresolution: [8, 8]\nnum_inference_steps: 2\n")
    write_card(folder, data="Digits.")
    result = run(
        *(folder, "--num_images", 20, "--features", features_folder, "--bits_per_dim", "--num_likelihood_images", 9),
        *("--num_likelihood_steps", 12, "--likelihood_variance", "fixed_small", "--num_flow_steps", 2),
        *("--likelihood_curves", "--max_train_samples", 300),
    )
    bound = result["likelihood"]
    assert bound == json.loads((folder / "evaluation.json").read_text())["likelihood"]
    assert bound["bits_per_dim"] == pytest.approx(bound["rate"] + bound["distortion"], rel=1e-9)
    assert (folder / "likelihood.png").is_file() and bound["curves"][-1]["bits_so_far"] == pytest.approx(bound["rate"])
    parts = sum(part["bits_per_dim"] for part in bound["rate_by_timesteps"])
    assert bound["rate"] == pytest.approx(bound["prior"] + parts, rel=1e-9)
    known = {"num_images": 9, "num_dims": 64, "num_steps": 12, "num_terms": 11, "variance": "fixed_small"}
    assert known.items() <= bound.items() and bound["by_label"]
    card = (folder / "README.md").read_text()
    assert f"in 8 bits, given their labels, an upper bound | {bound['bits_per_dim']:.4g} | 9 |" in card
    printed = capsys.readouterr().out
    assert f"at most {bound['bits_per_dim']:.3f} +- {bound['standard_error']:.3f} on 9 held" in printed
    assert f"by the probability flow {bound['flow_bits_per_dim']:.3f}" in printed


@pytest.mark.filterwarnings("ignore:the Fréchet distance of 128 features is unreliable")
def test_a_sweep_and_several_seeds_of_a_run(tmp_path, features_folder, capsys):
    """Each with the guidance of the run; the command that the results name is a valid one."""
    folder = save_pipeline(tmp_path / "run")
    options = "dataset_name: digits\nresolution: [8, 8]\nnum_inference_steps: 3\nguidance_scale: 2.0\n"
    (folder / "train_config.yaml").write_text(options)
    write_card(folder, data="Digits.")
    shared = (folder, "--num_images", 10, "--features", features_folder, "--num_seeds", 2, "--no-pixel_metrics")
    result = run(*shared, "--sweep", "--sweep_steps", 1, 2)
    assert result == json.loads((folder / "sweep" / "results.json").read_text())
    assert [(row["guidance_scale"], row["calls"]) for row in result["results"]] == [(2.0, 2), (2.0, 4)]
    assert evaluate.parse(shlex.split(result["command"])[2:]).sweep_guidance_scales == (2.0,)
    assert "| ExtDDIMScheduler | 2 | 2 | 4 | " in capsys.readouterr().out
    with pytest.raises(ValueError, match="num_inference_steps is of one set of images: give --sweep_steps"):
        run(*shared, "--sweep", "--num_inference_steps", 2)

    result = run(*shared, "--num_inference_steps", 1)
    assert result["seeds"] == [0, 1] and result["spread"]["frechet_distance"] > 0
    assert result["reference"]["num_images"] == 1500 and result["reference"]["dataset_split"] == "train"
    card = (folder / "README.md").read_text()
    spread = result["spread"]["frechet_distance"]
    assert f"of a classifier of digits, mean of 2 seeds with standard deviation {spread:.2g} |" in card
    printed = capsys.readouterr().out
    assert (
        "each measure is the mean over 2 sets of images, of seeds 0 to 1" in printed and f"± {spread:.2g}" in printed
    )
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 1


def test_the_training_images_as_a_folder_are_perfect(tmp_path, features_folder):
    """They come through files, labels and the same preparation, so their distance from themselves is 0."""
    folder = save_digits(tmp_path / "images", "train")
    result = run(folder, "--dataset_name", "digits", "--features", features_folder, "--extrapolate")
    generated = result["generated"]
    assert generated["num_images"] == 1500
    assert generated["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert generated["extrapolated_frechet_distance"] < 0  # of all it is 0 and of a part it is not
    assert generated["coverage"] == 1 and generated["density"] > 1  # each image lies in its own ball too
    assert generated["kernel_distance"] < 0  # pairs of an image with itself are left out within a set, and not across
    assert 5 < generated["classifier_score"] <= 10
    assert result["held_out"]["coverage"] > 0.4  # of 297 images, balls around 1500
    for name in ("pixel_precision", "pixel_recall", "feature_precision", "feature_recall"):
        assert generated[name] == 1
    assert generated["nearest_train_distance"] == pytest.approx(0, abs=1e-6)
    assert generated["svc_label_accuracy"] > 0.99
    assert result["sampling"] is None


def test_labels_are_told_beside_the_images_too_and_grids_of_them_are_no_images(tmp_path, features_folder):
    """As `training/sample.py` saves them where the name of a label is not one of a folder."""
    from diffusers_ext.data.sources import load_digits

    images = save_digits(tmp_path / "made" / "images", "test", by_label=False)
    rows = [
        {"file_name": f"{index:04}.png", "label": str(row["label"])} for index, row in enumerate(load_digits("test"))
    ]
    (images / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "made" / "sampling.json").write_text("{}")
    shutil.copy(images / "0000.png", tmp_path / "made" / "grid.png")
    options = ("--dataset_name", "digits", "--features", features_folder, "--no-svc", "--no-pixel_metrics")
    for folder in (tmp_path / "made", images):
        result = run(folder, *options, "--output_file", tmp_path / "result.json")
        assert result["generated"]["num_images"] == len(rows)
        assert result["generated"]["label_accuracy"] == result["held_out"]["label_accuracy"]
    with (images / "metadata.jsonl").open("a") as file:
        file.write("not json\n")
    with pytest.raises(ValueError, match=f"line {len(rows) + 1} of .* must be a JSON object with a file_name"):
        run(images, *options, "--output_file", tmp_path / "result.json")


def test_a_folder_without_known_labels_has_no_label_accuracy(tmp_path, features_folder, capsys):
    folder = save_digits(tmp_path / "images", "test", by_label=False)
    result = run(folder, "--dataset_name", "digits", "--features", features_folder, "--no-svc")
    assert "label_accuracy" not in result["generated"]
    assert "the labels of the images are not all known, such as that of 0000.png" in capsys.readouterr().err
    assert result["generated"]["frechet_distance"] == pytest.approx(result["held_out"]["frechet_distance"], rel=1e-4)


def test_internal_guidance_is_measured_and_named(tmp_path, features_folder):
    size = {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2}
    dit = DiTModel(8, 4, 1, num_classes=10, internal_guidance_layer=1, **size)
    names = {label: str(label) for label in range(10)}
    folder = tmp_path / "run"
    GuidedDiffusionPipeline(dit, ExtDDIMScheduler(timestep_spacing="trailing"), id2label=names).save_pretrained(folder)
    (folder / "train_config.yaml").write_text("dataset_name: digits\nresolution: [8, 8]\nnum_inference_steps: 1\n")
    write_card(folder, data="Digits.")
    settings = ("--features", features_folder, "--num_images", 20, "--no-svc", "--no-pixel_metrics")
    settings += ("--max_train_samples", 300)
    result = run(folder, *settings, "--internal_guidance_scale", 1.5)
    assert result["sampling"]["internal_guidance_scale"] == 1.5
    assert result["sampling"]["guidance_interval"] is None
    card = (folder / "README.md").read_text()
    assert ", internal guidance 1.5" in card and "--internal_guidance_scale 1.5" in card


def test_a_stock_pipeline_is_measured_with_another_scheduler(tmp_path, features_folder):
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    folder = tmp_path / "stock"
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder)
    result = run(
        *(folder, "--dataset_name", "digits", "--features", features_folder, "--num_images", 130),
        *("--num_inference_steps", 2, "--scheduler", "DDIMScheduler", "--output_file", tmp_path / "out" / "it.json"),
        *("--max_train_samples", 300),
    )
    assert (tmp_path / "out" / "it.json").is_file() and not (folder / "evaluation.json").exists()
    assert result["sampling"]["pipeline_class"] == "DDPMPipeline"
    assert result["sampling"]["scheduler_class"] == "DDIMScheduler"
    assert not result["sampling"]["by_label"] and "label_accuracy" not in result["generated"]
    assert result["generated"]["num_images"] == 130  # three channels, measured as one


def save_parquet(folder, with_labels, count=120):
    """Colour images of 12x8, left half of one of three colours, and labels for them in parquet files."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for split, number in (("train", count), ("validation", 40)):
        labels = generator.integers(3, size=number)
        pixels = generator.integers(60, size=(number, 12, 8, 3)).astype(np.uint8)
        pixels[np.arange(number), :, :4, labels] += 180
        rows = {"image": [Image.fromarray(picture) for picture in pixels]}
        features = {"image": datasets.Image()}
        if with_labels:
            rows["label"], features["label"] = labels, datasets.ClassLabel(names=["red", "green", "blue"])
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_features_are_trained_once_and_kept(tmp_path, capsys):
    folder = save_parquet(tmp_path / "colours", with_labels=True)
    images = tmp_path / "images"
    images.mkdir()
    for index in range(20):
        Image.effect_noise((8, 12), 50).save(images / f"{index}.png")  # grey, measured as colour
    arguments = (images, "--dataset_name", folder, "--cache_dir", tmp_path / "datasets", "--num_neighbours", 3)
    with pytest.warns(UserWarning, match="unreliable from 20 samples"):
        first = run(*arguments)
    assert re.search("training a feature classifier on .*; --features none does without\n", capsys.readouterr().out)
    assert first["image_shape"] == [3, 12, 8]
    assert first["held_out"]["label_accuracy"] == 1.0
    assert Path(first["features"]["folder"]).is_relative_to(tmp_path / "cache")

    with pytest.warns(UserWarning, match="unreliable from 20 samples"):
        second = run(*arguments)
    assert "training a feature classifier" not in capsys.readouterr().out
    assert second["features"] == first["features"] and second["generated"] == first["generated"]


def test_without_labels_the_features_are_trained_without_too_and_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_EXT_CACHE", str(tmp_path / "cache"))
    data = save_parquet(tmp_path / "colours", with_labels=False, count=40)
    images = tmp_path / "images"
    images.mkdir()
    for index in range(20):
        Image.effect_noise((8, 12), 50).save(images / f"{index}.png")
    labelled = save_parquet(tmp_path / "labelled", with_labels=True, count=40)
    options = {"dataset_name": str(labelled), "num_train_epochs": 1, "output_dir": str(tmp_path / "features")}
    about = train_features.main(train_features.FeaturesConfig(unconditional=True, **options))
    assert "held_out_share_found" in about and "held_out_accuracy" not in about
    shared = (images, "--dataset_name", data, "--cache_dir", tmp_path / "datasets")
    with pytest.warns(UserWarning, match="unreliable from 20 samples"):
        result = run(*shared)
    said = capsys.readouterr().out
    assert (
        "training features without labels on the images of" in said and "trained without labels, which finds" in said
    )
    assert (
        set(result["generated"]) >= {"frechet_distance", "coverage", "pixel_recall"}
        and "held_out_share_found" in result["features"]
    )
    result = run(*shared, "--features", "none")
    assert result["features"] is None
    assert set(result["generated"]) == {"num_images", "pixel_precision", "pixel_recall", "nearest_train_distance"}
    with pytest.raises(ValueError, match="--extrapolate is of a Fréchet distance, which --features none leaves out"):
        run(*shared, "--features", "none", "--extrapolate")
    with pytest.raises(ValueError, match="lpips is of pairs of images, .* is a folder of images: leave it out"):
        run(*shared, "--lpips", "alex")
    with pytest.raises(ValueError, match="--svc needs labels, two or more, and .* has none"):
        run(*shared, "--svc", "--features", "none")


def test_a_data_set_of_one_label_is_measured_in_pixels(tmp_path):
    """No classifier tells one label from others, be it that of the features or an SVC."""
    data, images = tmp_path / "data", tmp_path / "images"
    data.mkdir()
    images.mkdir()
    rows = {"image": [Image.effect_noise((8, 8), 50) for _ in range(12)], "label": [0] * 12}
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["noise"])})
    datasets.Dataset.from_dict(rows, features=columns).to_parquet(data / "train-00000-of-00001.parquet")
    for index, picture in enumerate(rows["image"]):
        picture.save(images / f"{index}.png")
    shared = (images, "--dataset_name", data, "--cache_dir", tmp_path / "datasets", "--features", "none")
    result = run(*shared)
    assert result["features"] is None and "pixel_recall" in result["generated"]
    with pytest.raises(ValueError, match="--svc needs labels, two or more, and .* has images of only one"):
        run(*shared, "--svc")


@pytest.mark.parametrize(
    "config, arguments, message",
    [
        (
            evaluate_vae.EvaluateVAEConfig,
            ["--model", "m", "--num_samples", "0"],
            "num_samples must be at least 1, got 0",
        ),
        (
            evaluate_vae.EvaluateVAEConfig,
            ["--model", "m", "--seed", "-1"],
            f"seed must be in [0, {LARGEST_SEED}], got -1",
        ),
        (sample_prompts.SampleConfig, ["--num_inference_steps", "0"], "num_inference_steps must be at least 1, got 0"),
        (
            sample_prompts.SampleConfig,
            ["--guidance_scales", "nan"],
            "guidance_scales must be a number, got nan",
        ),
        (train_features.FeaturesConfig, ["--num_train_epochs", "0"], "num_train_epochs must be at least 1, got 0"),
        (train_features.FeaturesConfig, ["--train_batch_size", "1"], "train_batch_size must be at least 2, got 1"),
        (train_features.FeaturesConfig, ["--learning_rate", "0"], "learning_rate must be positive, got 0"),
    ],
)
def test_numbers_without_a_meaning_are_refused_by_the_name_of_their_option(
    config, arguments, message, capsys, tmp_path
):
    if config is sample_prompts.SampleConfig:
        arguments = ["--run", str(tmp_path), "--prompts", "a cat", *arguments]
    with pytest.raises(SystemExit):
        parse_config(config, arguments)
    assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:the Fréchet distance of 128 features is unreliable")
def test_two_processes_give_the_measures_of_one(tmp_path, features_folder):
    folder = save_pipeline(tmp_path / "run")
    arguments = (
        *(folder, "--dataset_name", "digits", "--features", features_folder, "--num_images", 131),
        *("--num_inference_steps", 2, "--mixed_precision", "no", "--num_threads", 1, "--max_train_samples", 300),
        *("--bits_per_dim", "--num_likelihood_images", 21, "--num_likelihood_terms", 4),
    )
    one = run(*arguments)
    output = in_ranks(lambda: run(*arguments))
    two = json.loads((folder / "evaluation.json").read_text())
    assert two["generated"] == pytest.approx(one["generated"], rel=1e-3)
    for name in ("bits_per_dim", "standard_error", "rate", "distortion"):
        assert two["likelihood"][name] == pytest.approx(one["likelihood"][name], rel=1e-5)
    assert two["likelihood"]["num_images"] == 21
    assert output.count("written to") == 1

    sweep = (
        *arguments[:5],
        "--num_images",
        21,
        *arguments[9:13],
        "--sweep",
        "--sweep_steps",
        1,
        2,
        "--no-pixel_metrics",
    )
    one = run(*sweep)["results"]
    output = in_ranks(lambda: run(*sweep, "--overwrite"))
    two = json.loads((folder / "sweep/results.json").read_text())["results"]
    assert output.count("written to") == 1 and [row["calls"] for row in two] == [row["calls"] for row in one] == [1, 2]
    for mine, theirs in zip(two, one, strict=True):
        assert mine["frechet_distance"] == pytest.approx(theirs["frechet_distance"], rel=1e-3)


def test_features_of_training_are_not_overwritten(features_folder):
    with pytest.raises(ValueError, match="is not empty: give another one, or --overwrite_output_dir"):
        train_features.main(train_features.FeaturesConfig(output_dir=str(features_folder)))


@pytest.mark.filterwarnings("ignore:the Fréchet distance of 128 features is unreliable")
def test_what_cannot_be_evaluated_is_refused(tmp_path, features_folder):
    digits = ("--dataset_name", "digits", "--features", features_folder, "--max_train_samples", 300)
    empty = tmp_path / "empty"
    empty.mkdir()
    ten = save_pipeline(tmp_path / "ten")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no picture")
    save_digits(tmp_path / "pictures", "test")
    few = tmp_path / "few"
    few.mkdir()
    for number in range(2):
        Image.new("L", (8, 8)).save(few / f"{number}.png")
    for arguments, message in [
        ((tmp_path / "absent", *digits), "is no folder here, and no name of a pipeline on the Hub"),
        ((empty, *digits), r"holds neither a pipeline \(model_index.json\) nor images"),
        ((ten,), "has no train_config.yaml that names its data set: give --dataset_name"),
        ((ten, "--dataset_name", "digits", "--features", empty), "is no folder of a feature classifier: make one"),
        ((ten, *digits, "--scheduler", "UNetModel"), "scheduler must be a scheduler class .*, got UNetModel"),
        (
            (ten, *digits, "--resolution", 16),
            r"are of images of .* \(1, 8, 8\), but those of digits are \(1, 16, 16\)",
        ),
        (
            (save_pipeline(tmp_path / "four", num_classes=4), *digits),
            r"the pipeline's 4 labels \(0, 1, 2, 3\) are not the 10 of digits",
        ),
        (
            (save_pipeline(tmp_path / "large", sample_size=16), *digits, "--resolution", 8, "--num_images", 6),
            r"the images are \(1, 16, 16\) .* but those of the data set are \(1, 8, 8\)",
        ),
        (
            (ten, *digits, "--num_images", 256, "--extrapolate"),
            "--extrapolate takes more than 256 images, .*, got 256",
        ),
        (
            (ten, *digits, "--num_images", 5),
            "num_images must be at least 6, got 5: precision and recall look at the 5",
        ),
        (
            (ten, *digits, "--num_images", 400, "--num_neighbours", 300),
            "num_neighbours must be smaller than the number of training images, 300",
        ),
        (
            # Before the data are read, which are not there.
            (ten, "--dataset_name", "somebody/nothing", "--bits_per_dim", "--num_likelihood_steps", 2000),
            "num_likelihood_steps must be at most the 1000 timesteps that the model was trained on, got 2000",
        ),
        ((few, *digits), "the number of images in .*few must be at least 6, got 2: precision and recall"),
        ((broken, *digits), "a.png cannot be decoded"),
        ((broken.parent / "pictures", *digits, "--bits_per_dim"), "--bits_per_dim is of a model, and .* of images"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(*arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "say what to evaluate: training/evaluate.py PIPELINE"),
        (["runs/x", "--num_images", "0"], "num_images must be at least 1, got 0"),
        (
            ["runs/x", "--num_likelihood_steps", "5"],
            "num_likelihood_steps has no meaning without bits_per_dim",
        ),
        (["runs/x", "--sweep_steps", "2"], "sweep_steps has no meaning without sweep"),
        (["runs/x", "--sweep", "--sweep_steps", "2", "2"], "sweep_steps must be different ones, got 2 2"),
        (["runs/x", "--sweep", "--sweep_steps", "0"], "sweep_steps must be at least 1, got 0"),
        (["runs/x", "--seed", "4293", "--num_seeds", "2"], "seed must be in [0, 4293], got 4294"),
        (["runs/x", "--seed", "-1"], "seed must be in [0, 4293], got -1"),
        (["runs/x", "--num_threads", "0"], "num_threads must be at least 1, got 0"),
        (["runs/x", "--resolution", "0"], "resolution must be one side or height and width, got 0"),
        (["runs/x", "--max_train_samples", "-3"], "max_train_samples must be at least 1, got -3"),
        (["runs/x", "--num_image", "5"], "unknown option --num_image; did you mean --num_images"),
    ],
)
def test_wrong_options_end_with_a_line(arguments, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse(arguments)
    assert message in capsys.readouterr().err
