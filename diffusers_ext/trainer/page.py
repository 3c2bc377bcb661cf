"""The page of a run: `index.html` in its folder, one file that a browser shows without a server.

It holds all that it shows, so that it can be sent to somebody, and loads nothing: a policy within it forbids that, and any
script or style but its own. While the run goes on the page reloads itself.
"""

import base64
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from diffusers_ext.atomic_files import atomic_write
from diffusers_ext.figures import smoothed
from diffusers_ext.hub.cards import describe_machine
from diffusers_ext.options import written_options
from diffusers_ext.svg_charts import Curve, line_chart
from diffusers_ext.trainer.page_pictures import SampleFrames, picture_address
from diffusers_ext.trainer.run_folder import METRICS_FILE, PAGE_FILE, read_metrics
from diffusers_ext.trainer.schedule import Budget
from diffusers_ext.untrusted import one_line


if TYPE_CHECKING:
    from diffusers_ext.trainer.loop import Trainer


REFRESH_SECONDS = 10
MAX_SHARE = 0.003  # of the run's time that goes into writing it

_SMOOTHED_FROM = 40  # lines of the log
_QUARTERS = {
    "loss": "Loss by quarter of the timesteps, the cleanest first",
    "error": "Squared error by quarter of the timesteps",
}
_SHOWN_ELSEWHERE = {"step", "images", "epoch", "seconds", "loss", "val_loss", "learning_rate"}


class RunPage:
    """Writes the page of a run. A fault in that is said once and ends the page, not the run.

    Pages written between the first and the last take at most `MAX_SHARE` of the time: one that would take more is left out.
    Nothing here draws a random number, and nothing waits for the device but `loss_by_level`.

    Args:
        config: The run's options.
        budget: Its end.
        subject: What is trained on what, in a line.
        records: Lines of the log that the run has already.
        loss_by_level: Rows with `log_snr` and `loss`, as the run has them at the moment, see `LossRecord.curve`.
        say: Takes a line for the user.
        enabled: Whether this process writes it.
    """

    def __init__(
        self,
        config: Any,
        budget: Budget,
        subject: str,
        *,
        records: Iterable[dict[str, Any]] = (),
        loss_by_level: Callable[[], Sequence[Mapping[str, float]]] | None = None,
        say: Callable[[str], None] = print,
        enabled: bool = True,
    ):
        self._folder = Path(config.output_dir)
        self._budget, self._subject = budget, subject
        self._records, self._loss_by_level, self._say = list(records), loss_by_level, say
        self._options = options_of(config) if enabled else []
        self._frames = SampleFrames(self._folder / "samples")
        self._is_given_up = not enabled
        self._begin, self._spent, self._last_cost = time.perf_counter(), 0.0, 0.0

    def add(self, record: dict[str, Any]) -> None:
        """Takes note of a line of the log, which the next page has."""
        self._records.append(record)

    def update(self, step: int, seconds: float) -> None:
        """Writes the page of a run that goes on, if there is time for it."""
        if self._spent + self._last_cost <= MAX_SHARE * (time.perf_counter() - self._begin):
            self._write("running", "", step, seconds)

    def begin(self, step: int, seconds: float) -> None:
        """Writes the first page, and says where it is; what it takes is not of the run's time."""
        message = f"The run goes on from step {step}." if step else "The run begins."
        self._write("running", message, step, seconds)
        if not self._is_given_up:
            self._say(f"{self._folder / PAGE_FILE} shows the run while it goes on, in a browser")
        self._begin, self._spent = time.perf_counter(), 0.0

    def trained(self, step: int, seconds: float) -> None:
        """Writes the page of a run whose steps are done, and not yet what follows them."""
        self._write("running", "The training is over; what follows it is being made.", step, seconds)

    def stop(self, error: BaseException, step: int, seconds: float) -> None:
        """Writes the last page of a run that is ended by an exception, `SystemExit` after a signal among them."""
        reason = f"The run ended by {type(error).__name__}: {error}"
        if isinstance(error, SystemExit):
            reason = "A signal ended the run; --resume_from_checkpoint latest goes on from its last checkpoint."
        self._write("stopped", reason, step, seconds)

    def finish(self, pictures: Mapping[str, str], step: int, seconds: float) -> None:
        """Writes the last page.

        Args:
            pictures: Files in the run's folder, with what they show.
        """
        self._write("finished", "", step, seconds, pictures)

    def _write(self, state: str, message: str, step: int, seconds: float, pictures: Mapping[str, str] | None = None):
        if self._is_given_up:
            return
        start = time.perf_counter()
        try:
            text = self._text(state, message, step, seconds, pictures or {})
            with atomic_write(self._folder / PAGE_FILE) as partial:
                partial.write_text(text, encoding="utf-8", newline="\n")
        except Exception as error:  # a page is no reason to lose a run
            self._is_given_up = True
            self._say(f"{PAGE_FILE} is not written any more: {type(error).__name__}: {error}")
        self._last_cost = time.perf_counter() - start
        self._spent += self._last_cost

    def _text(self, state: str, message: str, step: int, seconds: float, pictures: Mapping[str, str]) -> str:
        shown = [(name, shows, picture_address(self._folder / name)) for name, shows in pictures.items()]
        return _template().render(
            title=self._folder.resolve().name,
            state=state,
            subject=self._subject,
            message=message,
            progress=1.0 if state == "finished" else round(self._budget.progress(step, seconds), 4),
            facts=self._facts(state, step, seconds),
            written=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            refresh_seconds=REFRESH_SECONDS if state == "running" else None,
            frames=self._frames.until(step),
            charts=[Markup(chart) for chart in self._charts() if chart],
            pictures=[each for each in shown if each[2]],
            options=self._options,
            machine=_machine(),
            **_own_parts(),
        )

    def _facts(self, state: str, step: int, seconds: float) -> list[tuple[str, str]]:
        end = "" if math.isinf(self._budget.max_steps) else f" of {self._budget.max_steps}"
        facts = [("step", f"{step}{end}"), ("time", duration(seconds))]
        if self._records:
            last = self._records[-1]
            facts.append(("loss", f"{last['loss']:.4g}"))
            if speed := last.get("images_per_second"):
                facts.append(("images/s", f"{speed:.0f}"))
                if state == "running" and last["images"]:
                    steps_per_second = speed * last["step"] / last["images"]
                    facts.append(("left", duration(self._budget.seconds_left(step, seconds, steps_per_second))))
        return facts

    def _charts(self) -> list[str]:
        """Of the loss, by noise level, of the learning rate, and of every other number in the log."""
        if not self._records:
            return []
        loss = self._points("loss")
        curves = [Curve("mean between lines of the log", loss)]
        if len(loss) >= _SMOOTHED_FROM:
            steps, values = zip(*loss, strict=True)
            curves = [
                Curve("as logged", loss, faint=True),
                Curve("smoothed", [*zip(steps, smoothed(np.array(values)), strict=True)]),
            ]
        if held_out := self._points("val_loss"):
            curves.append(Curve("on held-out images", held_out))
        charts = [line_chart(curves, "Loss", "step")]
        names = list(dict.fromkeys(name for record in self._records for name in record))
        drawn = set(_SHOWN_ELSEWHERE)
        for kind, title in _QUARTERS.items():
            quarters = [name for name in (f"{kind}_q{number}" for number in range(1, 5)) if name in names]
            drawn |= set(quarters)
            charts.append(line_chart([Curve(f"q{name[-1]}", self._points(name)) for name in quarters], title, "step"))
        if rows := self._loss_by_level() if self._loss_by_level else ():
            levels = sorted((row["log_snr"], row["loss"]) for row in rows)
            charts.append(line_chart([Curve("loss", levels)], "Loss by noise level, lately", "log SNR (natural log)"))
        rate = [Curve("learning rate", self._points("learning_rate"))]
        charts.append(line_chart(rate, "Learning rate", "step", from_zero=True))
        for name in names:
            if name not in drawn:
                charts.append(line_chart([Curve(name, self._points(name))], name.replace("_", " "), "step"))
        return charts

    def _points(self, name: str) -> list[tuple[float, float]]:
        values = ((record["step"], record.get(name)) for record in self._records)
        return [(step, value) for step, value in values if isinstance(value, int | float)]


def open_page(trainer: "Trainer") -> RunPage:
    """The page of a run that is about to begin or to go on, which the main process writes."""
    state, data, accelerator = trainer.state, trainer.data, trainer.accelerator
    records = read_metrics(trainer.output_dir / METRICS_FILE) if state.step and accelerator.is_main_process else []
    parameters = sum(parameter.numel() for parameter in trainer.module.parameters())
    count = "a stream" if data.num_images is None else f"{data.num_images} samples"
    page = RunPage(
        trainer.config,
        trainer.budget,
        f"{type(trainer.module).__name__} with {parameters:,} parameters, on {count} of {one_line(data.name)}",
        records=[record for record in records if record["step"] <= state.step],
        loss_by_level=getattr(trainer.objective, "curve", None),
        say=accelerator.print,
        enabled=accelerator.is_main_process,
    )
    page.begin(state.step, state.seconds)
    return page


def options_of(config: Any) -> list[tuple[str, str, bool]]:
    """Name, value and whether it is not the default, of each option; without secrets."""
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    written = written_options(config)
    return [
        (name, "" if value is None else str(value), getattr(config, name) != fields[name])
        for name, value in written.items()
    ]


def duration(seconds: float) -> str:
    """Such as `12 s`, `3 min 5 s`, `2 h 10 min`."""
    if not math.isfinite(seconds):
        return "unknown"
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


_machine = cache(describe_machine)


@cache
def _template():
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(_own_file("page.html"))


@cache
def _own_parts() -> dict[str, Markup]:
    """Style and script of the page, and the digests by which its policy knows them from others."""
    parts = {}
    for name, file in (("style", "page.css"), ("script", "page.js")):
        text = _own_file(file)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        parts |= {name: Markup(text), f"{name}_hash": Markup(f"'sha256-{digest}'")}
    return parts


def _own_file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
