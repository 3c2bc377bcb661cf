"""One label, several at once, and weights of labels."""

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.guiders import ClassifierFreeGuidance

from diffusers_ext import ComposedGuidance, DiTModel, ExtDDIMScheduler, ExtDDPMScheduler, GuidedDiffusionPipeline
from diffusers_ext.models.embeddings import TimestepEmbedding
from tiny import tiny_unet


NAMES = {0: "ankle boot", 1: "bag", 2: "coat"}


def pipeline(kind="unet", scheduler=None):
    model = tiny_unet(3)
    if kind == "dit":
        model = DiTModel(
            sample_size=8, in_channels=1, hidden_size=16, num_layers=1, num_attention_heads=2, num_classes=3
        )
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    pipe = GuidedDiffusionPipeline(model, scheduler or ExtDDIMScheduler(clip_sample=False), id2label=NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(pipe, class_labels, count=1, **kwargs):
    kwargs = {"num_inference_steps": 3, "output_type": "latent", "generator": generators(*range(count))} | kwargs
    return pipe(class_labels, **kwargs).images


def test_the_embedding_of_a_set_is_the_sum_of_its_labels():
    embedding = TimestepEmbedding(8, 4, num_classes=3)
    single = embedding.embed_labels(torch.arange(4))
    sets = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0]])
    expected = torch.stack([single[0], single[1] + single[2], single[:3].sum(0), single[3]])
    for dtype in (torch.bool, torch.int64, torch.float32):
        torch.testing.assert_close(embedding.embed_labels(sets.to(dtype)), expected)
    with pytest.raises(ValueError, match=r"or \(batch, 3\) for sets of labels, got \(2, 4\)"):
        embedding.embed_labels(torch.zeros(2, 4))


@pytest.mark.parametrize("kind", ["unet", "dit"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_sets_of_labels_reach_the_network(kind, scale):
    pipe = pipeline(kind)
    kwargs = {"guidance_scale": scale}
    one = sample(pipe, [1], **kwargs)
    torch.testing.assert_close(sample(pipe, [["bag"]], **kwargs), one, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sample(pipe, [[]]), sample(pipe, None), rtol=1e-4, atol=1e-4)
    both = sample(pipe, [["bag", 2]], **kwargs)
    assert not torch.allclose(both, one, rtol=1e-2, atol=1e-2)
    assert torch.equal(both, sample(pipe, [{2, 1}], **kwargs))
    multi_hot = torch.tensor([[0, 1, 1]])
    assert torch.equal(both, sample(pipe, multi_hot, **kwargs))
    assert torch.equal(both, sample(pipe, multi_hot.bool().numpy(), **kwargs))
    together = sample(pipe, [["bag", 2], 1, []], 3, **kwargs)
    torch.testing.assert_close(together[0], both[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("low_memory", [False, True])
def test_weights_add_up_the_directions_of_labels(low_memory):
    pipe, noise = pipeline(), torch.randn(2, 1, 8, 8)
    images = pipe(
        [{"bag": 2.0, 0: -0.5}, {2: 1.5}], latents=noise, timesteps=[600], output_type="latent", low_memory=low_memory
    ).images
    with torch.no_grad():
        boot, bag, coat, null = (pipe.denoiser(noise, 600, torch.tensor([label] * 2)).sample for label in range(4))
    eps = torch.stack([(null + 2.0 * (bag - null) - 0.5 * (boot - null))[0], (null + 1.5 * (coat - null))[1]])
    alpha_bar = pipe.scheduler.schedule.alpha_bar[600].float()
    torch.testing.assert_close(images, (noise - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt(), rtol=1e-4, atol=1e-3)


def test_one_weight_is_classifier_free_guidance():
    pipe = pipeline()
    torch.testing.assert_close(sample(pipe, {"coat": 3.0}), sample(pipe, 2, guidance_scale=3.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        sample(pipe, {"coat": 3.0}, guidance_rescale=0.7),
        sample(pipe, 2, guidance_scale=3.0, guidance_rescale=0.7),
        rtol=1e-4,
        atol=1e-4,
    )


def test_weights_that_add_up_to_one_need_no_null_label():
    """The weighted mean of the labels' predictions; one label of weight 1 is that label, at the price of one call."""
    pipe, noise, sizes = pipeline(), torch.randn(2, 1, 8, 8), []
    kwargs = {"latents": noise, "timesteps": [600], "output_type": "latent"}
    hook = pipe.denoiser.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    plain, one = (pipe(labels, **kwargs).images for labels in ([1, 2], [{1: 1.0}, {2: 1.0}]))
    both, more = (pipe([{0: 0.25, 1: 0.75}, {2: weight}], **kwargs).images for weight in (1.0, 1.5))
    hook.remove()
    assert sizes == [2, 2, 4, 6]
    torch.testing.assert_close(one, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[0], more[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[1], plain[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight", [1.3, 0.37, 0.71])
def test_weights_add_up_to_one_but_for_their_rounding(weight):
    pipe = pipeline()
    pipe.denoiser.register_to_config(learned_unconditional=False)
    pipe({0: weight, 1: 1 - weight}, num_inference_steps=2, output_type="latent")
    with pytest.raises(ValueError, match="weights of labels that do not add up to 1"):
        pipe({0: weight, 1: 1.01 - weight}, num_inference_steps=2, output_type="latent")


def test_weights_of_one_label_under_two_names_add_up():
    pipe = pipeline()
    torch.testing.assert_close(sample(pipe, {"bag": 2.0, 1: 1.0}), sample(pipe, {1: 3.0}))


def test_weights_may_come_with_their_guider():
    pipe, guider = pipeline(), ComposedGuidance(0.7)
    expected = sample(pipe, {1: 3.0}, guidance_rescale=0.7)
    sample(pipe, [{0: 2.0, 2: 1.0}, {1: 1.0}], 2, guider=guider)  # of which nothing is left in the guider
    assert torch.equal(sample(pipe, {1: 3.0}, guider=guider), expected)
    pipe.register_modules(guider=ClassifierFreeGuidance(5.0))
    with pytest.raises(ValueError, match="which goes with no ClassifierFreeGuidance; for this call give guider=Comp"):
        sample(pipe, {1: 3.0})
    assert torch.equal(sample(pipe, {1: 3.0}, guider=guider), expected)


def test_image_i_of_weights_is_the_same_alone_and_in_a_batch():
    pipe, wishes = pipeline(scheduler=ExtDDPMScheduler()), [{0: 2.0}, {1: 1.0, 2: 2.0, 0: 0.5}, {}]
    together = sample(pipe, wishes, 3)
    for i, wish in enumerate(wishes):
        alone = sample(pipe, [wish], generator=generators(i))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "labels, kwargs, message",
    [
        ([["bag", "boots"]], {}, "no label named 'boots'; near ones are 'ankle boot'"),
        ([{5: 1.0}], {}, r"must be in \[0, 2\], or 3 for no label, got 5"),
        ([{1: float("nan")}], {}, "the weight of a label must be finite, got nan for 1"),
        (torch.tensor([[0, 1]]), {}, r"zeros and ones of shape \(images, 3\), got shape \(1, 2\)"),
        (torch.tensor([[0, 0.5, 1]]), {}, "got shape .* of other numbers"),
        ([{1: "2"}], {}, "the weight of a label must be finite, got '2' for 1"),
        ([1], {"guider": ComposedGuidance()}, "ComposedGuidance needs class_labels with weights"),
        ([{1: 2.0}, 1], {}, "weights for all images or for none"),
        ([1, {1: 2.0}], {}, "weights for all images or for none"),
        ([{1: 2.0}], {"guidance_scale": 2.0}, "a guidance of their own"),
        ([{1: 2.0}], {"guider": ClassifierFreeGuidance(2.0)}, "a guidance of their own"),
        ([{1: 2.0}], {"guidance_interval": (0, 0.5)}, "guidance_interval must not be given with weights"),
        ([[1, 2], [0]], {"batch_size": 3}, "batch_size has 3, class_labels has 2"),
    ],
)
def test_bad_input_is_refused(labels, kwargs, message):
    with pytest.raises(ValueError, match=message):
        sample(pipeline(), labels, **kwargs)


@pytest.mark.parametrize(
    "names, label, message",
    [
        (
            ["2018", "2019", "2020"],
            "cat",
            "'cat'; its labels are named numbers, as texts or as ids: '2018', '2019', '2020'",
        ),
        (["2018", "2019", "2020"], "2021", "'2021'; near ones are '2020', '2019', '2018'"),
        (["2018", "2019", "2020"], 2018, "or 3 for no label, got 2018; the label named '2018' is asked for by name"),
        (["bag", "boot", "coat"], "x", "'x'; its labels are named 'bag', 'boot', 'coat'"),
        (None, "cat", "'cat'; this model's labels have no names"),
    ],
)
def test_a_label_that_is_not_there_is_answered_with_those_that_are(names, label, message):
    pipe = pipeline()
    pipe.register_to_config(id2label=names and {str(number): name for number, name in enumerate(names)})
    with pytest.raises(ValueError, match=message):
        pipe.get_label_ids(label)
    if names:
        assert pipe.get_label_ids(names) == [0, 1, 2]


def test_sets_and_weights_need_networks_that_take_them():
    model = UNet2DModel(
        8,
        1,
        1,
        block_out_channels=(16,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=["DownBlock2D"],
        up_block_types=["UpBlock2D"],
        num_class_embeds=3,
    )
    pipe = GuidedDiffusionPipeline(model, ExtDDIMScheduler())
    with pytest.raises(ValueError, match="one label for each image for UNet2DModel, got sets"):
        pipe([[1, 2]])
    with pytest.raises(ValueError, match="do not add up to 1 need a model with a null label"):
        pipe([{1: 2.0}])
