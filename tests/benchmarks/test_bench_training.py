import pytest
import torch
from torch import nn

from diffusers_ext.data.prepare import prepare_images
from runs import forget_accelerate
from tiny import tiny_unet


@pytest.fixture(scope="module")
def bench(script):
    yield script("bench_training")
    forget_accelerate()


def test_operations_are_those_of_the_layers_three_times_over(bench):
    """The backward pass of a layer is two products of the size of the forward's."""
    model, forward = tiny_unet(), []

    def count(layer, inputs, output):
        inner = layer.in_features if isinstance(layer, nn.Linear) else layer.weight[0].numel()
        forward.append(2 * output.numel() * inner)

    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(count)
    model(torch.zeros(1, 1, 8, 8), torch.tensor([1]))
    assert bench.count_flops(tiny_unet(), 1, (8, 8)) == pytest.approx(3 * sum(forward), rel=0.05)


@pytest.mark.parametrize("channels_last", [True, False])
def test_both_loops_take_turns(bench, tmp_path, channels_last):
    forget_accelerate()
    data = prepare_images("digits", unconditional=True, max_samples=20)
    settings = {"unconditional": True, "train_batch_size": 2, "max_train_steps": 5, "mixed_precision": "no"}
    config = bench.TrainConfig(
        output_dir=str(tmp_path / "run"), num_threads=1, channels_last=channels_last, **settings
    )
    seconds = bench.time_loops(config, data, tiny_unet)
    assert set(seconds) == {"diffusers", "ours"} and all(0 < value < 10 for value in seconds.values())


def test_peak_of_the_memory_is_the_scripts_own(bench, tmp_path):
    """Not that of this process, which holds more than either."""
    (tmp_path / "small.py").write_text("pass")
    (tmp_path / "large.py").write_text("import sys\nblock = b'x' * (int(sys.argv[1]) << 20)\ndel block")
    small = bench.peak_memory([str(tmp_path / "small.py")], 1)
    large = bench.peak_memory([str(tmp_path / "large.py"), "64"], 1)
    assert small < 60 and 60 < large - small < 70
    with pytest.raises(RuntimeError, match=r"(?s)large.py failed:.*IndexError"):
        bench.peak_memory([str(tmp_path / "large.py")], 1)
