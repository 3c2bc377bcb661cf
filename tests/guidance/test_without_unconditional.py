"""Models that were trained with a label or text on each image, and so know no prediction without."""

import json

import pytest
import torch
from diffusers import DiTPipeline
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    SkipLayerGuidance,
)

from diffusers_ext import (
    ClassifierGuidance,
    ComposedGuidance,
    DiTModel,
    ExtDDIMScheduler,
    GuidedDiffusionPipeline,
    NoisyClassifierModel,
    TextGuidedDiffusionPipeline,
    UNetModel,
    VAEModel,
    WeakModelGuidance,
)
from diffusers_ext.schedulers.levels import describe_path
from tiny_text import tiny_clip, tiny_text_unet, tiny_tokenizer


def unet(**config):
    return UNetModel(8, 1, 1, (8, 16), 1, num_classes=3, **config)


def dit(**config):
    return DiTModel(8, 2, 1, hidden_size=16, num_layers=2, num_attention_heads=2, num_classes=3, **config)


MODELS = {"unet": unet, "dit": dit}
WITHOUT = {"learned_unconditional": False}


def randomised(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def pipeline(make, **config):
    scheduler = ExtDDIMScheduler()
    classifier = NoisyClassifierModel(8, 1, 3, (8, 16), 1, noise_schedule=describe_path(scheduler))
    model, weak = (randomised(make(**config)) for _ in range(2))
    pipe = GuidedDiffusionPipeline(model, scheduler, classifier=randomised(classifier), weak_denoiser=weak)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, class_labels, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return pipe(class_labels, num_inference_steps=4, generator=generator, output_type="pt", **kwargs).images


@pytest.mark.product
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    "guidance",
    [
        {"guidance_scale": 3.0},
        {"guidance_scale": 0.0},
        {"guidance_scale": 3.0, "guidance_interval": (0.5, 1.0)},
        {"guider": ClassifierFreeGuidance(2.0)},
        {"guider": ClassifierFreeZeroStarGuidance(2.0)},
        {"guider": AdaptiveProjectedGuidance(2.0)},
        {"guider": AutoGuidance(2.0, auto_guidance_layers=[0], dropout=1.0)},
        {"guider": SkipLayerGuidance(2.0, skip_layer_guidance_layers=[0])},
        {"guider": ClassifierGuidance(1.0, guidance_scale=0.0)},
        {"guider": ClassifierGuidance(1.0, guidance_scale=2.0)},
        {"classifier_scale": 1.0, "guidance_scale": 2.0},
    ],
    ids=str,
)
def test_guiders_that_need_the_null_label_are_refused(make, guidance):
    with pytest.raises(ValueError, match=r"has no null label \(label_dropout was 0\)"):
        sample(pipeline(make, **WITHOUT), [0, 2], **guidance)
    sample(pipeline(make), [0, 2], **guidance)


@pytest.mark.product
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    "asked",
    [
        {"class_labels": [0, 2]},
        {"class_labels": 1, "guidance_scale": 1.0},
        {"class_labels": 1, "guidance_scale": 3.0, "guidance_interval": (0.0, 0.0)},
        {"class_labels": [[0, 2], [1]]},
        {"class_labels": {0: 0.25, 1: 0.75}},
        {"class_labels": [{0: 0.25, 1: 0.75}, {2: 1.0}]},
        {"class_labels": 1, "classifier_scale": 2.0},
        {"class_labels": 1, "guider": WeakModelGuidance(2.0)},
        {"class_labels": 1, "guider": ClassifierFreeGuidance(2.0, enabled=False)},
    ],
    ids=str,
)
def test_what_needs_no_null_label_is_as_with_one(make, asked):
    assert torch.equal(sample(pipeline(make, **WITHOUT), **asked), sample(pipeline(make), **asked))


@pytest.mark.product
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    "labels, message",
    [
        (None, "class_labels must be given"),
        (3, r"class_labels must be in \[0, 2\], got 3"),
        ([[0], []], "at least one label for each image: the model has no null label"),
        (torch.tensor([[1, 0, 0], [0, 0, 0]]), "at least one label for each image"),
        ({0: 1.0, 1: 1.0}, "do not add up to 1 need a model with a null label"),
        ([{0: 1.0}, {}], "do not add up to 1 need a model with a null label"),
    ],
)
def test_no_label_cannot_be_asked_for(make, labels, message):
    with pytest.raises(ValueError, match=message):
        sample(pipeline(make, **WITHOUT), labels)
    sample(pipeline(make), labels)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_model_refuses_no_label_by_itself(make):
    with pytest.raises(ValueError, match="class_labels must be given: the model has no null label"):
        make(**WITHOUT)(torch.zeros(2, 1, 8, 8), 5)


def test_a_pipeline_of_diffusers_cannot_guide_a_dit_by_a_null_label_that_it_has_not():
    model = DiTModel(4, 2, 4, hidden_size=16, num_layers=1, num_attention_heads=2, num_classes=3, **WITHOUT)
    pipe = DiTPipeline(model, VAEModel(8, 3, 3, (8, 16), 4), ExtDDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe([1], guidance_scale=1.0, num_inference_steps=2, output_type="np")
    with pytest.raises(ValueError, match=r"must be in \[0, 2\], since the model has no null label, got \[3\]"):
        pipe([1], guidance_scale=2.0, num_inference_steps=2, output_type="np")


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_models_say_so_when_saved_and_old_ones_have_a_null_label(make, tmp_path):
    model = make(**WITHOUT)
    model.save_pretrained(tmp_path / "new")
    loaded = type(model).from_pretrained(tmp_path / "new")
    assert loaded.config.learned_unconditional is False
    loaded.register_to_config(learned_unconditional=True)  # after training with dropped labels
    assert GuidedDiffusionPipeline(loaded, ExtDDIMScheduler()).null_label == 3

    config = json.loads((tmp_path / "new" / "config.json").read_text())
    del config["learned_unconditional"]
    (tmp_path / "new" / "config.json").write_text(json.dumps(config))
    old = type(model).from_pretrained(tmp_path / "new")
    assert GuidedDiffusionPipeline(old, ExtDDIMScheduler()).null_label == 3


def text_pipeline(**config):
    tokenizer = tiny_tokenizer()
    pipe = TextGuidedDiffusionPipeline(tiny_text_unet(**config), ExtDDIMScheduler(), tokenizer, tiny_clip(tokenizer))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_texts_are_guided_away_from_a_text_that_the_model_knows_alone():
    pipe, knowing = text_pipeline(**WITHOUT), text_pipeline()
    for asked in (
        {"guidance_scale": 3.0},
        {"guidance_scale": 3.0, "negative_prompt": ""},
        {"guidance_scale": 3.0, "negative_prompt": " "},
        {"guidance_scale": 3.0, "negative_prompt": ("",)},
        {"guider": ClassifierFreeGuidance(2.0)},
    ):
        with pytest.raises(ValueError, match=r"trained without empty texts \(caption_dropout was 0\)"):
            sample(pipe, "red dot", **asked)
        sample(knowing, "red dot", **asked)
    for asked in (
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0, "negative_prompt": "blue"},
        {"negative_prompt": "blue"},
    ):
        assert torch.equal(sample(pipe, "red dot", **asked), sample(knowing, "red dot", **asked))
    # Without a word on guidance there is none, since there is nothing to lead away from.
    assert torch.equal(sample(pipe, "red dot"), sample(knowing, "red dot", guidance_scale=1.0))


def test_composed_guidance_is_what_it_is_for_models_without_labels():
    pipe = GuidedDiffusionPipeline(UNetModel(8, 1, 1, (8, 16), 1), ExtDDIMScheduler())
    with pytest.raises(ValueError, match="weights of labels need a model with labels"):
        ComposedGuidance().check_pipeline(pipe, torch.ones(1, 3))
