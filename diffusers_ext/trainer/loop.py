"""The training loop: optimizer steps until the budget is used up, with checkpoints from which it resumes exactly."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusers_ext.atomic_files import atomic_write
from diffusers_ext.data.batches import BatchOptions, make_batches
from diffusers_ext.data.identity import identify
from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.stream import StreamData, load_stream_state
from diffusers_ext.data.validation import ValidationBatches
from diffusers_ext.draws import derived_seed, seed_generators
from diffusers_ext.options import to_yaml
from diffusers_ext.trainer.checkpoints import all_or_none, find_for_all, remove_old, write_checkpoint
from diffusers_ext.trainer.clock import RunClock, max_over_processes
from diffusers_ext.trainer.config import TrainerConfig
from diffusers_ext.trainer.device_batches import ToDevice
from diffusers_ext.trainer.ema import WeightAverage
from diffusers_ext.trainer.ending import Ending, EndingCost
from diffusers_ext.trainer.hooks import StepHook
from diffusers_ext.trainer.milestones import Milestones
from diffusers_ext.trainer.notes import notes_after, notes_before
from diffusers_ext.trainer.optimizers import make_optimizer, set_learning_rate, set_options
from diffusers_ext.trainer.page import open_page
from diffusers_ext.trainer.posthoc_ema import AverageSnapshots
from diffusers_ext.trainer.profiling import StepProfile
from diffusers_ext.trainer.progress import WAITING, TimeShares
from diffusers_ext.trainer.reporting import RunLog, StepValues, not_finite
from diffusers_ext.trainer.run_folder import CONFIG_FILE, check_same_run
from diffusers_ext.trainer.schedule import LearningRate
from diffusers_ext.trainer.sharding import UnshardedModel, full, is_sharded
from diffusers_ext.trainer.signals import StopRequest, catch_signals
from diffusers_ext.trainer.state import RunState, check_same_data, load_run, save_run
from diffusers_ext.trainer.validation import evaluating, mean_loss, random_state_kept


class Trainer:
    """Trains one model.

    Args:
        config: The options, settled for this machine.
        accelerator: Of accelerate; the engine for devices, precision and processes.
        model: Whose parameters are trained, in float32; those that require no gradient stay as they are.
        compute_loss: Takes the prepared model and a batch (see `TrainingBatches`) on its device, with `images` in
            [-1, 1] instead of `pixels`; gives the mean loss of the batch. Random numbers come from the batch. If it
            is a module without parameters to train, its buffers belong to the run: they go to the device and into the
            checkpoints, and must be the same in all processes after each step; or, if it has `collect()`, after that,
            which all processes call before a checkpoint. If it has `metrics() -> dict[str, float]`, all processes call
            that at each line of the log, and the numbers are added to it; there, and only there, it may wait for the
            device. If it has `draw(folder)`, the main process calls that at the end; if it has `curve()`, then for the page
            of the run, see `RunPage`.
        data: The images.
        batch_options: Keywords of `BatchOptions` beyond those that the config of every script has.
        on_images: Called with this object every `save_images_steps`, in each process, which may share the work. What it
            draws from the default generators changes nothing.
        step_hook: Called within each step, such as an `Adversary`.
        validation_data: Images like `data`, on which `evaluate` takes the loss every `validation_steps` and at the end.
        prepare_batch: What is done to a batch on its device before `compute_loss` gets it, such as encoding its images;
            without gradients, in the run's precision.
        ending_cost: Measures the seconds that what is done with the trained model takes. A run by time keeps them, and
            asks it before its first step; `ending.share()` says afterwards how much of it fits.
        saved: Enters with what the run saves at its end, which milestones are pushed of; by default `averaged_model`.

    Raises:
        ValueError: if `compute_loss` has parameters to train, or if the hook cannot run here.
    """

    def __init__(
        self,
        config: TrainerConfig,
        accelerator: Accelerator,
        model: nn.Module,
        compute_loss: Callable[[nn.Module, dict[str, Tensor]], Tensor],
        data: ImageData | StreamData,
        *,
        batch_options: dict | None = None,
        on_images: Callable[["Trainer"], None] | None = None,
        step_hook: StepHook | None = None,
        validation_data: ImageData | None = None,
        prepare_batch: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
        ending_cost: Callable[["Trainer"], EndingCost] | None = None,
        saved: Callable[["Trainer"], AbstractContextManager] | None = None,
    ):
        self.config, self.accelerator, self.data = config, accelerator, data
        self.output_dir = Path(config.output_dir)
        self.compute_loss, self.on_images = compute_loss, on_images
        self.state, self.last_checkpoint = RunState(num_images=data.num_images), None
        self.clock, self.values = RunClock(accelerator), StepValues(accelerator, self.state)
        self.shares = StepProfile(accelerator, self.output_dir) if config.profile else TimeShares()
        self._prepare_model(model)
        # Afterwards, when each process has its shard of the parameters.
        self._start_ema()
        self.hook = step_hook or StepHook()
        self.hook.prepare(accelerator, channels_last=config.channels_last)
        self.objective = self._check_objective(compute_loss)
        self._tell_objective()
        self.budget, self.ending = config.budget(), Ending(self, ending_cost)
        self.milestones = Milestones(self, saved or Trainer.averaged_model)
        self.learning_rate = LearningRate(
            config.lr_scheduler,
            config.learning_rate,
            self.budget,
            warmup_steps=config.lr_warmup_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
            warmup_share=config.lr_warmup_share,
            decay_share=config.lr_decay_share,
        )
        self.batch_options = BatchOptions(
            seed=config.seed,
            batch_size=config.train_batch_size,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
            accumulation=config.gradient_accumulation_steps,
            random_flip=config.random_flip,
            **(batch_options or {}),
        )
        self.to_device = ToDevice(accelerator, prepare_batch, channels_last=config.channels_last)
        self.validation = None
        if validation_data is not None:
            self.validation = ValidationBatches(
                validation_data, config.train_batch_size, **self.batch_options.of_held_out
            )

    def _prepare_model(self, model: nn.Module):
        """`self.module` is what is saved and sampled, `self.model` what is called: the same, wrapped by accelerate."""
        config, accelerator = self.config, self.accelerator
        self.module = model.to(accelerator.device)
        self._unsharded = UnshardedModel(self.module) if is_sharded(accelerator) else None
        if config.channels_last and not self._unsharded:  # FSDP2 takes contiguous parameters
            self.module.to(memory_format=torch.channels_last)
        if config.gradient_checkpointing:
            self.module.enable_gradient_checkpointing()
        if config.compile:
            self.module.compile()
        optimizer = make_optimizer(config, self.module, sharded=self._unsharded is not None)
        self.model, self.optimizer = accelerator.prepare(self.module, optimizer)

    def _start_ema(self):
        config = self.config
        ema = {"std": config.ema_std, "decay": config.ema_decay, "warmup": config.ema_warmup}
        self.average = WeightAverage(self.module, **ema) if config.use_ema else None
        self.snapshots = None
        if config.ema_snapshot_steps:
            if self._unsharded:
                raise ValueError(
                    "ema_snapshot_steps takes a copy of the model in each process, which FSDP spreads over them"
                )
            self.snapshots = AverageSnapshots(self.module, config.ema_stds, self.output_dir, self.average)

    def _check_objective(self, compute_loss: Callable) -> nn.Module | None:
        if not isinstance(compute_loss, nn.Module):
            return None
        if learned := [name for name, parameter in compute_loss.named_parameters() if parameter.requires_grad]:
            raise ValueError(
                f"compute_loss is trained by no optimizer, so its state must be buffers, got parameters: {learned[0]}"
                + (f" and {len(learned) - 1} more" if len(learned) > 1 else "")
            )
        return compute_loss.to(self.accelerator.device)

    def _tell_objective(self) -> None:
        """Lets an objective that changes along the run ask how far it is, if it has `progress` or `steps`."""
        asked = {
            "progress": lambda: self.budget.progress(self.state.step, self.state.seconds),
            "steps": lambda: self.state.step,
        }
        for name, answer in asked.items():
            if hasattr(self.objective, name):
                setattr(self.objective, name, answer)

    def train(self) -> None:
        """Runs until the budget is used up, from the checkpoint that the config names if it names one.

        Raises:
            FloatingPointError: if the loss is not finite; the checkpoints from before that stay.
            SystemExit: after SIGTERM or SIGINT, with 128 + its number, when a checkpoint has been saved.
        """
        config, state, accelerator = self.config, self.state, self.accelerator
        stream_state = self._resume(config.resume_from_checkpoint) if config.resume_from_checkpoint else None
        self._stream = make_batches(
            self.data,
            self.batch_options,
            position=state.position,
            state=stream_state,
            num_workers=config.dataloader_num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        if accelerator.is_main_process:
            with atomic_write(self.output_dir / CONFIG_FILE) as partial:
                partial.write_text(to_yaml(config))
            if self.snapshots:
                self.snapshots.drop_after(state.step)
        self.milestones.go_on()
        self.page = open_page(self)
        self.clock.start(state.seconds)
        first_seconds = state.seconds
        with random_state_kept(self.accelerator.device):
            lines = self.ending.reserve()
        for line in [*lines, *notes_before(self)]:
            accelerator.print(line)
        images_per_step = self.batch_options.images_per_step
        self.log = RunLog(accelerator, self.output_dir, self.budget, state, images_per_step, self.page)
        try:
            with catch_signals() as request, self.shares.watching():
                self._run(request)
        except BaseException as error:
            self.page.stop(error, state.step, self.clock.now())
            for line in self.milestones.abandon():
                accelerator.print(line)
            raise
        finally:
            self.log.close()
            del self._stream  # ends the workers
        self.page.trained(state.step, self.clock.now())
        self.optimizer.state.clear()  # what follows needs the weights alone, and may need the memory
        for line in [f"time: {self.shares.summary(self.clock.now() - first_seconds)}", *notes_after(self)]:
            accelerator.print(line)

    def _run(self, request: StopRequest):
        config, state = self.config, self.state
        self.model.train()
        is_over, signal_number = self._is_over(request)
        if state.step == 0 and not signal_number:  # even if measuring what comes afterwards has taken all of the time
            is_over = False
        while not is_over:
            with self.shares.step():
                self._step()
            state.step += 1
            state.position += self.batch_options.images_per_step
            self.log.advance(state.step, self.clock.now())
            is_over, signal_number = self._is_over(request)
            is_last = is_over and not signal_number
            if is_last or state.step % config.logging_steps == 0 or self._is_due(config.validation_steps):
                self._report(is_last)
            # Before the checkpoint, so that one never stands without the snapshots up to its step.
            if self.snapshots and (is_last or self._is_due(config.ema_snapshot_steps)):
                self._save_snapshot()
            if is_over or self._is_due(config.checkpointing_steps):
                self.values.read(self.last_checkpoint)
                # Before the checkpoint, as the snapshots.
                with self.shares.of("saving"):
                    self.milestones.before_checkpoint()
                self.save_checkpoint()
            if self.on_images and self._is_due(config.save_images_steps):
                self.values.read(self.last_checkpoint)
                with self.shares.of("making images"), random_state_kept(self.accelerator.device):
                    self.on_images(self)
                self._update_page()
        # Asked once more: what has come since then may have come to one process alone.
        request.signal_number = int(*max_over_processes(self.accelerator, request.signal_number or 0)) or None
        if request.signal_number:
            if self.last_checkpoint is None or self.last_checkpoint.name != f"checkpoint-{state.step}":
                self.save_checkpoint()
            self.accelerator.print(
                f"{request.name} at step {state.step}: saved {self.last_checkpoint}; --resume_from_checkpoint latest goes "
                "on from there"
            )
            raise SystemExit(128 + request.signal_number)
        if state.losses:  # of a run that a signal ended at its last step
            self._report(is_last=True)

    def _is_over(self, request: StopRequest) -> tuple[bool, int]:
        """Whether the run ends here, and the signal that ends it or 0; all processes agree on both, and on the time."""
        accelerator, state = self.accelerator, self.state
        by_steps = self.budget.is_over(state.step, 0.0)
        # Asking the others costs a wait for the device, so that only CPUs do it at each step.
        if accelerator.num_processes > 1 and accelerator.device.type != "cpu" and state.step % 10 and not by_steps:
            return False, 0
        state.seconds, number = max_over_processes(accelerator, self.clock.now(), request.signal_number or 0)
        return bool(number) or self.budget.is_over(state.step, state.seconds), int(number)

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0

    # A step.

    def _step(self):
        self._begin_step()
        losses = []
        for _ in range(self.config.gradient_accumulation_steps):
            batch = self._next_batch()
            with self.accelerator.accumulate(self.model, *self.hook.models):
                losses.append(self._forward_backward(batch))
                self._optimizer_step()
        self._update_ema()
        self._record(losses)

    def _begin_step(self):
        """Sets the learning rate, and the random state of dropout, which follows from the position in the data."""
        state, config, accelerator = self.state, self.config, self.accelerator
        if state.warmup_steps is None and self.learning_rate.is_warm(state.step, state.seconds):
            state.warmup_steps, state.warmup_seconds = state.step, state.seconds
        rate = self.learning_rate.at(state.step, state.seconds, state.warmup_end)
        set_learning_rate(self.optimizer, config, rate)
        self.hook.begin_step(state.step, rate / config.learning_rate)
        # Of the default generators, Python's and NumPy's included.
        seed_generators(derived_seed(config.seed, state.position, accelerator.process_index), accelerator.device)

    def _next_batch(self) -> dict[str, Tensor]:
        with self.shares.of(WAITING):
            return self.to_device.move(next(self._stream))

    def _forward_backward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds the gradients of a batch; gives its losses, by their names in `RunState`."""
        with self.hook.around_loss():
            with self.shares.part("forward and loss"):
                batch = self.to_device.prepare(batch)
                loss = self.compute_loss(self.model, batch)
            with self.shares.part("backward"):
                self.accelerator.backward(loss)
        losses = {"losses": loss.detach()}
        if self.hook.active:
            with self.shares.part(self.hook.name):
                losses["adversary_losses"] = self.hook.after_backward(self.module, batch, self._max_norm)
        return losses

    def _optimizer_step(self):
        """Clips the gradients and changes the weights, if these are the gradients of all batches of the step."""
        if self.accelerator.sync_gradients:
            with self.shares.part("clipping of gradients"):
                self.values.add("norms", self._clip())
        with self.shares.part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()

    @property
    def _max_norm(self) -> float:
        return self.config.max_grad_norm or math.inf

    def _clip(self) -> Tensor:
        return full(torch.as_tensor(self.accelerator.clip_grad_norm_(self.model.parameters(), self._max_norm)))

    def _update_ema(self):
        with self.shares.part("EMA"):
            if self.average:
                self.average.update(self.module)
            if self.snapshots:
                self.snapshots.update(self.module)

    def _record(self, losses: list[dict[str, Tensor]]):
        for name in losses[0]:
            self.values.add(name, torch.stack([of_batch[name] for of_batch in losses]).mean())

    # Between steps.

    def _report(self, is_last: bool):
        """Logs the means since the last report, and the loss on held-out images where that is due."""
        self.values.read(self.last_checkpoint)
        state, seconds = self.state, self.clock.now()
        if not state.losses:
            return
        metrics = self.objective.metrics() if hasattr(self.objective, "metrics") else {}
        if self.validation and (is_last or self._is_due(self.config.validation_steps)):
            metrics = metrics | {"val_loss": self.evaluate()}
        self.log.write(
            state,
            epoch=state.position / state.num_images if state.num_images else self._stream.passes,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            seconds=seconds,
            shares=self.shares,
            metrics=metrics,
        )
        self._update_page()

    def _update_page(self):
        with self.shares.of("writing its page"):
            self.page.update(self.state.step, self.clock.now())

    @contextmanager
    def averaged_model(self) -> Iterator[nn.Module]:
        """The model in evaluation mode, with its EMA weights if there are any; its own come back at the end.

        Every process calls it: of a sharded model each gets a copy with the full parameters.
        """
        if self._unsharded:
            state = dict(self.module.named_parameters()) | (self.average.averages() if self.average else {})
            yield self._unsharded.of(state, self.module)
            return
        with (
            evaluating(self.module),
            self.average.applied_to(self.module) if self.average else nullcontext(),
        ):
            yield self.module

    @torch.no_grad()
    def evaluate(self, max_batches: int | None = None) -> float:
        """The mean loss on the held-out images with the EMA weights, at the same noise and times at each call.

        The processes share the images. An objective that is a module is in evaluation mode meanwhile.

        Args:
            max_batches: Of each process; None for all.

        Raises:
            ValueError: if there are no held-out images.
            FloatingPointError: if the loss is not finite.
        """
        if self.validation is None:
            raise ValueError("there are no held-out images: give validation_data")
        accelerator = self.accelerator
        modes = nullcontext() if self.objective is None else evaluating(self.objective)
        with (
            self.shares.of("validating"),
            self.averaged_model() as model,
            modes,
            random_state_kept(self.accelerator.device),
        ):
            batches = self.validation.share(accelerator.process_index, accelerator.num_processes)
            batches = map(self.to_device, islice(batches, max_batches))
            loss = mean_loss(self.compute_loss, model, batches, accelerator)
        if not math.isfinite(loss):
            raise not_finite(self.state.step, loss, "loss on the held-out images", self.last_checkpoint)
        return loss

    # Checkpoints.

    @property
    def _parts(self) -> dict[str, Any]:
        """The parts of a checkpoint that `save_run` writes and `load_run` reads."""
        return {name: getattr(self, name) for name in ("state", "average", "snapshots", "objective")}

    @cached_property
    def data_identity(self) -> dict[str, Any]:
        """Distinguishes the data from others; goes into the checkpoints."""
        return identify(self.data)

    def save_checkpoint(self):
        """Writes OUTPUT_DIR/checkpoint-STEP, unless a loss since the last report is not finite."""
        self.values.read(self.last_checkpoint)
        config, accelerator = self.config, self.accelerator
        self.state.seconds = self.clock.agreed()  # since the learning rate of a run by time follows from it
        with self.shares.of("saving"):
            save = partial(
                save_run,
                accelerator=accelerator,
                config=config,
                identity=self.data_identity if accelerator.is_main_process else {},
                stream=self._stream.state,
                **self._parts,
            )
            self.last_checkpoint = write_checkpoint(accelerator, self.output_dir, self.state.step, save)
            self._remove_old_checkpoints()

    def _remove_old_checkpoints(self):
        if self.accelerator.is_main_process:
            limits = {"limit": self.config.checkpoints_total_limit, "keep_every": self.config.checkpoints_keep_every}
            remove_old(self.output_dir, self.state.step, **limits)

    def _save_snapshot(self):
        self.values.read(self.last_checkpoint)
        with self.shares.of("saving"):
            write = partial(self.snapshots.write, self.state.step)
            all_or_none(self.accelerator, write if self.accelerator.is_main_process else None)

    def _resume(self, request: str) -> dict[str, Any] | None:
        """Loads the checkpoint that is asked for; gives the state of its stream of images, if it is one."""
        accelerator, data, state = self.accelerator, self.data, self.state
        folder, passed_over = find_for_all(accelerator, self.output_dir, request)
        for line in passed_over:
            accelerator.print(line)
        if folder is None:
            accelerator.print(f"{self.output_dir} holds no checkpoint: the run starts at its beginning")
            return None
        lines = check_same_run(self.config, folder)
        lines += check_same_data(folder, data.name, data.num_images, lambda: self.data_identity)
        for line in lines:
            accelerator.print(line)
        load_run(folder, accelerator, warmup_steps=self.learning_rate.warmup_steps, **self._parts)
        set_options(self.optimizer, self.config)
        self.last_checkpoint = folder
        if request == "latest":  # what a run that was ended after its last save has not come to
            self._remove_old_checkpoints()
        accelerator.print(f"going on from {folder} (step {state.step}, {state.position} images seen)")
        return None if data.num_images is not None else load_stream_state(folder, accelerator.process_index)
