"""Notes on options that do not fit the length of the run, before the training where that is known, and after it."""

import math
from typing import TYPE_CHECKING

from diffusers_ext.trainer.run_folder import CONFIG_FILE
from diffusers_ext.untrusted import read_yaml_mapping


if TYPE_CHECKING:
    from diffusers_ext.trainer.loop import Trainer


# What to do where a decay is complete, for runs that can begin with a pipeline.
ANEW = "; or begin a new run with this one's pipeline, and a schedule of its own: --pretrained_pipeline {} and another --output_dir"
LOW_RATE = 0.05  # of the peak: a rate below it is at the end of its decay


def notes_before(trainer: "Trainer") -> list[str]:
    """Of a run about to begin or to go on, its time reserved and its checkpoint loaded."""
    config, budget, lines = trainer.config, trainer.budget, []
    if not math.isinf(budget.max_steps):
        lines += config.too_long_for(budget.max_steps)
        if trainer.learning_rate.warmup_steps > budget.max_steps:
            lines.append(
                f"lr_warmup_steps {trainer.learning_rate.warmup_steps} is more than the {budget.max_steps} optimizer steps "
                "of the run: the learning rate does not reach its peak"
            )
    return lines + (_notes_on_going_on(trainer) if trainer.last_checkpoint else [])


def notes_after(trainer: "Trainer") -> list[str]:
    """Of a run whose training is over."""
    config, state, rate = trainer.config, trainer.state, trainer.learning_rate
    lines = config.too_long_for(state.step) if math.isinf(trainer.budget.max_steps) else []
    if not rate.is_warm(state.step, state.seconds) and state.warmup_steps is None:
        lines.append(
            f"the run ended in the warm-up of its learning rate, at {rate.at(state.step - 1, 0.0) / rate.peak:.0%} of the "
            f"peak after {state.step} of {rate.warmup_steps} steps: give it a longer --max_train_time or more "
            "--max_train_steps, or fewer --lr_warmup_steps"
        )
    return lines


def _notes_on_going_on(trainer: "Trainer") -> list[str]:
    state, rate, budget = trainer.state, trainer.learning_rate, trainer.budget
    if budget.is_over(state.step, state.seconds):
        return [
            f"the run is at its end, with {state.step} steps in {state.seconds:.0f} s: nothing is left to train, and only "
            "what follows the training is done again. To go on, give more --max_train_steps or a longer --max_train_time"
        ]
    before = read_yaml_mapping(trainer.last_checkpoint / CONFIG_FILE)
    names = ("max_train_steps", "max_train_time")
    if all(before.get(name) == getattr(trainer.config, name) for name in names) or state.warmup_steps is None:
        return []
    last = trainer.optimizer.param_groups[0]["lr"]
    coming = rate.at(state.step, state.seconds, state.warmup_end)
    if last >= LOW_RATE * rate.peak or coming == last:
        return []
    anew = ANEW.format(trainer.output_dir) if hasattr(trainer.config, "pretrained_pipeline") else ""
    if coming < LOW_RATE * rate.peak:
        return [
            f"the learning rate is at the end of its decay, at {coming:.2g} of a peak of {rate.peak:.2g}, so that what is "
            "left changes little: give a budget that is longer by more, or --lr_scheduler constant with the "
            f"--learning_rate to go on at{anew}"
        ]
    return [
        f"the learning rate, which was at the end of its decay at {last:.2g}, rises to {coming:.2g} and decays again over "
        "what the longer budget leaves. To go on at a low rate instead, give --lr_scheduler constant with a "
        f"--learning_rate of that height{anew}"
    ]
