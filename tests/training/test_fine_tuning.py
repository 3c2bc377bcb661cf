"""Runs that begin with the network of a pipeline, of this package or of diffusers."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTPipeline, UNet2DModel

from diffusers_ext import (
    DiffusionPipeline,
    DiTModel,
    ExtDDIMScheduler,
    FlowScheduler,
    GuidedDiffusionPipeline,
    LucidrainsUNetModel,
    TextGuidedDiffusionPipeline,
    UNetModel,
)
from diffusers_ext.recipes.fine_tuning import joined_labels
from diffusers_ext.recipes.pretrained import read_pretrained
from tiny import random_stock_dit, tiny_stock_unet, tiny_unet
from tiny_text import tiny_clip, tiny_text_unet, tiny_tokenizer
from tiny_vae import tiny_vae
from training.train_ddpm import TrainConfig, main


sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
import train_text_to_image


SMALL = {
    "train_batch_size": 4,
    "max_train_samples": 40,
    "num_inference_steps": 2,
    "sample_columns": 1,
    "max_train_steps": 2,
    "mixed_precision": "no",
}
# So that a run leaves its network as it began, to rounding.
STANDING = {"learning_rate": 1e-12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="module")
def ours(folder):
    """A pipeline of digits with two of their ten labels, under other ids, on a short path of another prediction type."""
    scheduler = ExtDDIMScheduler(num_train_timesteps=100, beta_schedule="linear", prediction_type="sample")
    names = {0: "7", 1: "letter"}
    GuidedDiffusionPipeline(tiny_unet(num_classes=2), scheduler, id2label=names).save_pretrained(folder / "ours")
    return str(folder / "ours")


@pytest.fixture(scope="module")
def stock(folder):
    """A DDPM pipeline of diffusers, whose path is not the default's."""
    DDPMPipeline(tiny_stock_unet(), DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(folder / "stock")
    return str(folder / "stock")


def config_of(output_dir, pretrained, **settings):
    return TrainConfig(**SMALL | {"output_dir": str(output_dir), "pretrained_pipeline": pretrained} | settings)


def run(output_dir, pretrained, **settings):
    """The pipeline that a run saves, and the one that it began with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = main(config_of(output_dir, pretrained, **settings))
        return DiffusionPipeline.from_pretrained(folder), DiffusionPipeline.from_pretrained(pretrained)


@pytest.fixture(scope="module")
def from_ours(ours, folder):
    return *run(folder / "run", ours, **STANDING), folder / "run"


def test_a_run_begins_with_the_weights_of_the_pipeline_and_adds_labels_beside_its_own(from_ours):
    after, before, _ = from_ours
    assert after.labels == {"7": 0, "letter": 1} | {name: 2 + i for i, name in enumerate("012345689")}
    new, old = after.denoiser.state_dict(), before.denoiser.state_dict()
    assert new.keys() == old.keys()
    for name, value in old.items():
        if name.endswith("class_embedding.weight"):
            torch.testing.assert_close(new[name][:2], value[:2])
            torch.testing.assert_close(new[name][2:], value[2:].expand(10, -1))  # and the null label is the last
        else:
            torch.testing.assert_close(new[name], value)


def test_path_prediction_type_and_network_are_taken_over_and_written_down(from_ours):
    after, before, folder = from_ours
    for name in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type"):
        assert after.scheduler.config[name] == before.scheduler.config[name]
    written = yaml.safe_load((folder / "train_config.yaml").read_text())
    assert written["path"] == "pretrained" and written["prediction_type"] == "sample"
    assert written["block_out_channels"] == [8, 16] and written["num_train_timesteps"] == 100
    again = TrainConfig(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in written.items()}
    )
    assert (again.path, again.scheduler, again.loss_weighting) == ("pretrained", "ddim", "uniform")
    card = (folder / "README.md").read_text()
    assert "7, letter" not in card and "starts from" in card
    assert "`GuidedDiffusionPipeline` fine-tuned from `" in card and "from scratch" not in card


def test_a_run_goes_on_from_its_checkpoint_to_the_same_weights(ours, tmp_path):
    settings = {"checkpointing_steps": 1, "learning_rate": 0.01, "lr_scheduler": "constant"}
    at_once, _ = run(tmp_path / "at_once", ours, **settings)
    run(tmp_path / "parts", ours, **settings | {"max_train_steps": 1})
    in_parts, before = run(tmp_path / "parts", ours, resume_from_checkpoint="latest", **settings)
    moved = False
    for name, value in at_once.denoiser.state_dict().items():
        assert torch.equal(in_parts.denoiser.state_dict()[name], value)
        old = before.denoiser.state_dict()[name]
        moved |= old.shape == value.shape and not torch.allclose(old, value, atol=1e-4)
    assert moved


def test_a_stock_unet_is_trained_as_it_is_on_its_path(stock, tmp_path):
    after, before = run(tmp_path / "run", stock, unconditional=True, **STANDING)
    assert type(after.denoiser) is UNet2DModel and after.scheduler.config.prediction_type == "epsilon"
    torch.testing.assert_close(after.scheduler.alphas_cumprod, before.scheduler.alphas_cumprod, rtol=1e-3, atol=1e-6)
    for name, value in before.unet.state_dict().items():
        torch.testing.assert_close(after.denoiser.state_dict()[name], value)


def test_a_stock_unet_without_labels_gets_them_and_begins_as_if_it_did_not_look(stock, tmp_path):
    after, before = run(tmp_path / "run", stock, label_dropout=0.0, **STANDING)
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 500])
    with torch.no_grad():
        labelled = after.denoiser(x, t, class_labels=torch.tensor([3, 9])).sample
        torch.testing.assert_close(labelled, before.unet(x, t).sample, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="label_dropout must be 0 .* no label that stands for none"):
        run(tmp_path / "dropped", stock)


def test_a_stock_dit_of_latents_is_trained_as_ours_with_its_autoencoder_and_learned_variance(tmp_path):
    torch.manual_seed(0)
    vae = tiny_vae(channels=1, sample_size=16)
    dit = random_stock_dit(num_embeds_ada_norm=10, out_channels=8)
    scheduler = DDIMScheduler(clip_sample=False)
    DiTPipeline(dit, vae, scheduler).save_pretrained(tmp_path / "dit")
    after, before = run(tmp_path / "run", str(tmp_path / "dit"), **STANDING)
    assert type(after.denoiser) is DiTModel and type(after.vae) is type(before.vae)
    written = yaml.safe_load((tmp_path / "run" / "train_config.yaml").read_text())
    assert written["objective"] == "hybrid" and written["resolution"] == [16, 16] and written["hidden_size"] == 32
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 500])
    labels = torch.tensor([3, 10])
    with torch.no_grad():
        expected = before.transformer(x, t, class_labels=labels).sample
        torch.testing.assert_close(after.denoiser(x, t, labels).sample, expected, rtol=1e-4, atol=1e-4)


def test_a_network_that_takes_no_labels_is_gone_on_with_without(folder, tmp_path):
    network = LucidrainsUNetModel(8, 1, 1, block_out_channels=(4, 8), width=4, attention_head_dim=4)
    GuidedDiffusionPipeline(network, ExtDDIMScheduler()).save_pretrained(folder / "lucidrains")
    trained, _ = run(tmp_path / "run", str(folder / "lucidrains"), unconditional=True, **STANDING)
    for name, value in trained.denoiser.state_dict().items():
        torch.testing.assert_close(value, network.state_dict()[name], rtol=0, atol=1e-6)
    with pytest.raises(
        ValueError, match="must have no labels for .* a LucidrainsUNetModel, which takes none: give --uncond"
    ):
        main(config_of(tmp_path / "labelled", str(folder / "lucidrains")))


def test_a_unet_is_trained_at_another_size_with_attention_at_the_same_maps(ours, tmp_path):
    after, before = run(tmp_path / "run", ours, resolution=(16,), **STANDING)
    assert after.denoiser.config.sample_size == 16
    x = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(after.denoiser(x, 5).sample, before.denoiser(x, 5).sample, rtol=1e-4, atol=1e-5)


def test_a_pipeline_of_the_linear_path_is_gone_on_with_on_it(folder, tmp_path):
    GuidedDiffusionPipeline(tiny_unet(), FlowScheduler()).save_pretrained(folder / "flow")
    config = config_of(tmp_path, str(folder / "flow"))
    assert (config.scheduler, config.prediction_type, config.is_linear) == ("flow", "flow", True)


def test_a_pipeline_of_texts_is_gone_on_with_with_its_tokenizer_and_encoder(tmp_path):
    tokenizer = tiny_tokenizer()
    before = TextGuidedDiffusionPipeline(tiny_text_unet(), ExtDDIMScheduler(), tokenizer, tiny_clip(tokenizer))
    before.save_pretrained(tmp_path / "texts")
    settings = SMALL | STANDING | {"output_dir": str(tmp_path / "run"), "pretrained_pipeline": str(tmp_path / "texts")}
    channels = {1: "grey", 3: "RGB"}[before.denoiser.config.in_channels]
    config = train_text_to_image.TextConfig(**settings, image_mode={"grey": "L", "RGB": "RGB"}[channels])
    after = DiffusionPipeline.from_pretrained(train_text_to_image.main(config))
    for name, value in before.denoiser.state_dict().items():
        torch.testing.assert_close(after.denoiser.state_dict()[name], value)
    for name, value in before.text_encoder.state_dict().items():
        assert torch.equal(after.text_encoder.state_dict()[name], value)
    assert after.tokenizer.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ValueError, match="is of texts, which training/train_text_to_image.py goes on with"):
        config_of(tmp_path / "other", str(tmp_path / "texts"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "cosine"}, "path must be 'vp', as it is of --pretrained_pipeline .*, got 'cosine'"),
        ({"prediction_type": "epsilon"}, "prediction_type must be 'sample', as it is of"),
        ({"num_train_timesteps": 50}, "num_train_timesteps must be 100, as it is of"),
        ({"beta_schedule": "cosine"}, "beta_schedule must be 'linear', as it is of"),
        ({"sigma_max": 2.0, "path": "ve"}, "path must be 'vp'"),
        ({"model": "dit"}, "model must be 'unet', as it is of"),
        ({"block_out_channels": (16, 16)}, r"block_out_channels must be \(8, 16\), as it is of"),
        ({"hidden_size": 64}, "hidden_size must be left out with"),
        ({"objective": "hybrid"}, "objective must be simple with .* no channels for the variance, got hybrid"),
        ({"vae": "runs/vae"}, "vae must be left out with .*, which is of pixels"),
    ],
)
def test_options_that_contradict_the_pipeline_are_refused(ours, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, ours, **settings)


def test_options_that_say_what_the_pipeline_says_are_taken(ours, tmp_path):
    config = config_of(
        tmp_path, ours, path="vp", prediction_type="sample", num_train_timesteps=100, block_out_channels=(8, 16)
    )
    assert config.path == "pretrained"


@pytest.mark.parametrize("given, taken", [(None, 0.25), (0.0, 0.0), (0.5, 0.5)])
def test_dropout_is_that_of_the_pipeline_or_as_given_and_written_down(tmp_path, given, taken):
    pipe = GuidedDiffusionPipeline(tiny_unet(dropout=0.25), ExtDDIMScheduler())
    pipe.save_pretrained(tmp_path / "begun")
    options = {"unconditional": True, "max_train_steps": 1} | ({} if given is None else {"dropout": given})
    after, _ = run(tmp_path / "run", str(tmp_path / "begun"), **options)
    assert after.denoiser.config.dropout == taken
    assert yaml.safe_load((tmp_path / "run" / "train_config.yaml").read_text())["dropout"] == taken


def test_what_cannot_be_begun_with_is_refused(folder, ours, tmp_path):
    with pytest.raises(ValueError, match="path pretrained is that of a pretrained_pipeline"):
        TrainConfig(path="pretrained")
    with pytest.raises(ValueError, match="cannot be loaded as a pipeline"):
        config_of(tmp_path, str(tmp_path))
    GuidedDiffusionPipeline(DiTModel(8, 4, 1, None, 16, 1, 2), ExtDDIMScheduler()).save_pretrained(folder / "dit")
    with pytest.raises(ValueError, match="positions of no other grid, got 16x16: give --resolution 8 8"):
        main(config_of(tmp_path / "run", str(folder / "dit"), resolution=(16,)))
    with pytest.raises(ValueError, match="the 1 channels that .* takes, got 3; see --image_mode"):
        main(config_of(tmp_path / "run", ours, image_mode="RGB"))
    DDPMPipeline(tiny_stock_unet(num_class_embeds=3), DDPMScheduler()).save_pretrained(folder / "labelled")
    with pytest.raises(ValueError, match="must have labels for .* has no label that stands for none"):
        main(config_of(tmp_path / "run", str(folder / "labelled"), unconditional=True))


def test_a_folder_that_was_written_again_is_read_again(tmp_path):
    pipe = GuidedDiffusionPipeline(tiny_unet(), ExtDDIMScheduler(prediction_type="epsilon"))
    pipe.save_pretrained(tmp_path)
    assert read_pretrained(str(tmp_path)).prediction_type == "epsilon"
    pipe.scheduler.register_to_config(prediction_type="sample")
    pipe.save_pretrained(tmp_path)
    assert read_pretrained(str(tmp_path)).prediction_type == "sample"


class OfLabels:
    """What `joined_labels` asks of a pipeline."""

    def __init__(self, num_classes, id2label):
        self.num_classes, self.id2label = num_classes, id2label


@pytest.mark.parametrize(
    ("pipeline", "data", "expected"),
    [
        ((2, {0: "cat", 1: "dog"}), ["dog", "eel"], ["cat", "dog", "eel"]),
        ((2, {0: "cat", 1: "dog"}), ["0", "1", "2"], ["cat", "dog", "2"]),  # numbers, which are no names
        ((2, None), ["dog", "eel", "ant"], ["dog", "eel", "ant"]),
        ((3, None), ["dog"], ["dog", "1", "2"]),
        ((None, None), ["dog", "eel"], ["dog", "eel"]),
        ((2, {0: "0", 1: "1"}), ["dog"], ["0", "1", "dog"]),
    ],
)
def test_labels_are_matched_by_name_where_both_have_names_and_else_by_id(pipeline, data, expected):
    joined = joined_labels(OfLabels(*pipeline), dict(enumerate(data)))
    assert joined == dict(enumerate(expected))


def test_a_unet_of_this_package_keeps_its_class(from_ours):
    assert type(from_ours[0].denoiser) is UNetModel
