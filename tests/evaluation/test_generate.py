import diffusers
import pytest
import torch
from accelerate import PartialState, debug_launcher
from PIL import Image

from diffusers_ext import ExtDDIMScheduler, ExtDDPMScheduler, GuidedDiffusionPipeline, UNetModel
from diffusers_ext.evaluation.generate import generate_images, shared_by_processes
from diffusers_ext.evaluation.label_shares import balanced_labels
from diffusers_ext.evaluation.labelled_images import convert_channels
from diffusers_ext.evaluation.pipeline_facts import default_of, image_size_of, num_labels_of


def make_pipeline(num_classes=3, scheduler=ExtDDPMScheduler, sample_size=8):
    torch.manual_seed(0)
    unet = UNetModel(
        sample_size=sample_size,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        num_classes=num_classes,
    )
    for parameter in unet.parameters():  # a new network's output is 0, whatever it is asked for
        torch.nn.init.normal_(parameter, std=0.1)
    return GuidedDiffusionPipeline(denoiser=unet, scheduler=scheduler(timestep_spacing="trailing"))


def make_stock_pipeline(channels=3):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    return diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())


@pytest.mark.parametrize("make", [make_pipeline, make_stock_pipeline])
def test_an_image_does_not_depend_on_the_batch_or_the_process(make):
    pipeline = make()
    labels = balanced_labels(7, 3) if make is make_pipeline else None
    settings = {"labels": labels, "num_inference_steps": 3, "show_progress": False}
    whole = generate_images(pipeline, range(7), batch_size=7, **settings).int()
    for first in (0, 1):  # as two processes share the work
        part = generate_images(pipeline, range(first, 7, 2), batch_size=2, **settings).int()
        assert (part - whole[first::2]).abs().max() <= 1  # batches may round differently
    assert whole.float().std(0).max() > 1  # images differ
    other = generate_images(pipeline, range(7), seed=1, **settings).int()
    assert (other - whole).abs().float().mean() > 5


def test_images_are_those_of_the_pipeline_called_by_hand():
    pipeline = make_pipeline(scheduler=ExtDDIMScheduler)
    images = generate_images(
        pipeline, [4], labels=[0, 0, 0, 0, 2], num_inference_steps=3, guidance_scale=2.0, seed=2, show_progress=False
    )
    by_hand = pipeline(
        class_labels=[2],
        num_inference_steps=3,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(2_000_004),
        output_type="pil",
    ).images[0]
    assert images.dtype == torch.uint8 and images.shape == (1, 1, 8, 8)
    assert bytes(images.flatten().tolist()) == by_hand.tobytes()


@pytest.mark.parametrize("num_images, counts", [(9, [3, 3, 3]), (10, [4, 3, 3])])
def test_labels_are_balanced(num_images, counts):
    assert torch.tensor(balanced_labels(num_images, 3)).bincount().tolist() == counts


def test_what_a_pipeline_says_of_itself():
    assert num_labels_of(make_pipeline()) == 3
    assert num_labels_of(make_pipeline(num_classes=None)) is None
    assert num_labels_of(make_stock_pipeline()) is None
    assert image_size_of(make_pipeline(sample_size=(8, 12))) == (8, 12)
    assert image_size_of(make_stock_pipeline()) == (8, 8)
    assert default_of(make_stock_pipeline(), "num_inference_steps") == 1000
    assert default_of(make_stock_pipeline(), "guidance_scale") is None


def test_channels_are_converted_as_pillow_does():
    colour = torch.randint(256, (5, 3, 4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    grey = convert_channels(colour, 1)
    for ours, picture in zip(grey, colour, strict=True):
        pillow = Image.fromarray(picture.permute(1, 2, 0).numpy()).convert("L")
        assert (ours.flatten().int() - torch.tensor(list(pillow.tobytes()))).abs().max() <= 1  # it truncates
    assert convert_channels(colour, 3) is colour
    assert convert_channels(convert_channels(grey, 3), 1).equal(grey)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="DDPMPipeline takes no guidance_scale: leave what says it out"):
        generate_images(make_stock_pipeline(), [0], guidance_scale=2.0)
    with pytest.raises(ValueError, match="DDPMPipeline takes no class_labels"):
        generate_images(make_stock_pipeline(), [0], labels=[1])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        generate_images(make_stock_pipeline(), [0], batch_size=0)
    with pytest.raises(ValueError, match="images of 4 channels cannot be compared with a data set of 1 channels"):
        convert_channels(torch.zeros(1, 4, 8, 8, dtype=torch.uint8), 1)

    broken = make_pipeline()
    torch.nn.init.constant_(next(broken.denoiser.parameters()), torch.nan)
    with pytest.raises(ValueError, match="made NaN or infinity for images 3 to 4"):
        generate_images(broken, [3, 4], labels=[0] * 5, num_inference_steps=2, show_progress=False)


def save_shares(folder):
    state = PartialState(cpu=True)
    for number in (1, 5):
        made = []

        def make(indices, made=made):
            made.extend(indices)
            return torch.tensor(indices).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).to(torch.uint8)

        images = shared_by_processes(number, make)
        assert images.shape == (number, 1, 2, 2) and images[:, 0, 0, 0].tolist() == list(range(number))
        (folder / f"{number}-{state.process_index}.txt").write_text(repr(made))


def test_processes_share_the_images_also_where_some_have_none(tmp_path):
    debug_launcher(save_shares, args=(tmp_path,), num_processes=2)
    read = {path.stem: path.read_text() for path in tmp_path.iterdir()}
    assert read == {"1-0": "[0]", "1-1": "[]", "5-0": "[0, 2, 4]", "5-1": "[1, 3]"}
