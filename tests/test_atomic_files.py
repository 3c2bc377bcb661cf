import os
import signal

import pytest
from PIL import Image

from diffusers_ext.atomic_files import PARTIAL, atomic_write


@pytest.mark.parametrize("sync", [False, True])
def test_a_file_is_replaced_when_it_is_written(tmp_path, sync):
    path = tmp_path / "options.yaml"
    for text in ("first", "second"):
        with atomic_write(path, sync=sync) as partial:
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert os.listdir(tmp_path) == ["options.yaml"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_file_as_it_was_and_nothing_else(tmp_path, error):
    path = tmp_path / "options.yaml"
    path.write_text("first")
    for other in (path, tmp_path / "new.yaml"):
        with pytest.raises(error), atomic_write(other) as partial:
            partial.write_text("sec")
            raise error
    with pytest.raises(error), atomic_write(path):
        raise error
    assert os.listdir(tmp_path) == ["options.yaml"] and path.read_text() == "first"


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("first")
    with pytest.raises(OSError, match="No space left"), atomic_write(path) as partial:
        partial.symlink_to("/dev/full")
        partial.write_text("second")
    assert os.listdir(tmp_path) == ["options.yaml"] and path.read_text() == "first"


def test_a_kill_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("first")
    child = os.fork()
    if not child:
        with atomic_write(path) as partial, partial.open("w") as file:
            file.write("sec")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert path.read_text() == "first" and (tmp_path / f"{PARTIAL}options.yaml").read_text() == "sec"
    with atomic_write(path) as partial:
        partial.write_text("second")
    assert os.listdir(tmp_path) == ["options.yaml"] and path.read_text() == "second"


def test_the_format_still_follows_from_the_name(tmp_path):
    with atomic_write(tmp_path / "picture.png") as partial:
        Image.new("L", (2, 2)).save(partial)
    assert Image.open(tmp_path / "picture.png").format == "PNG"
