import dataclasses
import pickle
from itertools import islice

import numpy as np
import pytest
import torch

from diffusers_ext.data.batches import BatchOptions, TrainingBatches, make_batches
from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.prepare import prepare_images


@pytest.fixture(scope="module")
def digits():
    return prepare_images("digits", max_samples=50)


OPTIONS = BatchOptions(seed=7, batch_size=8, random_flip=True, label_dropout=0.3)


def joined(data, options, count, first_position=0):
    """The images of `count` optimizer steps in the order of their positions, over all processes."""
    per_process = []
    for process in range(options.num_processes):
        mine = dataclasses.replace(options, process_index=process)
        batches = TrainingBatches(data, mine, first_position)
        per_process.append([batches[number] for number in range(count * options.accumulation)])
    in_order = [batch for together in zip(*per_process, strict=True) for batch in together]
    return {name: torch.cat([batch[name] for batch in in_order]) for name in in_order[0]}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("split", [(4, 2, 1), (2, 1, 4), (2, 2, 2), (8, 1, 1)])
@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
def test_an_images_randomness_is_the_same_however_the_work_is_split(digits, split, sampling):
    """Batch size, processes and accumulation, with 8 images a step. 20 steps cross three epochs of 50 images."""
    whole = dataclasses.replace(OPTIONS, timestep_sampling=sampling)
    batch_size, num_processes, accumulation = split
    parts = dataclasses.replace(whole, batch_size=batch_size, num_processes=num_processes, accumulation=accumulation)
    assert_same(joined(digits, whole, 20), joined(digits, parts, 20))


def test_a_run_goes_on_at_a_position_as_if_it_had_never_stopped(digits):
    whole, rest = joined(digits, OPTIONS, 20), joined(digits, OPTIONS, 13, first_position=7 * 8)
    assert_same({name: value[56:] for name, value in whole.items()}, rest)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(digits, num_workers):
    batches = TrainingBatches(digits, OPTIONS)
    for number, batch in enumerate(islice(make_batches(digits, OPTIONS, num_workers=num_workers), 9)):
        assert_same(batch, batches[number])


def test_a_pickled_copy_makes_the_same_batches(digits):
    batches = TrainingBatches(digits, OPTIONS)
    batches[0]
    assert_same(pickle.loads(pickle.dumps(batches))[3], batches[3])


def test_each_epoch_shows_each_image_once_in_a_new_order():
    rows = np.arange(50, dtype=np.uint8)
    data = ImageData(Rows(rows), None, None, "numbers")
    seen = joined(data, BatchOptions(seed=0, batch_size=10), 15)["pixels"].flatten().reshape(3, 50).numpy()
    for epoch in seen:
        np.testing.assert_array_equal(np.sort(epoch), rows)
    assert (seen[0] != seen[1]).any() and (seen[1] != seen[2]).any()


class Rows:
    """Pixels of one value for each row."""

    shape, dtype = (1, 1, 1), np.dtype("uint8")

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, indices):
        return self.rows[np.asarray(indices)].reshape(-1, 1, 1, 1)


def test_stratified_times_fall_into_every_part_of_the_range(digits):
    times = joined(digits, dataclasses.replace(OPTIONS, batch_size=4, num_processes=2), 30)["time"].reshape(30, 8)
    assert torch.equal((times * 8).floor().sort(1).values, torch.arange(8.0).double().expand(30, 8))
    assert len(times[:, 0].unique()) == 30


@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
def test_times_are_uniform(digits, sampling):
    times = joined(digits, dataclasses.replace(OPTIONS, timestep_sampling=sampling), 250)["time"]
    assert times.min() >= 0 and times.max() < 1
    # Kolmogorov's statistic of 2000 uniform numbers is above 0.0435 once in a thousand.
    distance = (times.sort().values - torch.linspace(0, 1, 2000, dtype=torch.float64)).abs().max()
    assert distance < 0.0435


def test_noise_is_standard_normal_and_no_two_images_share_it(digits):
    noise = joined(digits, OPTIONS, 250)["noise"].flatten(1)  # 2000 images of 64 numbers
    assert noise.mean().abs() < 5 / noise.numel() ** 0.5
    assert (noise.var() - 1).abs() < 5 * (2 / noise.numel()) ** 0.5
    correlation = torch.corrcoef(noise) - torch.eye(2000)
    assert correlation.abs().max() < 6 / 64**0.5


def test_noise_of_latents_is_normal_and_changes_nothing_else(digits):
    with_latents = dataclasses.replace(OPTIONS, latent_shape=(4, 2, 3))
    plain, batch = joined(digits, OPTIONS, 250), joined(digits, with_latents, 250)
    noise = batch.pop("latent_noise")
    assert noise.shape == (2000, 4, 2, 3)
    assert_same(batch, plain)
    assert noise.mean().abs() < 5 / noise.numel() ** 0.5 and (noise.var() - 1).abs() < 5 * (2 / noise.numel()) ** 0.5
    together = torch.cat([noise.flatten(1), plain["noise"].flatten(1)], dim=1)
    assert (torch.corrcoef(together.T) - torch.eye(together.shape[1])).abs().max() < 6 / 2000**0.5
    parts = dataclasses.replace(with_latents, batch_size=2, num_processes=2, accumulation=2)
    assert torch.equal(joined(digits, parts, 250)["latent_noise"], noise)


def test_labels_are_dropped_and_images_flipped_at_their_rates(digits):
    plain = joined(digits, dataclasses.replace(OPTIONS, random_flip=False, label_dropout=0.0), 250)
    mixed = joined(digits, OPTIONS, 250)
    dropped = mixed["labels"] == 10
    assert torch.equal(mixed["labels"][~dropped], plain["labels"][~dropped])
    assert dropped.double().mean() == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / 2000) ** 0.5)
    flipped = (mixed["pixels"] != plain["pixels"]).flatten(1).any(1)
    assert torch.equal(mixed["pixels"][flipped], plain["pixels"][flipped].flip(-1))
    assert flipped.double().mean() == pytest.approx(0.5, abs=5 * 0.5 / 2000**0.5)
    both = (dropped & flipped).double().mean()
    assert both == pytest.approx(0.15, abs=5 * (0.15 * 0.85 / 2000) ** 0.5)


def test_another_seed_is_another_run(digits):
    one, other = joined(digits, OPTIONS, 2), joined(digits, dataclasses.replace(OPTIONS, seed=8), 2)
    assert not torch.equal(one["noise"], other["noise"]) and not torch.equal(one["pixels"], other["pixels"])


def test_unlabelled_data_has_no_labels(digits):
    data = dataclasses.replace(digits, labels=None, id2label=None)
    assert set(TrainingBatches(data, OPTIONS)[0]) == {"pixels", "noise", "time"}


def test_batches_are_in_channels_last(digits):
    batch = TrainingBatches(digits, OPTIONS)[0]
    for name in ("pixels", "noise"):
        assert batch[name].shape == (8, 1, 8, 8)
        assert batch[name].is_contiguous(memory_format=torch.channels_last)
