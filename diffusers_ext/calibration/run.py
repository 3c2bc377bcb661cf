"""The calibration of a pipeline from end to end, within a budget of time."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from diffusers_ext.calibration import averages, guidance, steps, timesteps, variance
from diffusers_ext.calibration.budget import Budget, shared
from diffusers_ext.calibration.data import Data
from diffusers_ext.calibration.examples import Parts
from diffusers_ext.calibration.guidance import Guidance, Ruler, Trials
from diffusers_ext.calibration.subject import Subject
from diffusers_ext.command_names import name_commands
from diffusers_ext.schedulers import ExtDDPMScheduler


# Shares of what is left of the budget when it is their turn; what they leave is for the report.
SHARE_OF_VARIANCE, SHARE_OF_GUIDANCE, SHARE_OF_AVERAGES = 0.15, 0.45, 0.4
SHARE_OF_TIMESTEPS, SHARE_OF_STEPS = 0.25, 0.7

# Seeds of image sets, beside the seed that is given: what is chosen by is none of what any evaluation measures by default.
SEED_OF_CHOICE, SEED_OF_REPORT = 501, 502

# By which the timesteps near the trajectory are held for good, or not, in few steps; in one, both kinds are the same.
FEWEST_STEPS = (4, 3, 2)

# Beside the number that the pipeline is calibrated for, what is reported; and that in which images are compared in a hurry.
FEW_STEPS = 10

# Texts and condition images that a network was trained on need less guidance than others do (docs/few_calls.md).
SEEN_EXAMPLES = (
    "Guidance was not chosen, and is what calls do without a calibration: texts or condition images that the network was trained on "
    "need less of it than others. Give a split that it was not trained on, by --validation_split of a run or --held_out_split."
)

# Features without labels see the variety that guidance takes, and not what it gives (docs/few_calls.md).
WITHOUT_LABELS = (
    "Guidance was not chosen, and is what calls do without a calibration: it is by the features of a classifier of the images' "
    "labels, of which there is none."
)

# Sets of images by which anything is chosen and reported: one guidance beside none, and what it gained.
LEAST_SETS = 4


@dataclass(frozen=True)
class Rulers:
    """Measures sets of images by which anything is chosen, and others by which what was gained is reported.

    Attributes:
        source: Where the real images of both are from, in words.
        num_steps: In which images are compared.
        know_labels: Whether the features are those of a classifier.
    """

    choose: Ruler
    report: Ruler
    source: str
    num_steps: int
    know_labels: bool


@dataclass(frozen=True)
class Work:
    """What the parts of a calibration share.

    Attributes:
        report: What was found, which each part adds to.
        keeps_time: Whether what takes longer than there is time for is left out.
        say: Takes lines about what is done.
    """

    subject: Subject
    parts: Parts
    budget: Budget
    report: dict
    seed: int
    keeps_time: bool
    say: Callable[[str], None]


@torch.no_grad()
def calibrate(
    subject: Subject,
    data: Data,
    seconds: float,
    *,
    seed: int = 0,
    run: Path | None = None,
    start: float | None = None,
    keeps_time: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict:
    """Measures a pipeline and puts what is best into it: scheduler, weights and defaults of its call.

    All processes call it alike, and share the work of making images.

    Args:
        seconds: What it may take. Each part measures something in any case, unless it `keeps_time`.
        run: Folder of the run, for its snapshots of averages.
        start: When the budget began, a reading of `time.perf_counter`; by default now.
        keeps_time: Whether choosing by images is left out where the least of it takes longer than that, and trajectories
            are of fewer images.
        say: Takes lines about what is done.

    Returns: what was found, for `calibration.json`.
    """
    budget = Budget(seconds, start)
    pipe = subject.pipe
    forget_calibration(subject)
    report = {
        "seed": seed,
        "budget_seconds": round(seconds, 1),
        "num_inference_steps": subject.num_steps,
        "scheduler_class": type(pipe.scheduler).__name__,
        "mixed_precision": subject.mixed_precision,
        "left_out": list(data.left_out),
    }
    parts = Parts.of(data.real, data.held_out_name, seed)
    if subject.num_classes is not None and pipe.null_label is None:  # so that an image of no label cannot be asked for
        parts = parts.with_labels()
    work = Work(subject, parts, budget, report, seed, keeps_time, say)
    default = chosen = Guidance(subject.default_scale)
    rulers, before = _make_rulers(work, data), {}
    own = subject.own_timesteps(rulers.num_steps if rulers else subject.num_steps)
    if rulers:
        for number in dict.fromkeys((len(own), min(FEW_STEPS, len(own)))):
            before[number] = rulers.report.measure(default, subject.own_timesteps(number))
        chosen = _choose_guidance(work, rulers, own, default)
    if rulers and run is not None:
        _choose_average(work, rulers, own, chosen, run)
    config, lists = {}, {}
    if subject.has_betas:  # of the weights that were chosen
        config, lists["bound"] = _measure_variance(work)
    call = chosen.call(own) if subject.takes_scale else {}
    found = _find_timesteps(work, own, call)
    subject.choose(**config)
    stepping, lists["trajectory"] = _choose_steps(work, rulers, chosen, own, found)
    optimal = {"spacing": pipe.scheduler.config.timestep_spacing} | {
        objective: {str(number): each for number, each in found.items()} for objective, found in lists.items()
    }
    if steps.has_orders(subject):
        config["multistep_order"] = stepping.order
    subject.choose(**config, optimal_timesteps=optimal, timestep_spacing="optimal")
    defaults = {"num_inference_steps": subject.num_steps} | (call if chosen != default else {})
    if subject.keeps_defaults:
        pipe.register_to_config(call_defaults=defaults)
        report["call_defaults"] = defaults
    if rulers:
        report["gained"] = _gained(rulers.report, before, chosen, own)
    report["seconds"] = round(budget.used, 1)
    return report


def _measure_variance(work: Work) -> tuple[dict, dict]:
    """The analytic variance for the scheduler's config, and the lists of timesteps that are best in the bound."""
    subject, report = work.subject, work.report
    work.say(f"the errors of the predicted x_0, at {variance.NUM_POINTS} timesteps")
    budget = work.budget.part(SHARE_OF_VARIANCE)
    prediction = shared(variance.measure(subject, work.parts.train, budget, work.seed))
    table = prediction.table(subject.last_noise)
    lists, bits = variance.lists_by_bound(subject, prediction, list(timesteps.NUMBERS))
    report["analytic_variance"] = table | {"num_images": prediction.num_images}
    report["bits_per_dim_of_steps"] = {str(number): pair for number, pair in bits.items()}
    of_variance = {} if subject.learns_variance else {"variance_type": "analytic"}
    return {"analytic_variance": table} | of_variance, lists


def _choose_guidance(work: Work, rulers: Rulers, own: list[int], default: Guidance) -> Guidance:
    """The guidance whose images are nearest, in the steps at these timesteps; the default where none is chosen."""
    if not work.subject.takes_scale or not work.subject.keeps_defaults:
        return default
    if work.subject.needs_examples and not work.parts.held_out:
        work.report["left_out"].append(SEEN_EXAMPLES)
        return default
    if not rulers.know_labels:
        work.report["left_out"].append(WITHOUT_LABELS)
        return default
    ruler = rulers.choose
    work.say(f"guidance: sets of {ruler.num_images} images in {len(own)} steps")
    trials = Trials(lambda candidate: ruler.measure(candidate, own), work.budget.part(SHARE_OF_GUIDANCE))
    chosen = guidance.search(trials, default)
    work.report["guidance"] = {
        "default": default.scale,
        "num_images": ruler.num_images,
        "num_inference_steps": rulers.num_steps,
        "source": rulers.source,
        "tried": trials.records(),
        "chosen": asdict(chosen),
    }
    return chosen


def _choose_average(work: Work, rulers: Rulers, own: list[int], chosen: Guidance, run: Path) -> None:
    """Leaves the average of the run's weights in the pipeline whose images are nearest, if it took snapshots."""
    width, tried = averages.choose_width(
        *(work.subject.pipe.components, run),
        lambda: rulers.choose.measure(chosen, own)["frechet_distance"],
        work.budget.part(SHARE_OF_AVERAGES),
    )
    work.report["averages"] = {"tried": tried, "chosen": width}
    if width is not None:
        work.say(f"weights: the average of ema_std {width:g}")


def _find_timesteps(work: Work, own: list[int], call: dict) -> dict[int, list[int]]:
    """For each number of steps the list that is nearest to a fine trajectory under the arguments of a call."""
    subject, parts = work.subject, work.parts
    work.say("timesteps: from a fine trajectory")
    number = timesteps.NUM_IMAGES
    if work.keeps_time:
        budget = work.budget.part(SHARE_OF_TIMESTEPS)
        number = shared(timesteps.images_that_fit(subject, call, budget, parts.choose))
    teacher = timesteps.Teacher.make(subject, number, call, work.seed, parts.choose)
    numbers = [len(own), subject.num_steps, FEW_STEPS, 5, *timesteps.NUMBERS]
    lists, distances = shared(timesteps.choose(teacher, numbers, work.budget.part(SHARE_OF_TIMESTEPS)))
    work.report["distance_from_fine_trajectory"] = {str(number): pair for number, pair in distances.items()}
    return lists


def _choose_steps(
    work: Work, rulers: Rulers | None, chosen: Guidance, own: list[int], lists: dict[int, list[int]]
) -> tuple[steps.Stepping, dict[int, list[int]]]:
    """The order of the steps and the kind of timesteps whose images are nearest, and the timesteps of each number of steps.

    Args:
        own: Of the scheduler's spacing, in the number of steps in which images are compared.
        lists: Near a fine trajectory, by their numbers.
    """
    subject, stepping = work.subject, steps.OWN
    if rulers is not None:
        stepping = _compare_steps(work, rulers, chosen, own, lists.get(rulers.num_steps))
    least = math.inf
    if stepping.timesteps == "trajectory":
        least = _fewest_steps(work, rulers, chosen, own, stepping, lists)
    numbers = {*lists, subject.num_steps}  # of which the last may be more than the grid has
    return stepping, {
        number: lists[number] if number >= least and number in lists else subject.own_timesteps(number)
        for number in sorted(numbers)
    }


def _compare_steps(
    work: Work, rulers: Rulers, chosen: Guidance, own: list[int], found: list[int] | None
) -> steps.Stepping:
    """The order and the kind of timesteps whose images are nearest, in the number of steps in which they are compared."""
    subject, ruler = work.subject, rulers.choose
    orders = steps.has_orders(subject)
    those = steps.candidates(own, own if found is None else found, orders)
    work.say(f"steps: {len(those)} ways, by sets of {ruler.num_images} images")

    def measure(stepping: steps.Stepping) -> dict[str, float]:
        if orders:
            subject.choose(multistep_order=stepping.order)
        visited = own if stepping.timesteps == "spacing" else found
        return ruler.measure(chosen, own, {"timesteps": visited})

    stepping, tried = steps.choose(measure, those, work.budget.part(SHARE_OF_STEPS))
    if tried:
        work.report["steps"] = {
            "num_images": ruler.num_images,
            "num_inference_steps": rulers.num_steps,
            "source": rulers.source,
            "tried": tried,
            "chosen": asdict(stepping),
        }
    return stepping


def _fewest_steps(
    work: Work,
    rulers: Rulers,
    chosen: Guidance,
    own: list[int],
    stepping: steps.Stepping,
    lists: dict[int, list[int]],
) -> int:
    """From how many steps on the timesteps near the trajectory hold."""
    subject, ruler = work.subject, rulers.choose
    if steps.has_orders(subject):
        subject.choose(multistep_order=stepping.order)
    numbers = [rulers.num_steps, *(number for number in FEWEST_STEPS if number < rulers.num_steps)]
    work.say(f"few steps: sets of {ruler.num_images} images")

    def measure(number: int, kind: str) -> float:
        visited = lists[number] if kind == "trajectory" else subject.own_timesteps(number)
        return ruler.measure(chosen, own, {"timesteps": visited})["frechet_distance"]

    least, tried = steps.fewest_by_trajectory(measure, numbers, work.budget.part(SHARE_OF_STEPS))
    work.report["steps"] |= {"fewest_by_trajectory": least, "few_tried": tried}
    return least


def forget_calibration(subject: Subject) -> None:
    """Takes away what an earlier calibration chose, so that this one starts from what the training left."""
    pipe = subject.pipe
    config = pipe.scheduler.config
    changes = {key: None for key in ("analytic_variance", "optimal_timesteps") if key in config}
    if config.get("variance_type") == "analytic":
        changes["variance_type"] = "fixed_small" if isinstance(pipe.scheduler, ExtDDPMScheduler) else None
    if config.get("multistep_order", 1) != 1:
        changes["multistep_order"] = 1
    subject.choose(**changes)
    if subject.keeps_defaults:
        pipe.register_to_config(call_defaults=None)


def _make_rulers(work: Work, data: Data) -> Rulers | None:
    """Of as many images as there is time for; None if images cannot be measured.

    Where time is kept, and too short for the steps that the pipeline is calibrated for, images are compared in fewer.
    """
    subject, parts, seed = work.subject, work.parts, work.seed
    left_out, features = work.report["left_out"], data.features
    if not shared(features is not None):
        left_out.append(
            "Nothing was chosen by the distance from real images: there is no network of features of them."
        )
        return None
    known = subject.asks_as(parts.train) or subject.num_classes in (None, len(data.real.train.label_names))
    if not known:
        left_out.append("Nothing was chosen by images: the real ones have not the labels of the pipeline.")
        return None
    if min(len(parts.choose), len(parts.report)) <= guidance.NUM_NEIGHBOURS:
        left_out.append("Nothing was chosen by images: there are too few to compare with.")
        return None
    kept = {name: data.features_of(getattr(parts, name).images) for name in ("choose", "report")}
    number = guidance.FEWEST_IMAGES
    trial = Ruler.by(parts.choose, subject, features, number, seed + SEED_OF_CHOICE, kept["choose"])
    few, each = subject.own_timesteps(min(4, subject.num_steps)), Guidance(1.5) if subject.can_guide else Guidance()
    start = time.perf_counter()
    trial.images(each, few, number=guidance.TIMED_IMAGES)
    seconds_of_step = shared(time.perf_counter() - start) / guidance.TIMED_IMAGES / len(few)

    def needed(number: int) -> float:
        return seconds_of_step * number * guidance.FEWEST_IMAGES * LEAST_SETS

    num_steps, left = subject.num_steps, work.budget.left
    if work.keeps_time and needed(num_steps) > left:
        num_steps = min(FEW_STEPS, num_steps)
    if work.keeps_time and needed(num_steps) > left:
        left_out.append(
            name_commands(
                f"Nothing was chosen by images, of which {LEAST_SETS} sets of {guidance.FEWEST_IMAGES} in {num_steps} steps take "
                f"{needed(num_steps):.0f} s, with {left:.0f} s left: training/calibrate.py does with a longer --max_time."
            )
        )
        return None
    number = guidance.images_that_fit(seconds_of_step * num_steps, SHARE_OF_GUIDANCE * left)
    return Rulers(
        Ruler.by(parts.choose, subject, features, number, seed + SEED_OF_CHOICE, kept["choose"]),
        Ruler.by(parts.report, subject, features, number, seed + SEED_OF_REPORT, kept["report"]),
        parts.source,
        num_steps,
        shared(data.knows_labels),
    )


def _gained(ruler: Ruler, before: dict, chosen: Guidance, own: list[int]) -> list[dict]:
    rows = []
    for number, measures in before.items():
        after = ruler.measure(chosen, own, {"num_inference_steps": number})
        rows.append(
            {"num_inference_steps": number, "num_images": ruler.num_images, "before": measures, "after": after}
        )
    return rows
