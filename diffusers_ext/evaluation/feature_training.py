"""Training of the feature classifier, and the loop that it shares with the training without labels.

`training/train_features.py` is the command for both, and `training/evaluate.py` calls them where no features are given.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_ext.evaluation.labelled_images import LabelledImages
from diffusers_ext.machine import is_fast_at_bf16
from diffusers_ext.metrics.features import FeatureClassifierModel, scaled_samples


@dataclass(frozen=True)
class FeatureTraining:
    """How the network of features is trained: with AdamW and a learning rate that rises for a fifth of the steps and then falls to 0.

    Args:
        num_epochs: Passes over the images; by default enough for some 275 000 images, at least 1 and at most 20.
        num_steps: So many steps, in place of epochs.
        batch_size: Images a step, over all processes; by default 128, or fewer to make 24 steps an epoch, at least 16.
        learning_rate: The peak.
        random_flip: Mirror each image with probability 1/2; not for digits or letters.
        seed: Of the weights, the order and what is drawn. On one machine, the same seed gives the same weights.
        bf16: Train under bf16 autocast; by default, where the device is fast at it. The weights stay float32.
        alone: Train in this process by itself, however many there are, and however their networks are spread.
    """

    num_epochs: int | None = None
    num_steps: int | None = None
    batch_size: int | None = None
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    random_flip: bool = False
    seed: int = 0
    bf16: bool | None = None
    alone: bool = False
    show_progress: bool = True

    def run(
        self,
        train: LabelledImages,
        build: Callable[[], nn.Module],
        loss_of: Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor],
        title: str,
    ) -> nn.Module:
        """The trained network in evaluation mode, float32, on the device that accelerate chose.

        Args:
            build: Makes it; called once the seed is set.
            loss_of: Of the network, a batch of images as `train` has them, their labels, and a generator on the CPU.
            title: Of the progress.

        Raises:
            ValueError: if there are too few images, or the loss is not finite.
        """
        num_epochs, batch_size = _choose_length(len(train), self.num_epochs, self.batch_size)
        accelerator = _Alone() if self.alone else Accelerator()
        # Batch normalisation needs at least two images.
        batch_size = max(2, min(batch_size, len(train)) // accelerator.num_processes)
        device = accelerator.device.type
        bf16 = is_fast_at_bf16(device) if self.bf16 is None else self.bf16
        autocast = torch.autocast(device, torch.bfloat16, enabled=bf16)
        set_seed(self.seed)
        model = build().to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        loader = DataLoader(train, batch_size, shuffle=True, drop_last=True)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

        num_steps = self.num_steps or num_epochs * len(loader)
        schedule = get_cosine_schedule_with_warmup(optimizer, num_steps // 5, num_steps)
        generator = torch.Generator().manual_seed(self.seed + accelerator.process_index)
        hidden = not (self.show_progress and accelerator.is_local_main_process)
        model.train()
        with tqdm(total=num_steps, desc=title, disable=hidden) as progress:
            for epoch, done in enumerate(range(0, num_steps, len(loader)), start=1):
                for batch in itertools.islice(loader, num_steps - done):
                    images, labels = (each.to(accelerator.device) for each in batch)
                    with autocast:
                        loss = loss_of(model, images, labels, generator)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                    progress.update()
                if not math.isfinite(loss.item()):
                    raise ValueError(f"the loss is {loss.item()} after epoch {epoch}: lower learning_rate")
        return accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()


class _Alone:
    """What a training asks of an `Accelerator`, by a process alone."""

    num_processes, process_index, is_local_main_process = 1, 0, True

    def __init__(self):
        self.device = PartialState().device

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader) -> tuple:
        return model.to(self.device), optimizer, loader

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def unwrap_model(self, model: nn.Module, keep_fp32_wrapper: bool) -> nn.Module:
        return model


def fit_feature_classifier(train: LabelledImages, **settings) -> FeatureClassifierModel:
    """Trains a classifier of the labels.

    Args:
        train: The images to train on.
        settings: Of `FeatureTraining`.

    Returns:
        The model in evaluation mode, float32, on the device that accelerate chose.

    Raises:
        ValueError: if there are too few images, or the loss is not finite.
    """
    training = FeatureTraining(**settings)

    def loss_of(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        images = _mirrored_at_random(images, generator) if training.random_flip else images
        return F.cross_entropy(model(scaled_samples(images, train.value_scale)), labels)

    build = partial(new_network, train, train.label_names)
    return training.run(train, build, loss_of, "training the feature classifier")


def new_network(train: LabelledImages, label_names: list[str] | None) -> FeatureClassifierModel:
    """A network of the size that suits these images, of such classes, or without."""
    scale = None if train.value_scale is None else train.value_scale.to_config()
    return FeatureClassifierModel.for_images(tuple(train.images.shape[1:]), label_names, scale)


def _choose_length(num_images: int, num_epochs: int | None, batch_size: int | None) -> tuple[int, int]:
    """Epochs, and images of a step over all processes, with the defaults of `fit_feature_classifier`."""
    if num_images < 2:
        raise ValueError(f"training needs at least 2 images, got {num_images}")
    if num_epochs is None:
        num_epochs = min(max(round(275_000 / num_images), 1), 20)
    if num_epochs < 1:
        raise ValueError(f"num_epochs must be at least 1, got {num_epochs}")
    return num_epochs, min(max(num_images // 24, 16), 128) if batch_size is None else batch_size


def _mirrored_at_random(images: Tensor, generator: torch.Generator) -> Tensor:
    flip = torch.rand(len(images), generator=generator).lt(0.5).to(images.device)
    return torch.where(flip.view(-1, *[1] * (images.ndim - 1)), images.flip(-1), images)


def accuracy(model: FeatureClassifierModel, data: LabelledImages) -> float:
    """Share of the images, in [0, 1], whose label the model gives."""
    _, labels = model.measure(data.images)
    return (labels == data.labels).double().mean().item()
