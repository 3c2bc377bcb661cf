"""Sets of known quality are what their names say, and are ordered beside the first network."""

import pytest
import torch

from diffusers_ext import ExtDDIMScheduler, GuidedDiffusionPipeline
from diffusers_ext.evaluation.labelled_images import LabelledImages
from diffusers_ext.evaluation.real_images import RealImages
from tiny import tiny_unet


@pytest.fixture(scope="module")
def bench(script):
    return script("bench_features")


def test_each_set_is_farther_from_the_held_out_images_than_the_one_before(bench):
    pixels = torch.randint(256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images = LabelledImages(pixels, torch.arange(40) % 2, ["even", "odd"])
    pipeline = GuidedDiffusionPipeline(tiny_unet(num_classes=2), ExtDDIMScheduler(timestep_spacing="trailing"))
    sets = bench.image_sets(RealImages(images, images, "draws", "crop", ()), pipeline, 30)
    assert len(sets) == 11 and all(one.dtype == torch.uint8 and one.shape == (30, 1, 8, 8) for one in sets.values())
    assert torch.equal(sets["held out"], pixels[:30])
    errors = {name: (one.double() - pixels[:30]).square().mean().sqrt().item() for name, one in sets.items()}
    assert errors["noise 8"] < errors["noise 16"] < errors["noise 32"] < 32
    assert 0 < errors["blur 0.5"] < errors["blur 0.75"] < errors["blur 1"]
    assert not torch.equal(sets["2 steps"], sets["25 steps"])


def test_the_table_ends_with_the_correlation_of_ranks_with_the_first_column(bench):
    columns = {"labels": {"a": 1.0, "b": 2.0, "c": 30.0}, "none": {"a": 5.0, "b": 7.0, "c": 8.0}}
    table = bench.table(columns | {"pixels": {"a": 3.0, "b": 2.0, "c": 1.0}}).splitlines()
    assert table[0] == "| images | labels | none | pixels |" and "| c | 30 | 8 | 1 |" in table
    assert table[-1] == "| Spearman's correlation | 1.00 | 1.00 | -1.00 |"
