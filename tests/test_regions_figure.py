"""The figure of labels in halves of an image, small."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_ext import ExtDDIMScheduler, GuidedDiffusionPipeline
from tiny import tiny_unet


SCRIPT = Path(__file__).parents[1] / "docs" / "figures" / "make_regions.py"


def test_halves_are_classified_and_each_pair_is_drawn(tmp_path):
    spec = importlib.util.spec_from_file_location("make_regions", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    names = {label: str(label) for label in range(10)}
    pipeline = GuidedDiffusionPipeline(tiny_unet(num_classes=10), ExtDDIMScheduler(), id2label=names)
    pipeline.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "train_config.yaml").write_text("dataset_name: digits\n")
    picture = tmp_path / "regions.png"
    lines = script.main(str(tmp_path / "run"), str(picture), steps=1).splitlines()
    assert len(lines) == 5 and lines[3].startswith("| a label in each half | ")
    shares = [float(cell.rstrip("% ")) for cell in lines[2].split("|")[2:4]]
    assert min(shares) > 80  # of halves of digits
    assert Image.open(picture).width > 500

    # Real images of two digits side by side are found by both.
    _, real = script.load(tmp_path / "run")
    classify, right = script.classifiers_of(real)
    left, other = (real.held_out.images[real.held_out.labels == label][:5] for label in (0, 1))
    joined = left.clone()
    joined[..., 4:] = other[..., 4:]
    table = script.table_of({"joined": joined}, [(0, 1)] * 5, classify, right)
    assert float(table.splitlines()[-1].split("|")[-2].strip("% ")) == pytest.approx(100, abs=41)
    assert np.isfinite(right).all()
