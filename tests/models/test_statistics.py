"""What is subtracted and divided by comes back, for whichever label, precision and way of saving."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_ext import DataStatisticsModel, ExtDDIMScheduler, GuidedDiffusionPipeline, NoisyClassifierModel
from tiny import assert_same_weights, tiny_unet


def statistics(num_classes=3, size=8, channels=1, scale="channel"):
    generator = torch.Generator().manual_seed(0)
    rows = 1 if num_classes is None else num_classes + 1
    mean = torch.rand(rows, channels, size, size, generator=generator) - 0.5
    std = 0.3 + torch.rand(channels if scale == "channel" else 1, generator=generator)
    kind = "overall" if num_classes is None else "class"
    return DataStatisticsModel.of(
        *(mean, std),
        sample_size=size,
        in_channels=channels,
        num_classes=num_classes,
        data_mean=kind,
        data_scale=scale,
    )


@pytest.mark.parametrize("labels", [None, [0, 2], [3, 1], [[0.5, 0.5, 0.0], [0.0, 2.0, 0.0]]])
def test_normalised_images_are_those_of_the_definition_and_come_back(labels):
    model, x = statistics(channels=2), torch.rand(2, 2, 8, 8) * 2 - 1
    mean = model.mean.double().numpy()
    if labels is None:
        means = np.stack([mean[3]] * 2)  # no label: the mean of all, which is the last row
    elif isinstance(labels[0], int):
        means = mean[labels]
    else:
        means = np.stack([mean[3] + sum(w * (mean[c] - mean[3]) for c, w in enumerate(row)) for row in labels])
    labels = None if labels is None else torch.tensor(labels)
    expected = (x.double().numpy() - means) / model.std.double().numpy()[None, :, None, None]
    normalised = model.normalise(x, labels)
    np.testing.assert_allclose(normalised.numpy(), expected, atol=1e-5)
    torch.testing.assert_close(model.restore(normalised, labels), x, atol=1e-6, rtol=0)


def test_a_range_of_one_number_cuts_off_no_image_and_is_the_least_that_does_not():
    model = statistics()
    ends = torch.stack([torch.ones(1, 8, 8), -torch.ones(1, 8, 8)]).repeat_interleave(4, 0)
    largest = model.normalise(ends, torch.arange(4).repeat(2)).abs().max().item()
    assert model.largest == pytest.approx(largest, rel=1e-6)
    assert model.largest > 1


def test_numbers_stay_in_float32_in_a_pipeline_of_any_precision_and_through_a_folder(tmp_path):
    model = statistics()
    pipe = GuidedDiffusionPipeline(tiny_unet(3), ExtDDIMScheduler(clip_sample=False), statistics=model)
    pipe.save_pretrained(tmp_path)
    for loaded in (
        DiffusionPipeline.from_pretrained(tmp_path),
        DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16),
        pipe.to(torch.float16),
    ):
        assert_same_weights(loaded.statistics, statistics())
        assert loaded.statistics.fingerprint() == statistics().fingerprint()
        config = {key: loaded.statistics.config[key] for key in ("data_mean", "data_scale", "num_classes")}
        assert config == {"data_mean": "class", "data_scale": "channel", "num_classes": 3}
    without = DiffusionPipeline.from_pretrained(tmp_path, statistics=None)
    assert without.statistics is None


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: DataStatisticsModel(8, 1, data_mean="label"),
            "data_mean must be one of none, overall, class, got 'label'",
        ),
        (lambda: DataStatisticsModel(8, 1, num_classes=3), "num_classes must be given with data_mean 'class'"),
        (lambda: DataStatisticsModel(8, 1, data_mean="class"), "got None with 'class'"),
        (
            lambda: DataStatisticsModel.of(torch.zeros(1, 1, 4, 4), torch.ones(1), sample_size=8, in_channels=1),
            r"mean must have shape \(1, 1, 8, 8\), got \(1, 1, 4, 4\)",
        ),
        (
            lambda: DataStatisticsModel.of(torch.zeros(1, 1, 8, 8), torch.zeros(1), sample_size=8, in_channels=1),
            r"std must be above 0, got \[0.0\]",
        ),
        (
            lambda: DataStatisticsModel.of(
                torch.full((1, 1, 8, 8), torch.nan), torch.ones(1), sample_size=8, in_channels=1
            ),
            "mean must be finite",
        ),
        (lambda: statistics().normalise(torch.zeros(1, 1, 8, 8), torch.ones(1, 3).bool()), "a set of labels has none"),
        (lambda: statistics().normalise(torch.zeros(1, 1, 8, 8), torch.tensor([4])), r"labels must be in \[0, 3\]"),
    ],
)
def test_statistics_that_are_none_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"statistics": statistics(size=4)}, "the denoiser's samples, 1x8x8 .channels first., got those of 1x4x4"),
        ({"statistics": statistics(channels=2)}, "1x8x8 .channels first., got those of 2x8x8: they are of other data"),
        ({"statistics": statistics(num_classes=2)}, "of which it has 3, got those of 2: they are of other data"),
        ({"denoiser": tiny_unet(), "statistics": statistics()}, "of which it has none, got those of 3"),
        ({"statistics": tiny_unet()}, "statistics must be a DataStatisticsModel, got UNetModel"),
        (
            {"statistics": statistics(), "classifier": NoisyClassifierModel(8, 1, 3, (8, 16))},
            "trained on those of none for a pipeline with statistics",
        ),
        (
            {"classifier": NoisyClassifierModel(8, 1, 3, (8, 16), data_statistics="0f")},
            "trained on those of other data for a pipeline with none",
        ),
    ],
)
def test_statistics_of_other_data_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        GuidedDiffusionPipeline(**{"denoiser": tiny_unet(3), "scheduler": ExtDDIMScheduler()} | parts)
