"""The page of a run, read as a browser reads it."""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.trainer import page as page_module
from diffusers_ext.trainer import page_pictures
from diffusers_ext.trainer.config import TrainerConfig
from diffusers_ext.trainer.page import RunPage, duration
from diffusers_ext.trainer.page_pictures import MAX_PNG_BYTES, SampleFrames, picture_address
from runs import CountedError, assert_same_run, metrics, stop_before_step, trainer


HOSTILE = "\"><script>alert('1')</script><img src=x onerror=alert(2)>&lt;"


class Read(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self._open = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        inside = self._open[-1] if self._open else ""
        self.texts[inside] = self.texts.get(inside, "") + data

    def of(self, tag, **attributes):
        return [got for name, got in self.elements if name == tag and attributes.items() <= got.items()]

    @property
    def text(self):
        return " ".join(self.texts.values())

    @property
    def refreshes(self):
        return bool(self.of("meta", **{"http-equiv": "refresh"}))

    def num_points(self, name):
        (line,) = self.of("polyline", **{"data-name": name})
        return len(line["points"].split())


def read(folder):
    return Read((folder / "index.html").read_text(encoding="utf-8"))


def record(step, **more):
    return {"step": step, "images": 4 * step, "loss": 1 / step, "learning_rate": 1e-3, "images_per_second": 8.0} | more


def page_of(folder, **options):
    config = TrainerConfig(output_dir=str(folder), max_train_steps=100, **options)
    return RunPage(config, config.budget(), "DiTModel on digits")


def save(path, size=(8, 8), noise=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = (
        np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        if noise
        else np.zeros((*size, 3), np.uint8)
    )
    Image.fromarray(values).save(path)


def test_the_page_shows_the_run_and_loads_nothing(tmp_path):
    for step in (10, 20):
        save(tmp_path / "samples" / f"step-{step:07}.png")
    page = page_of(tmp_path, learning_rate=0.003, hub_token="hf_secret")
    page.begin(0, 0.0)
    for step in (10, 20):
        page.add(record(step, loss_q1=0.5 / step, loss_q4=2.0, kl_rate=step, grad_norm=None))
    page.trained(20, 10.0)
    shown = read(tmp_path)
    assert shown.refreshes and "running" in shown.texts["span"]
    assert all(part in shown.texts["b"] for part in ("20 of 100", "10 s", "0.05", "40 s"))  # 80 steps at 2 a second
    assert shown.num_points("learning rate") == shown.num_points("q1") == shown.num_points("kl_rate") == 2
    assert [got["data-step"] for got in shown.of("div", **{"class": "frame"})] == ["10", "20"]
    assert ["hidden" in got for got in shown.of("div", **{"class": "frame"})] == [True, False]
    assert shown.of("input", type="range")[0]["max"] == "1"
    assert "learning_rate" in shown.texts["td"] and "0.003" in shown.texts["td"]
    assert "hf_secret" not in (tmp_path / "index.html").read_text() and "torch" in shown.text
    addresses = [got[name] for _, got in shown.elements for name in ("src", "href") if name in got]
    assert len(addresses) == 2 and all(address.startswith("data:image/png;base64,") for address in addresses)
    assert "url(" not in shown.texts["style"] and "import" not in shown.texts["style"]


def test_the_policy_lets_run_what_is_of_the_page_and_nothing_else(tmp_path):
    page_of(tmp_path).begin(0, 0.0)
    shown = read(tmp_path)
    (policy,) = [got["content"] for got in shown.of("meta", **{"http-equiv": "Content-Security-Policy"})]
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(shown.texts[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert "default-src 'none'" in policy and not any("style" in got for _, got in shown.elements)


def test_no_text_of_a_run_becomes_markup(tmp_path):
    save(tmp_path / "samples" / "step-0000010" / f"{HOSTILE.replace('/', '')}.png")
    (tmp_path / "shown.png").write_bytes(next(tmp_path.glob("samples/*/*.png")).read_bytes())
    config = TrainerConfig(output_dir=str(tmp_path), report_to="tensorboard", tracker_project_name=HOSTILE)
    page = RunPage(config, config.budget(), HOSTILE)
    page.add(record(10, **{HOSTILE: 1.0}))
    page.add(record(20, **{HOSTILE: 2.0}))
    page.finish({"shown.png": HOSTILE}, 20, 1.0)
    finished = read(tmp_path)
    page.stop(ValueError(HOSTILE), 20, 1.0)
    for shown in (finished, read(tmp_path)):
        assert len(shown.of("script")) == 1 and "alert" not in shown.texts["script"]
        assert not [name for _, got in shown.elements for name in got if name.startswith("on")]
        assert all(got["src"].startswith("data:") for got in shown.of("img"))
        assert HOSTILE in shown.texts["td"] and HOSTILE in shown.texts["p"]
    assert HOSTILE in finished.texts["figcaption"]


def test_a_run_of_its_own_length_reloads_until_its_end(tmp_path):
    page = page_of(tmp_path)
    page.begin(0, 0.0)
    assert read(tmp_path).refreshes
    save(tmp_path / "samples.png")
    page.finish({"samples.png": "samples", "missing.png": "nothing"}, 90, 3700.0)  # ended by time, not by steps
    shown = read(tmp_path)
    assert not shown.refreshes and "finished" in shown.texts["span"] and "1 h 1 min" in shown.texts["b"]
    assert shown.of("progress")[0]["value"] == "1.0" and len(shown.of("img")) == 1
    page.stop(FloatingPointError("the loss is not finite"), 90, 3.0)
    shown = read(tmp_path)
    assert not shown.refreshes and "FloatingPointError: the loss is not finite" in shown.texts["p"]


def test_a_page_for_which_there_is_no_time_is_left_out(tmp_path, monkeypatch):
    page = page_of(tmp_path)
    page.begin(0, 0.0)
    page.add(record(10))
    monkeypatch.setattr(page_module, "MAX_SHARE", 0.0)
    page.update(10, 1.0)
    assert "10 of 100" not in read(tmp_path).texts["b"]
    monkeypatch.setattr(page_module, "MAX_SHARE", 1e9)
    page.update(10, 1.0)
    assert "10 of 100" in read(tmp_path).texts["b"]


def test_a_long_run_shows_a_share_of_its_samples_and_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(page_pictures, "MAX_FRAMES", 4)
    frames = SampleFrames(tmp_path)
    for step in range(10, 120, 10):
        save(tmp_path / f"step-{step:07}.png")
    assert [frame.step for frame in frames.until(30)] == [10, 20, 30]
    assert [frame.step for frame in frames.until(110)] == [10, 50, 90, 110]
    save(tmp_path / "step-0000120.png")
    assert [frame.step for frame in frames.until(120)] == [10, 50, 90, 120]
    assert [frame.step for frame in SampleFrames(tmp_path).until(120)] == [10, 50, 90, 120]
    monkeypatch.setattr(page_pictures, "MAX_FRAMES", 64)
    size = SampleFrames(tmp_path).until(10)[0].num_bytes
    monkeypatch.setattr(page_pictures, "MAX_BYTES", 5 * size)
    assert [frame.step for frame in SampleFrames(tmp_path).until(120)] == [10, 50, 90, 120]


def test_a_large_picture_goes_in_as_a_smaller_one_and_a_damaged_one_not_at_all(tmp_path):
    save(tmp_path / "small.png", noise=True)
    save(tmp_path / "large.png", (1500, 700), noise=True)
    kind, content = picture_address(tmp_path / "small.png").split(",")
    assert kind == "data:image/png;base64" and base64.b64decode(content) == (tmp_path / "small.png").read_bytes()
    kind, content = picture_address(tmp_path / "large.png").split(",")
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    assert kind == "data:image/jpeg;base64" and max(picture.size) == 1280
    (tmp_path / "torn.png").write_bytes((tmp_path / "large.png").read_bytes()[: MAX_PNG_BYTES + 1])
    assert picture_address(tmp_path / "torn.png") == "" == picture_address(tmp_path / "missing.png")


@pytest.mark.parametrize(
    "seconds, text", [(0, "0 s"), (59.6, "1 min 0 s"), (3 * 3600 + 125, "3 h 2 min"), (float("inf"), "unknown")]
)
def test_durations_are_read_at_a_glance(seconds, text):
    assert duration(seconds) == text


class DrawnError(CountedError):
    """With a curve for the page."""

    def curve(self):
        return [{"log_snr": 1.0, "loss": 0.5}, {"log_snr": -1.0, "loss": self.seen.item()}]


@pytest.fixture(scope="module")
def data():
    return prepare_images("digits", max_samples=20)


def test_a_run_with_its_page_is_the_run_without_it_bit_for_bit(data, tmp_path, monkeypatch, capfd):
    """Without: something else has the page's name, which the run says once and goes on."""
    monkeypatch.setattr(page_module, "MAX_SHARE", 1e9)  # a page at each line of the log
    settings = {"logging_steps": 1, "save_images_steps": 4, "on_images": lambda run: torch.rand(3)}
    (tmp_path / "without" / "index.html").mkdir(parents=True)
    trainer(data, tmp_path / "without", DrawnError(), **settings).train()
    said = capfd.readouterr().out
    assert said.count("index.html is not written any more: ") == 1 and "shows the run" not in said
    trainer(data, tmp_path / "with", DrawnError(), **settings).train()
    assert capfd.readouterr().out.count(f"{tmp_path / 'with' / 'index.html'} shows the run while it goes on") == 1
    assert_same_run(tmp_path / "with", tmp_path / "without", 12)
    shown = read(tmp_path / "with")
    assert shown.num_points("mean between lines of the log") == 12 and shown.num_points("loss") == 2
    assert not list((tmp_path / "without").glob(".partial*"))


def test_a_resumed_run_goes_on_with_its_page(data, tmp_path):
    settings = {"logging_steps": 2, "checkpointing_steps": 6}
    stop_before_step(trainer(data, tmp_path, **settings), 8)
    stopped = read(tmp_path)
    assert not stopped.refreshes and "Preempted" in stopped.texts["p"]
    trainer(data, tmp_path, resume_from_checkpoint="latest", **settings).train()
    resumed = read(tmp_path)
    steps = [line["step"] for line in metrics(tmp_path)]
    assert resumed.num_points("mean between lines of the log") == len(steps) == 6
    assert "12 of 12" in resumed.texts["b"] and re.search("what follows it", resumed.texts["p"])
