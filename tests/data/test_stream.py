"""Streams of real files: parquet, WebDataset tars, folders of images."""

import dataclasses
import io
import json
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image

from diffusers_ext.data.batches import BatchOptions, make_batches
from diffusers_ext.data.prepare import prepare_images, prepare_stream
from diffusers_ext.data.stream import Division, StreamReader, load_stream_state, save_stream_state


RNG = np.random.default_rng(0)


def png(array):
    file = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(file, "PNG")
    return file.getvalue()


def numbered(count):
    """Pictures whose first two pixels say which they are; the others are random."""
    pictures = RNG.integers(0, 256, (count, 4, 4, 1), dtype=np.uint8)
    pictures[:, 0, 0, 0], pictures[:, 0, 1, 0] = np.divmod(np.arange(count), 256)
    return pictures


def numbers_of(pixels):
    """The numbers of pictures, shape `(number, height, width, channels)`."""
    return (pixels[:, 0, 0, 0].astype(int) * 256 + pixels[:, 0, 1, 0]).tolist()


def write_parquet(folder, pictures, num_files, rows_per_group=1000):
    """Files of different lengths, with the numbers of the pictures modulo 10 as labels."""
    folder.mkdir()
    ends = np.linspace(0, len(pictures) ** 0.5, num_files + 1) ** 2
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"class {k}" for k in range(10)])}
    for file, (start, end) in enumerate(zip(ends.astype(int)[:-1], ends.astype(int)[1:], strict=True)):
        end = len(pictures) if file == num_files - 1 else end
        rows = {
            "image": [{"bytes": png(picture), "path": None} for picture in pictures[start:end]],
            "label": [number % 10 for number in range(start, end)],
        }
        rows = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        rows.to_parquet(folder / f"train-{file:05}.parquet", batch_size=rows_per_group)
    return str(folder)


def write_tars(folder, files_of_examples, examples_per_tar):
    folder.mkdir()
    for shard, start in enumerate(range(0, len(files_of_examples), examples_per_tar)):
        with tarfile.open(folder / f"train-{shard:04}.tar", "w") as tar:
            for number, files in enumerate(files_of_examples[start : start + examples_per_tar], start=start):
                for extension, content in files.items():
                    entry = tarfile.TarInfo(f"{number:06}.{extension}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return str(folder)


def epochs_of(data, num_readers, count, seed=0):
    """The numbers of the examples that each of the readers gives in each of its first epochs: `[epoch][reader]`."""
    seen = [[[] for _ in range(num_readers)] for _ in range(count)]
    for index in range(num_readers):
        reader = StreamReader(data, seed, index, num_readers)
        for picture, _ in reader:
            epoch = reader.state["epoch"]
            if epoch == count:
                break
            seen[epoch][index] += numbers_of(picture[None])
    return seen


@pytest.mark.product
@pytest.mark.parametrize("num_files, rows_per_group", [(1, 1000), (1, 7), (3, 1000), (4, 1000), (9, 1000)])
@pytest.mark.parametrize("max_samples", [None, 33])
def test_readers_share_each_epoch_without_overlap_or_loss(tmp_path, num_files, rows_per_group, max_samples):
    """As many shards as readers, fewer, more, and a number that does not divide."""
    folder = write_parquet(tmp_path / "data", numbered(50), num_files, rows_per_group)
    data = prepare_stream(folder, shuffle_buffer=8, max_samples=max_samples)
    for num_readers in (1, 2, 3, 4):
        for epoch in epochs_of(data, num_readers, 3):
            assert sorted(sum(epoch, [])) == list(range(max_samples or 50))
            assert all(epoch)


def test_order_follows_from_the_seed_and_differs_between_epochs(tmp_path):
    folder = write_parquet(tmp_path / "data", numbered(200), 4)
    data = prepare_stream(folder, shuffle_buffer=50)
    first, second = epochs_of(data, 2, 2)
    assert epochs_of(data, 2, 2) == [first, second]
    assert epochs_of(data, 2, 1, seed=1)[0] != first
    assert first != second
    (one, other) = (sum(epoch, []) for epoch in (first, second))
    for order in (one, other):
        # Neighbours in a file do not stay together: of 199 pairs about one in 50 would by chance, in a window of 50.
        assert sum(b == a + 1 for a, b in zip(order, order[1:], strict=False)) < 20


def test_more_shards_than_are_opened_singly_are_put_together(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_ext.data.stream.MAX_GROUPS", 4)
    data = prepare_stream(write_parquet(tmp_path / "data", numbered(60), 11), shuffle_buffer=8)
    assert Division(data, 2).num_groups == 4 and Division(data, 6).num_groups == 6
    for epoch in epochs_of(data, 2, 2):
        assert sorted(sum(epoch, [])) == list(range(60))
    # The first and the last of the groups have files from all over.
    ends = (np.linspace(0, 60**0.5, 12) ** 2).astype(int)
    for group, files in ((0, (0, 4, 8)), (3, (3, 7))):
        rows = Division(data, 1).open(group).cast_column("image", datasets.Image())
        numbers = [numbers_of(np.asarray(row["image"])[None, ..., None])[0] for row in rows]
        assert numbers == [number for file in files for number in range(ends[file], ends[file + 1])]


def test_shards_come_in_another_order_each_epoch(tmp_path):
    """Without a buffer the images of a file stay in order, and the files are those of the tar's names."""
    folder = write_tars(tmp_path / "data", [{"png": png(picture)} for picture in numbered(30)], 5)
    data = prepare_stream(folder, shuffle_buffer=1)
    orders = [sum(epoch, []) for epoch in epochs_of(data, 1, 4)]
    files = [[order[k] // 5 for k in range(0, 30, 5)] for order in orders]
    for order, files_of_order in zip(orders, files, strict=True):
        assert order == [5 * file + k for file in files_of_order for k in range(5)]
        assert sorted(files_of_order) == list(range(6))
    assert len({tuple(order) for order in files}) == 4


@pytest.mark.parametrize("kind", ["parquet", "tars"])
def test_memory_does_not_grow_with_the_stream(tmp_path, kind):
    """100 MB of files, of which a window and what is read at a time are 5 MB; what has been read must go."""
    pictures = [png(picture) + bytes(50_000) for picture in numbered(2000)]
    if kind == "tars":
        folder = write_tars(tmp_path / "data", [{"png": content} for content in pictures], 500)
    else:
        (tmp_path / "data").mkdir()
        for file in range(4):
            rows = {"image": [{"bytes": content, "path": None} for content in pictures[file * 500 : file * 500 + 500]]}
            rows = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
            rows.to_parquet(tmp_path / "data" / f"train-{file}.parquet", batch_size=50)
        folder = str(tmp_path / "data")
    del pictures
    examples = iter(StreamReader(prepare_stream(folder, shuffle_buffer=50), 0, 0, 1))
    memory = []
    for _ in range(20):
        for _ in islice(examples, 100):
            pass
        status = Path("/proc/self/status").read_text()
        memory.append(int(status.split("VmRSS:")[1].split()[0]) * 1024)
    assert max(memory[4:]) - memory[3] < 25e6


def test_a_picture_is_equally_likely_at_each_place_of_a_window(tmp_path):
    """500 seeds; each of 6 pictures is at each of 6 places about 83 times."""
    data = prepare_stream(write_parquet(tmp_path / "data", numbered(6), 1), shuffle_buffer=1000)
    counts = np.zeros((6, 6))
    for seed in range(500):
        reader = StreamReader(data, seed, 0, 1)
        order = [numbers_of(picture[None])[0] for picture, _ in islice(reader, 6)]
        counts[np.arange(6), order] += 1
    # Of 36 counts with a standard deviation of 8.3.
    assert abs(counts - 500 / 6).max() < 4 * (500 * 5 / 36) ** 0.5


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def run_of(data, options, count, num_workers=0, state=None, position=0):
    batches = make_batches(data, options, num_workers=num_workers, state=state, position=position)
    return [next(batches) for _ in range(count)], json.loads(json.dumps(batches.state))


OPTIONS = BatchOptions(seed=3, batch_size=4, num_processes=2, process_index=1, random_flip=True, label_dropout=0.2)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same 40 pictures in each of the formats."""
    folder, pictures = tmp_path_factory.mktemp("sources"), numbered(40)
    (folder / "images" / "even").mkdir(parents=True)
    (folder / "images" / "odd").mkdir()
    for number, picture in enumerate(pictures):
        (folder / "images" / ("even", "odd")[number % 2] / f"{number:03}.png").write_bytes(png(picture))
    files = [{"png": png(p), "cls": str(n % 10).encode(), "txt": b"a picture"} for n, p in enumerate(pictures)]
    return {
        "parquet": write_parquet(folder / "parquet", pictures, 6),
        "tars": write_tars(folder / "tars", files, 10),
        "images": str(folder / "images"),
    }


LABEL_NAMES = {"tars": [str(label) for label in range(10)]}


def stream_of(sources, kind, **settings):
    return prepare_stream(sources[kind], **{"label_names": LABEL_NAMES.get(kind), "shuffle_buffer": 6} | settings)


@pytest.mark.product
@pytest.mark.parametrize("kind", ["parquet", "tars", "images"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_goes_on_in_a_window_as_if_it_had_never_stopped(sources, kind, num_workers):
    """Pixels, labels, noise and times, from any batch on; 14 batches of 4 are more than an epoch of 20 a process."""
    data = stream_of(sources, kind)
    whole, end = run_of(data, OPTIONS, 14, num_workers)
    # One batch in a place where a window is in progress, one in the second epoch, and one where the workers' turn differs.
    for stop in (1, 5, 9):
        _, state = run_of(data, OPTIONS, stop, num_workers)
        rest, end_of_rest = run_of(data, OPTIONS, 14 - stop, num_workers, state, position=stop * 8)
        for one, other in zip(whole[stop:], rest, strict=True):
            assert_same(one, other)
        assert end_of_rest == end


def test_one_worker_changes_nothing(sources):
    data = stream_of(sources, "parquet")
    for one, other in zip(run_of(data, OPTIONS, 9)[0], run_of(data, OPTIONS, 9, num_workers=1)[0], strict=True):
        assert_same(one, other)


def test_processes_and_workers_see_each_example_once_an_epoch(sources):
    """Two processes of two workers: 40 pictures are 10 for each of them, which is 5 batches of 2."""
    data, seen = stream_of(sources, "tars"), []
    for process in range(2):
        options = BatchOptions(seed=0, batch_size=2, num_processes=2, process_index=process)
        batches, state = run_of(data, options, 10, num_workers=2)
        seen += [numbers_of(batch["pixels"].permute(0, 2, 3, 1).numpy()) for batch in batches]
        labels = torch.cat([batch["labels"] for batch in batches])
        assert labels.tolist() == [number % 10 for number in sum(seen[-10:], [])]
        assert [reader["epoch"] for reader in state["readers"]] == [0, 0]
    assert sorted(sum(seen, [])) == list(range(40))


def test_stream_and_table_make_the_same_pixels(sources):
    """The same pictures by two roads, cropped to another size and enlarged."""
    for settings in ({"resolution": (8, 6)}, {"resolution": (4, 2), "mode": "RGB"}, {"resize_mode": "pad"}):
        table = prepare_images(sources["images"], **settings)
        stream = stream_of(sources, "images", **settings)
        assert (stream.size, stream.channels, stream.resize_mode) == (table.size, table.channels, table.resize_mode)
        assert (stream.id2label, stream.dtype) == (table.id2label, table.dtype)
        rows = Counter(
            (pixels.tobytes(), label) for pixels, label in zip(table.pixels[range(40)], table.labels, strict=True)
        )
        streamed = Counter((pixels.tobytes(), label) for pixels, label in islice(StreamReader(stream, 0, 0, 1), 40))
        assert rows == streamed


@pytest.mark.parametrize("kind", ["parquet", "tars", "images"])
def test_data_on_the_hub_are_read_alike_at_once_and_as_a_stream(hub, sources, tmp_path, kind):
    """The stream in two workers, which open connections of their own."""
    api = HfApi(token="hf_token_of_alice")
    api.create_repo("alice/pictures", repo_type="dataset")
    api.upload_folder(repo_id="alice/pictures", repo_type="dataset", folder_path=sources[kind])
    settings = {"cache_dir": str(tmp_path), "label_names": LABEL_NAMES.get(kind)}
    table = prepare_images("alice/pictures", **settings)
    asked = len(hub.requests)
    stream = prepare_stream("alice/pictures", **settings)
    batches = make_batches(stream, BatchOptions(seed=0, batch_size=5), num_workers=2)
    seen = set()
    for batch in islice(batches, 16):  # of two shares the smaller is at most 20 images, so that each image is seen
        pixels = batch["pixels"].permute(0, 2, 3, 1).numpy()
        seen.update((p.tobytes(), label) for p, label in zip(pixels, batch["labels"].tolist(), strict=True))
    rows = zip(table.pixels[range(40)], table.labels.tolist(), strict=True)
    assert seen == {(pixels.tobytes(), label) for pixels, label in rows}
    assert len(hub.requests) > asked  # not from what is kept of the other


@pytest.mark.parametrize("kind", ["array", "16 bit"])
def test_streams_of_16_bits_and_of_many_channels_keep_their_values(tmp_path, kind):
    shape = (4, 6, 5) if kind == "array" else (4, 6, 1)
    pixels = RNG.integers(0, 60000, (9, *shape), dtype=np.uint16)
    if kind == "array":
        rows, feature = pixels.tolist(), datasets.Array3D(shape, "uint16")
    else:
        rows, feature = [{"bytes": png(picture), "path": None} for picture in pixels], datasets.Image()
    (tmp_path / "data").mkdir()
    table = datasets.Dataset.from_dict({"bands": rows}, features=datasets.Features({"bands": feature}))
    table.to_parquet(tmp_path / "data" / "train.parquet")
    data = prepare_stream(str(tmp_path / "data"))
    assert (data.size, data.channels, data.dtype, data.num_classes) == ((4, 6), shape[2], np.uint16, None)
    batches, _ = run_of(data, BatchOptions(seed=0, batch_size=9), 1)
    seen = batches[0]["pixels"].permute(0, 2, 3, 1).numpy()
    assert sorted(picture.tobytes() for picture in seen) == sorted(picture.tobytes() for picture in pixels)
    assert "labels" not in batches[0]


def test_captions_beside_images_do_not_get_in_the_way(tmp_path):
    pictures = numbered(5)
    with open(tmp_path / "metadata.jsonl", "w") as file:
        for number, picture in enumerate(pictures):
            (tmp_path / f"{number}.png").write_bytes(png(picture))
            file.write(json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}) + "\n")
    data = prepare_stream(str(tmp_path))
    assert data.num_classes is None
    assert sorted(numbers_of(picture[None])[0] for picture, _ in islice(StreamReader(data, 0, 0, 1), 5)) == [*range(5)]


def test_digits_stream_too():
    data = prepare_stream("digits")
    table = prepare_images("digits")
    seen = Counter((pixels.tobytes(), label) for pixels, label in islice(StreamReader(data, 0, 0, 1), 1500))
    assert seen == Counter(
        (p.tobytes(), label) for p, label in zip(table.pixels[range(1500)], table.labels, strict=True)
    )


def damaged(tmp_path, count, broken):
    files = [{"png": png(picture)} for picture in numbered(count)]
    for number in broken:
        files[number] = {"png": b"no picture"}
    return write_tars(tmp_path / "damaged", files, 10)


def test_a_damaged_image_is_named_and_left_out_alike_on_resume(tmp_path, capsys):
    data = prepare_stream(damaged(tmp_path, 20, [13]), shuffle_buffer=8, max_bad_share=0.1)
    options = BatchOptions(seed=0, batch_size=3)
    whole, end = run_of(data, options, 12)
    err = capsys.readouterr().err
    assert "image 000013.png left out: UnidentifiedImageError" in err
    assert err.count("left out") == 1 + end["readers"][0]["bad"]  # in each epoch
    first = sum((numbers_of(batch["pixels"].permute(0, 2, 3, 1).numpy()) for batch in whole), [])[:19]
    assert sorted(first) == [number for number in range(20) if number != 13]
    for stop in range(1, 12):
        _, state = run_of(data, options, stop)
        rest, end_of_rest = run_of(data, options, 12 - stop, state=state, position=stop * 3)
        assert end_of_rest == end
        for one, other in zip(whole[stop:], rest, strict=True):
            assert_same(one, other)


def test_images_behind_a_resumed_run_are_not_decoded_again(tmp_path, capsys):
    """In one window of all examples the damaged one comes before the place where the run stopped."""
    data = prepare_stream(damaged(tmp_path, 20, [13]), shuffle_buffer=1000, max_bad_share=0.1)
    for seed in range(20):
        reader = StreamReader(data, seed, 0, 1)
        list(islice(reader, 15))
        state = dict(reader.state)
        named = "left out" in capsys.readouterr().err
        assert named == (state["bad"] == 1)
        if named and state["window"] == 0:
            break
    assert named and state["offset"] == 16
    list(islice(StreamReader(data, seed, 0, 1, state), 4))
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_damaged_images_end_the_run(tmp_path, num_workers):
    data = prepare_stream(damaged(tmp_path, 40, range(1, 40, 8)), max_bad_share=0.05)
    batches = make_batches(data, BatchOptions(seed=0, batch_size=4), num_workers=num_workers)
    with pytest.raises(
        ValueError, match=r"^\d of \d+ images of .* cannot be decoded; at most a share of 0.05 may fail"
    ):
        for _ in range(40):
            next(batches)


def test_many_damaged_images_end_a_run_before_its_first_pass_is_over(tmp_path):
    data = prepare_stream(damaged(tmp_path, 40, range(1, 40, 2)), max_bad_share=0.01)
    with pytest.raises(ValueError, match="11 of .* cannot be decoded, the last one: UnidentifiedImageError"):
        list(islice(StreamReader(data, 0, 0, 1), 40))


@pytest.mark.parametrize(
    "files, settings, message",
    [
        (
            {"cls": b"3"},
            {},
            "'cls' holds integers, and a stream is not read ahead .* give --num_classes, the number of",
        ),
        ({"label": b"cat"}, {"label_column": "label"}, "label_column 'label' must hold integers or names, got binary"),
        (
            {"txt": b"cat"},
            {"label_column": "txt"},
            "'txt' holds names, .* give --label_names, all of them in order, or",
        ),
        (
            {"txt": b"cat"},
            {"label_names": ["cat", "dog"]},
            "names for labels, but the data set has no labels: name their",
        ),
        ({"txt": b"cat"}, {"label_column": "text"}, "label_column 'text' is not in the data set; its columns are png"),
    ],
)
def test_labels_that_cannot_be_told_are_refused(tmp_path, files, settings, message):
    folder = write_tars(tmp_path / "data", [{"png": png(picture)} | files for picture in numbered(3)], 3)
    with pytest.raises(ValueError, match=message):
        prepare_stream(folder, **settings)
    assert prepare_stream(folder, unconditional=True).num_classes is None


def test_names_of_labels_are_read_and_others_are_refused(tmp_path):
    animals = [b"cat", b"dog", b"cat", b"cow"]
    files = [{"png": png(picture), "txt": animal} for picture, animal in zip(numbered(4), animals, strict=True)]
    folder = write_tars(tmp_path / "data", files, 4)
    settings = {"label_column": "txt"}
    data = prepare_stream(folder, label_names=["cow", "cat", "dog"], **settings)
    seen = {numbers_of(picture[None])[0]: label for picture, label in islice(StreamReader(data, 0, 0, 1), 4)}
    assert seen == {0: 1, 1: 2, 2: 1, 3: 0} and data.id2label == {0: "cow", 1: "cat", 2: "dog"}
    data = prepare_stream(folder, label_names=["cat", "dog"], **settings)
    with pytest.raises(ValueError, match="'txt' must hold one of the label_names in every row, got 'cow'"):
        list(islice(StreamReader(data, 0, 0, 1), 4))


def test_integers_beyond_the_number_of_classes_are_refused(sources):
    data = stream_of(sources, "tars", label_names=[str(label) for label in range(9)])
    with pytest.raises(ValueError, match=r"label_column 'cls' must hold an integer in \[0, 8\] in every row, got 9"):
        next(make_batches(data, BatchOptions(seed=0, batch_size=40)))


def test_another_number_of_processes_workers_or_shards_is_refused(sources, tmp_path):
    data, alone = stream_of(sources, "parquet"), dataclasses.replace(OPTIONS, num_processes=1, process_index=0)
    _, state = run_of(data, OPTIONS, 2, num_workers=2)
    with pytest.raises(ValueError, match=r"with 2 workers \(--dataloader_num_workers\), got 1: .* give 2, or start"):
        make_batches(data, OPTIONS, state=state)
    with pytest.raises(ValueError, match="of a stream with 2 processes, got 1"):
        make_batches(data, alone, state=state, num_workers=2)
    with pytest.raises(ValueError, match="of a stream with 6 shards, got 4"):
        make_batches(stream_of(sources, "tars"), OPTIONS, state=state, num_workers=2)
    save_stream_state(state, tmp_path, 0)
    assert load_stream_state(tmp_path, 0) == state
    with pytest.raises(ValueError, match="of a stream with 1 processes, got more"):
        load_stream_state(tmp_path, 1)


def test_readers_of_too_few_shards_are_told_of(sources, capsys):
    make_batches(stream_of(sources, "tars"), dataclasses.replace(OPTIONS, process_index=0, num_processes=50))
    out = capsys.readouterr().out
    assert "50 readers (processes x workers) each read all of the stream" in out
    assert "it has 4 shards; more files" in out
    for kind in ("parquet", "images"):
        make_batches(stream_of(sources, kind), dataclasses.replace(OPTIONS, process_index=0))
        assert capsys.readouterr().out == ""


def test_more_readers_than_images_are_refused(tmp_path):
    data = prepare_stream(write_parquet(tmp_path / "data", numbered(2), 1))
    with pytest.raises(
        ValueError, match="reader 3 of 3 finds no image in .*: the stream has fewer images than readers"
    ):
        next(iter(StreamReader(data, 0, 2, 3)))


def test_random_crops_are_of_every_place_and_follow_from_the_position(tmp_path):
    """A picture of 4x7 as 4x4 has four places; its columns say which."""
    picture = np.broadcast_to(np.arange(7, dtype=np.uint8)[None, :, None], (4, 7, 1))
    folder = tmp_path / "data"
    write_tars(folder, [{"png": png(np.ascontiguousarray(picture))}] * 3, 3)
    settings = {"resolution": (4,), "resize_mode": "random_crop"}
    options = BatchOptions(seed=1, batch_size=100, random_flip=True)
    crops = []
    for data in (prepare_stream(str(folder), **settings), prepare_images(str(folder), **settings)):
        assert (
            data.notes[0]
            == "4x7 images are scaled to cover 4x4 and cropped to it at random places (--resize_mode random_crop)"
        )
        batches = make_batches(data, options)
        crops.append(torch.cat([next(batches)["pixels"] for _ in range(4)]))
    assert torch.equal(*crops)  # the picture is always the same, so is its crop at the same position
    flipped = crops[0][:, 0, 0, 0] > crops[0][:, 0, 0, 3]
    upright = torch.where(flipped[:, None, None], crops[0][:, 0].flip(-1), crops[0][:, 0])
    starts = upright[:, 0, 0].long()
    assert torch.equal(upright, (starts[:, None, None] + torch.arange(4)).expand(400, 4, 4).byte())
    counts = torch.bincount(starts + 4 * flipped, minlength=8)  # each place as likely as the others, flipped or not
    assert len(counts) == 8 and (counts - 50).abs().max() < 5 * (400 * 7 / 64) ** 0.5
    np.testing.assert_array_equal(data.pixels[[0]][0, 0, :, 0], [1, 2, 3, 4])  # without a place, the middle
