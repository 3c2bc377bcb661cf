"""The calibration of a pipeline from end to end, within a budget of time."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from diffusers_ext.calibration import averages, guidance, steps, timesteps, variance
from diffusers_ext.calibration.budget import Budget, shared
from diffusers_ext.calibration.data import Data
from diffusers_ext.calibration.examples import Examples, Parts
from diffusers_ext.calibration.guidance import Guidance, Ruler, Trials
from diffusers_ext.calibration.subject import Subject
from diffusers_ext.command_names import name_commands
from diffusers_ext.schedulers import ExtDDPMScheduler


PRECISIONS = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}

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
    "Guidance was not chosen: texts or condition images that the network was trained on need less of it than others. It is by a "
    "validation split, --validation_split of a run or --held_out_split."
)

# Sets of images by which anything is chosen and reported: one guidance beside none, and what it gained.
LEAST_SETS = 4


@dataclass(frozen=True)
class Rulers:
    """Measures sets of images by which anything is chosen, and others by which what was gained is reported.

    Attributes:
        source: Where the real images of both are from, in words.
        num_steps: In which images are compared.
    """

    choose: Ruler
    report: Ruler
    source: str
    num_steps: int


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
        "mixed_precision": PRECISIONS[subject.precision],
        "left_out": list(data.left_out),
    }
    parts = Parts.of(data.real, data.held_out_name, seed)
    if subject.num_classes is not None and pipe.null_label is None:  # so that an image of no label cannot be asked for
        parts = parts.with_labels()
    default = chosen = Guidance(subject.default_scale)
    rulers = _make_rulers(subject, data, parts, budget, seed, report, keeps_time)
    # The number of steps in which images are compared.
    compared = rulers.num_steps if rulers else subject.num_steps
    own, before = subject.own_timesteps(compared), {}
    if rulers:
        for number in dict.fromkeys((compared, min(FEW_STEPS, compared))):
            before[number] = rulers.report.measure(default, subject.own_timesteps(number))
    if rulers and subject.can_guide and pipe.guider is None and subject.keeps_defaults:
        if subject.needs_examples and not parts.held_out:
            report["left_out"].append(SEEN_EXAMPLES)
        else:
            chosen = _choose_guidance(rulers, own, default, budget, report, say)
    if rulers and run is not None:
        width, tried = averages.choose_width(
            *(pipe.components, run),
            lambda: rulers.choose.measure(chosen, own)["frechet_distance"],
            budget.part(SHARE_OF_AVERAGES),
        )
        report["averages"] = {"tried": tried, "chosen": width}
        if width is not None:
            say(f"weights: the average of ema_std {width:g}")

    config, lists = {}, {}
    if subject.has_betas:  # of the weights that were chosen
        config, lists["bound"] = _measure_variance(subject, parts.train, budget, seed, report, say)

    say("timesteps: from a fine trajectory")
    call = chosen.call(own) if subject.can_guide and pipe.guider is None else {}
    number = timesteps.NUM_IMAGES
    if keeps_time:
        number = shared(timesteps.images_that_fit(subject, call, budget.part(SHARE_OF_TIMESTEPS), parts.choose))
    teacher = timesteps.Teacher.make(subject, number, call, seed, parts.choose)
    numbers = [compared, subject.num_steps, FEW_STEPS, 5, *timesteps.NUMBERS]
    lists["trajectory"], distances = shared(timesteps.choose(teacher, numbers, budget.part(SHARE_OF_TIMESTEPS)))
    report["distance_from_fine_trajectory"] = {str(number): pair for number, pair in distances.items()}
    subject.choose(**config)
    stepping = _choose_steps(subject, rulers, chosen, own, lists["trajectory"], budget, report, say)
    if stepping.timesteps == "trajectory":
        least = _fewest_steps(subject, rulers, chosen, own, stepping, lists["trajectory"], budget, report, say)
        few = [number for number in lists["trajectory"] if number < least]
        lists["trajectory"] |= {number: subject.own_timesteps(number) for number in few}
    if stepping.timesteps == "spacing" and lists["trajectory"].get(compared) != own:
        numbers = {*lists["trajectory"], subject.num_steps}  # of which the last may be more than the grid has
        lists["trajectory"] = {number: subject.own_timesteps(number) for number in sorted(numbers)}
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


def _measure_variance(
    subject: Subject, train: Examples, budget: Budget, seed: int, report: dict, say
) -> tuple[dict, dict]:
    """The analytic variance for the scheduler's config, and the lists of timesteps that are best in the bound."""
    say(f"the errors of the predicted x_0, at {variance.NUM_POINTS} timesteps")
    prediction = shared(variance.measure(subject, train, budget.part(SHARE_OF_VARIANCE), seed))
    table = prediction.table(subject.last_noise)
    lists, bits = variance.lists_by_bound(subject, prediction, list(timesteps.NUMBERS))
    report["analytic_variance"] = table | {"num_images": prediction.num_images}
    report["bits_per_dim_of_steps"] = {str(number): pair for number, pair in bits.items()}
    of_variance = {} if subject.learns_variance else {"variance_type": "analytic"}
    return {"analytic_variance": table} | of_variance, lists


def _choose_guidance(rulers: Rulers, own: list[int], default: Guidance, budget: Budget, report: dict, say) -> Guidance:
    """The guidance whose images are nearest, in the steps at these timesteps."""
    ruler = rulers.choose
    say(f"guidance: sets of {ruler.num_images} images in {len(own)} steps")
    trials = Trials(lambda candidate: ruler.measure(candidate, own), budget.part(SHARE_OF_GUIDANCE))
    chosen = guidance.search(trials, default)
    report["guidance"] = {
        "default": default.scale,
        "num_images": ruler.num_images,
        "num_inference_steps": rulers.num_steps,
        "source": rulers.source,
        "tried": trials.records(),
        "chosen": asdict(chosen),
    }
    return chosen


def _choose_steps(
    subject: Subject,
    rulers: Rulers | None,
    chosen: Guidance,
    own: list[int],
    lists: dict,
    budget: Budget,
    report: dict,
    say,
) -> steps.Stepping:
    """The order of the steps and the kind of timesteps whose images are nearest, in the number in which they are compared."""
    if rulers is None:
        return steps.OWN
    ruler, found = rulers.choose, lists.get(rulers.num_steps)
    orders = steps.has_orders(subject)
    those = steps.candidates(own, own if found is None else found, orders)
    say(f"steps: {len(those)} ways, by sets of {ruler.num_images} images")

    def measure(stepping: steps.Stepping) -> dict[str, float]:
        if orders:
            subject.choose(multistep_order=stepping.order)
        visited = own if stepping.timesteps == "spacing" else found
        return ruler.measure(chosen, own, {"timesteps": visited})

    stepping, tried = steps.choose(measure, those, budget.part(SHARE_OF_STEPS))
    if tried:
        report["steps"] = {
            "num_images": ruler.num_images,
            "num_inference_steps": rulers.num_steps,
            "source": rulers.source,
            "tried": tried,
            "chosen": asdict(stepping),
        }
    return stepping


def _fewest_steps(
    subject: Subject,
    rulers: Rulers,
    chosen: Guidance,
    own: list[int],
    stepping: steps.Stepping,
    lists: dict,
    budget: Budget,
    report: dict,
    say,
) -> int:
    """From how many steps on the timesteps near the trajectory hold."""
    if steps.has_orders(subject):
        subject.choose(multistep_order=stepping.order)
    numbers = [rulers.num_steps, *(number for number in FEWEST_STEPS if number < rulers.num_steps)]
    say(f"few steps: sets of {rulers.choose.num_images} images")

    def measure(number: int, kind: str) -> float:
        visited = lists[number] if kind == "trajectory" else subject.own_timesteps(number)
        return rulers.choose.measure(chosen, own, {"timesteps": visited})["frechet_distance"]

    least, tried = steps.fewest_by_trajectory(measure, numbers, budget.part(SHARE_OF_STEPS))
    report["steps"] |= {"fewest_by_trajectory": least, "few_tried": tried}
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


def _make_rulers(
    subject: Subject, data: Data, parts: Parts, budget: Budget, seed: int, report: dict, keeps_time: bool
) -> Rulers | None:
    """Of as many images as there is time for; None if images cannot be measured.

    Where time is kept, and too short for the steps that the pipeline is calibrated for, images are compared in fewer.
    """
    left_out, features = report["left_out"], data.features
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
    trial = Ruler.by(*(parts.choose, subject, features, guidance.FEWEST_IMAGES, seed + SEED_OF_CHOICE, kept["choose"]))
    few, each = subject.own_timesteps(min(4, subject.num_steps)), Guidance(1.5) if subject.can_guide else Guidance()
    start = time.perf_counter()
    trial.images(each, few, number=guidance.TIMED_IMAGES)
    seconds_of_step = shared(time.perf_counter() - start) / guidance.TIMED_IMAGES / len(few)

    def needed(number: int) -> float:
        return seconds_of_step * number * guidance.FEWEST_IMAGES * LEAST_SETS

    num_steps, left = subject.num_steps, budget.left
    if keeps_time and needed(num_steps) > left:
        num_steps = min(FEW_STEPS, num_steps)
    if keeps_time and needed(num_steps) > left:
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
    )


def _gained(ruler: Ruler, before: dict, chosen: Guidance, own: list[int]) -> list[dict]:
    rows = []
    for number, measures in before.items():
        after = ruler.measure(chosen, own, {"num_inference_steps": number})
        rows.append(
            {"num_inference_steps": number, "num_images": ruler.num_images, "before": measures, "after": after}
        )
    return rows
