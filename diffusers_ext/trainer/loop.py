"""The training loop: optimizer steps until the budget is used up, watched, saved and resumable at each of them."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusers_ext.atomic_files import written_whole
from diffusers_ext.data.batches import BatchOptions, make_batches
from diffusers_ext.data.identity import identify
from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.stream import StreamData
from diffusers_ext.data.validation import ValidationBatches
from diffusers_ext.draws import derived_seed, seed_generators
from diffusers_ext.options import to_yaml
from diffusers_ext.trainer.adversary import Adversary, frozen
from diffusers_ext.trainer.checkpoints import all_or_none, find_for_all, remove_old, write_checkpoint
from diffusers_ext.trainer.config import TrainerConfig
from diffusers_ext.trainer.ema import WeightAverage
from diffusers_ext.trainer.ending import Ending, EndingCost
from diffusers_ext.trainer.notes import notes_after, notes_before
from diffusers_ext.trainer.posthoc_ema import AverageSnapshots
from diffusers_ext.trainer.profiling import StepProfile
from diffusers_ext.trainer.progress import WAITING, ProgressBar, SpeedWatch, TimeShares
from diffusers_ext.trainer.run_folder import CONFIG_FILE, METRICS_FILE, MetricsLog, check_same_run
from diffusers_ext.trainer.schedule import LearningRate
from diffusers_ext.trainer.sharding import WholeModel, full, is_sharded
from diffusers_ext.trainer.signals import StopRequest, catch_signals
from diffusers_ext.trainer.state import RunState, load_run, save_run


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode, and back in its own at the end."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def in_float32(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch for devices without float64, such as MPS. Times stay below 1, which rounding would reach."""
    return batch | {"time": batch["time"].float().clamp(max=1 - 2**-24)}


class Trainer:
    """Trains one model.

    Args:
        config: The options, settled for this machine.
        accelerator: Of accelerate; the engine for devices, precision and processes.
        model: Whose parameters are trained, in float32.
        compute_loss: Takes the prepared model and a batch (see `TrainingBatches`) on its device, with `images` in
            [-1, 1] in place of `pixels`; gives the mean loss of the batch. Random numbers come from the batch. If it
            is a module without parameters to train, its buffers belong to the run: they go to the device and into the
            checkpoints, and must be the same in all processes after each step; or, if it has `collect()`, after that,
            which all processes call before a checkpoint. If it has `metrics() -> dict[str, float]`, all processes call
            that at each line of the log, and the numbers are added to it; there, and only there, it may wait for the
            device. If it has `draw(folder)`, the main process calls that at the end.
        data: The images.
        batch_options: Keywords of `BatchOptions` beyond those that the config of every script has.
        on_images: Called with this object every `save_images_steps`, in each process, which may share the work. What it
            draws from the default generators changes nothing.
        adversary: A second network that learns against the model.
        validation_data: Images like `data`, on which `evaluate` takes the loss every `validation_steps` and at the end.
        prepare_batch: What is done to a batch on its device before `compute_loss` gets it, such as encoding its images;
            without gradients, in the run's precision.
        ending_cost: Measures the seconds that what is done with the trained model takes. A run by time keeps them, and
            asks it before its first step; `ending.share()` says afterwards how much of it fits.

    Raises:
        ValueError: if `compute_loss` has parameters to train, or if the adversary cannot run here.
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
        adversary: Adversary | None = None,
        validation_data: ImageData | None = None,
        prepare_batch: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
        ending_cost: Callable[["Trainer"], EndingCost] | None = None,
    ):
        self.config, self.accelerator, self.data = config, accelerator, data
        self.output_dir = Path(config.output_dir)
        self.compute_loss, self.on_images = compute_loss, on_images
        self.state, self.shares, self.last_checkpoint = RunState(num_images=data.num_images), TimeShares(), None
        if config.profile:
            self.shares = StepProfile(accelerator, self.output_dir)

        self.module = model.to(accelerator.device)  # what is saved and sampled; `self.model` is what is called
        self._whole = WholeModel(self.module) if is_sharded(accelerator) else None
        if config.channels_last and not self._whole:  # FSDP2 takes contiguous parameters
            self.module.to(memory_format=torch.channels_last)
        if config.gradient_checkpointing:
            self.module.enable_gradient_checkpointing()
        if config.compile:
            self.module.compile()
        optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
            fused=accelerator.device.type in ("cpu", "cuda"),
        )
        self.model, self.optimizer = accelerator.prepare(self.module, optimizer)
        # Afterwards, when each process has its part of the parameters.
        average = {"std": config.ema_std, "decay": config.ema_decay, "warmup": config.ema_warmup}
        self.average = WeightAverage(self.module, **average) if config.use_ema else None
        self.snapshots = None
        if config.ema_snapshot_steps:
            if self._whole:
                raise ValueError(
                    "ema_snapshot_steps takes a copy of the model in each process, which FSDP spreads over them"
                )
            self.snapshots = AverageSnapshots(self.module, config.ema_stds, self.output_dir, self.average)
        self.adversary = adversary
        if adversary:
            adversary.prepare(accelerator, channels_last=config.channels_last)
        self.objective = self._check_objective(compute_loss)
        self._speed_watch = SpeedWatch(accelerator.device.type)
        self.budget, self.ending = config.budget(), Ending(self, ending_cost)
        self.learning_rate = LearningRate(
            config.lr_scheduler,
            config.learning_rate,
            self.budget,
            warmup_steps=config.lr_warmup_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
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
        self.validation = None
        if validation_data is not None:
            shapes = {name: getattr(self.batch_options, name) for name in ("latent_shape", "noise_shape")}
            self.validation = ValidationBatches(validation_data, config.train_batch_size, **shapes)
        self.prepare_batch = prepare_batch
        self._scale = 2 / torch.iinfo(torch.uint16 if data.dtype == "uint16" else torch.uint8).max
        self._losses, self._norms, self._adversary_losses = [], [], []
        self._stream_state = None  # of the checkpoint that the run goes on from

    @cached_property
    def data_identity(self) -> dict[str, Any]:
        """What tells the data from others; goes into the checkpoints."""
        return identify(self.data)

    def _check_objective(self, compute_loss: Callable) -> nn.Module | None:
        if not isinstance(compute_loss, nn.Module):
            return None
        if learned := [name for name, parameter in compute_loss.named_parameters() if parameter.requires_grad]:
            raise ValueError(
                f"compute_loss is trained by no optimizer, so its state must be buffers, got parameters: {learned[0]}"
                + (f" and {len(learned) - 1} more" if len(learned) > 1 else "")
            )
        return compute_loss.to(self.accelerator.device)

    def train(self) -> None:
        """Runs until the budget is used up, from the checkpoint that the config names if it names one.

        Raises:
            FloatingPointError: if the loss is not finite; the checkpoints from before that stay.
            SystemExit: after SIGTERM or SIGINT, with 128 + its number, when a checkpoint has been saved.
        """
        config, state = self.config, self.state
        if config.resume_from_checkpoint:
            self._resume(config.resume_from_checkpoint)
        self._stream = make_batches(
            self.data,
            self.batch_options,
            position=state.position,
            state=self._stream_state,
            num_workers=config.dataloader_num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        is_main = self.accelerator.is_main_process
        if is_main:
            with written_whole(self.output_dir / CONFIG_FILE) as partial:
                partial.write_text(to_yaml(config))
            if self.snapshots:
                self.snapshots.drop_after(state.step)
        self._log = MetricsLog(self.output_dir / METRICS_FILE, state.step) if is_main else None
        self._start = time.perf_counter() - state.seconds
        first_seconds = state.seconds
        with self._random_state_kept():
            lines = self.ending.reserve()
        for line in [*lines, *notes_before(self)]:
            self.accelerator.print(line)
        per_step = self.batch_options.images_per_step
        self._bar = ProgressBar(self.budget, per_step, steps=state.step, seconds=state.seconds, enabled=is_main)
        try:
            with catch_signals() as request, self.shares.watching():
                self._run(request)
        finally:
            self._bar.close()
            if self._log:
                self._log.close()
            del self._stream  # ends the workers
        self.optimizer.state.clear()  # what follows needs the weights alone, and may need the memory
        for line in [f"time: {self.shares.summary(self._now() - first_seconds)}", *notes_after(self)]:
            self.accelerator.print(line)

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
            self._bar.advance(state.step, self._now())
            is_over, signal_number = self._is_over(request)
            is_last = is_over and not signal_number
            if is_last or state.step % config.logging_steps == 0 or self._is_due(config.validation_steps):
                self._report(is_last)
            # Before the checkpoint, so that one never stands without the snapshots up to its step.
            if self.snapshots and (is_last or self._is_due(config.ema_snapshot_steps)):
                self._save_snapshot()
            if is_over or self._is_due(config.checkpointing_steps):
                self.save_checkpoint()
            if self.on_images and self._is_due(config.save_images_steps):
                self._fetch()
                with self.shares.of("making images"), self._random_state_kept():
                    self.on_images(self)
        # Asked once more: what has come since then may have come to one process alone.
        request.signal_number = int(*self._greatest(request.signal_number or 0)) or None
        if request.signal_number:
            if self.last_checkpoint is None or self.last_checkpoint.name != f"checkpoint-{state.step}":
                self.save_checkpoint()
            raise SystemExit(self._stopped(request))
        if state.losses:  # of a run that a signal ended at its last step
            self._report(is_last=True)

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0

    def _step(self):
        state, config, accelerator = self.state, self.config, self.accelerator
        if state.warmup_steps is None and self.learning_rate.is_warm(state.step, state.seconds):
            state.warmup_steps, state.warmup_seconds = state.step, state.seconds
        rate = self.learning_rate.at(state.step, state.seconds, state.warmup_end)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if adversary := self.adversary:
            adversary.begin_step(state.step, rate / config.learning_rate)
        # Dropout draws from the default generators: they too, Python's and NumPy's included, follow from the position.
        seed_generators(derived_seed(config.seed, state.position, accelerator.process_index), accelerator.device)

        losses, adversary_losses = [], []
        models = [self.model, adversary.model] if adversary else [self.model]
        for _ in range(config.gradient_accumulation_steps):
            with self.shares.of(WAITING):
                batch = self._move(next(self._stream))
            with accelerator.accumulate(*models):
                with frozen(adversary.module) if adversary else nullcontext():
                    with self.shares.part("forward and loss"):
                        batch = self._prepared(batch)
                        loss = self.compute_loss(self.model, batch)
                    with self.shares.part("backward"):
                        accelerator.backward(loss)
                losses.append(loss.detach())
                if adversary and adversary.active:
                    with self.shares.part("adversary"):
                        adversary_losses.append(adversary.learn(accelerator, self.module, batch, self._max_norm))
                if accelerator.sync_gradients:
                    with self.shares.part("clipping of gradients"):
                        self._norms.append(self._clip())
                with self.shares.part("optimizer"):
                    self.optimizer.step()
                    self.optimizer.zero_grad()
        self._losses.append(torch.stack(losses).mean())
        if adversary_losses:
            self._adversary_losses.append(torch.stack(adversary_losses).mean())
        with self.shares.part("averages of the weights"):
            if self.average:
                self.average.update(self.module)
            if self.snapshots:
                self.snapshots.update(self.module)

    @property
    def _max_norm(self) -> float:
        return self.config.max_grad_norm or math.inf

    def _clip(self) -> Tensor:
        return full(torch.as_tensor(self.accelerator.clip_grad_norm_(self.model.parameters(), self._max_norm)))

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch as `compute_loss` takes it."""
        return self._prepared(self._move(batch))

    def _move(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        device = self.accelerator.device
        batch = in_float32(batch) if device.type == "mps" else batch
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        if "pixels" in batch:
            images = batch.pop("pixels")
            batch["images"] = images if images.is_floating_point() else images.float().mul_(self._scale).sub_(1)
        return batch

    def _prepared(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.prepare_batch:
            with torch.no_grad(), self.accelerator.autocast():
                batch = self.prepare_batch(batch)
        if not self.config.channels_last:
            # Not contiguous(): it leaves one channel with the strides of channels_last, and the network follows them.
            order = torch.contiguous_format
            batch |= {name: batch[name].clone(memory_format=order) for name in ("images", "noise")}
        return batch

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _is_over(self, request: StopRequest) -> tuple[bool, int]:
        """Whether the run ends here, and the signal that ends it or 0; all processes agree on both, and on the time."""
        accelerator, state = self.accelerator, self.state
        by_steps = self.budget.is_over(state.step, 0.0)
        # Asking the others costs a wait for the device, so that only CPUs do it at each step.
        if accelerator.num_processes > 1 and accelerator.device.type != "cpu" and state.step % 10 and not by_steps:
            return False, 0
        state.seconds, number = self._greatest(self._now(), request.signal_number or 0)
        return bool(number) or self.budget.is_over(state.step, state.seconds), int(number)

    def _greatest(self, *values: float) -> list[float]:
        """The greatest of each value over the processes, the same in all of them; waits for the device."""
        if self.accelerator.num_processes == 1:
            return list(values)
        mine = torch.tensor([values], dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.gather(mine).amax(0).tolist()

    def _stopped(self, request: StopRequest) -> int:
        self.accelerator.print(
            f"{request.name} at step {self.state.step}: saved {self.last_checkpoint}; "
            "--resume_from_checkpoint latest goes on from there"
        )
        return 128 + request.signal_number

    def _fetch(self):
        """Brings the losses of the last steps to the host, and checks them."""
        if not self._losses:
            return
        series = [self._losses, self._norms, self._adversary_losses]
        values = torch.stack([value.float() for values in series for value in values])
        values = iter(self.accelerator.reduce(values, "mean").tolist())
        losses, norms, adversary_losses = ([next(values) for _ in one] for one in series)
        faults = [
            (self.state.step - len(numbers) + 1 + place, number, name)
            for name, numbers in (("loss", losses), ("adversary's loss", adversary_losses))
            for place, number in enumerate(numbers)
            if not math.isfinite(number)
        ]
        if faults:
            raise FloatingPointError(self._not_finite(*min(faults, key=lambda fault: fault[0])))
        self.state.losses += losses
        self.state.norms += norms
        self.state.adversary_losses += adversary_losses
        self._losses, self._norms, self._adversary_losses = [], [], []

    def _report(self, is_last: bool):
        """Logs the mean of the losses since the last report."""
        self._fetch()
        state = self.state
        if not state.losses:
            return
        loss, seconds = mean(state.losses), self._now()
        # With fp16's scaled loss a norm that is not finite is of a step that was left out, as a lower scale is sought.
        norms = [norm for norm in state.norms if math.isfinite(norm)]
        more = {"adversary_loss": mean(state.adversary_losses)} if state.adversary_losses else {}
        if hasattr(self.objective, "metrics"):
            more |= self.objective.metrics()
        if self.validation:
            is_due = self._is_due(self.config.validation_steps) or is_last
            more |= {"val_loss": self.evaluate()} if is_due else {}
        state.losses, state.norms, state.adversary_losses = [], [], []
        record = {
            "step": state.step,
            "images": state.position,
            "epoch": state.position / state.num_images if state.num_images else self._stream.passes,
            "loss": loss,
            "grad_norm": mean(norms) if norms else None,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": round(seconds, 3),
            "images_per_second": round(self._bar.report(state.step, seconds, loss), 1),
        } | more
        if self._log:
            self._log.write(record)
        values = {name: value for name, value in record.items() if name != "step" and value is not None}
        self.accelerator.log(values, step=state.step)
        if slow := self._speed_watch.note(state.step, seconds, self.shares):
            self.accelerator.print(slow)

    def _not_finite(self, step: int, loss: float, name: str) -> str:
        good = (
            f"the last good checkpoint is {self.last_checkpoint}"
            if self.last_checkpoint
            else "no checkpoint was saved"
        )
        return (
            f"the {name} is not finite ({loss}) at step {step}, so the run ends; {good}. A lower --learning_rate, a longer "
            "--lr_warmup_steps or --mixed_precision no may help"
        )

    @contextmanager
    def averaged_model(self) -> Iterator[nn.Module]:
        """The model in evaluation mode, with the averaged weights if there are any; its own come back at the end.

        Every process calls it: of a model whose parameters are spread over the processes each gets a copy of the whole.
        """
        if self._whole:
            state = self.average.state_dict() if self.average else dict(self.module.named_parameters())
            yield self._whole.of(state, self.module)
            return
        with (
            evaluating(self.module),
            self.average.applied_to(self.module) if self.average else nullcontext(),
        ):
            yield self.module

    @contextmanager
    def _random_state_kept(self) -> Iterator[None]:
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            yield

    @torch.no_grad()
    def evaluate(self, max_batches: int | None = None) -> float:
        """The mean loss on the held-out images with the averaged weights, at the same noise and times at each call.

        The processes share the images. An objective that is a module is in evaluation mode meanwhile.

        Args:
            max_batches: Take the loss on no more than so many batches of each process.

        Raises:
            ValueError: if there are no held-out images.
            FloatingPointError: if the loss is not finite.
        """
        if self.validation is None:
            raise ValueError("there are no held-out images: give validation_data")
        accelerator, losses, counts = self.accelerator, [], []
        modes = nullcontext() if self.objective is None else evaluating(self.objective)
        with self.shares.of("validating"), self.averaged_model() as model, modes, self._random_state_kept():
            share = self.validation.share(accelerator.process_index, accelerator.num_processes)
            for batch in islice(share, max_batches):
                losses.append(self.compute_loss(model, self.to_device(batch)))
                counts.append(len(batch["time"]))
            means = torch.stack(losses).tolist() if losses else []
            sums = [sum(mean * count for mean, count in zip(means, counts, strict=True)), sum(counts)]
            # Of one type in each process: one without a batch would have integers.
            sums = torch.tensor(sums, dtype=torch.float32, device=accelerator.device)
            total, count = accelerator.reduce(sums).tolist()
        if not math.isfinite(total):
            raise FloatingPointError(self._not_finite(self.state.step, total, "loss on the held-out images"))
        return total / count

    def save_checkpoint(self):
        """Writes OUTPUT_DIR/checkpoint-STEP, unless a loss since the last report is not finite."""
        self._fetch()
        # Agreed on, since the learning rate of a run by time follows from it.
        (self.state.seconds,) = self._greatest(self._now())
        with self.shares.of("saving"):
            folder = write_checkpoint(self.accelerator, self.output_dir, self.state.step, partial(save_run, self))
            if self.accelerator.is_main_process:
                config = self.config
                limits = {"limit": config.checkpoints_total_limit, "keep_every": config.checkpoints_keep_every}
                remove_old(self.output_dir, self.state.step, **limits)
        self.last_checkpoint = folder

    def _save_snapshot(self):
        self._fetch()
        with self.shares.of("saving"):
            write = partial(self.snapshots.write, self.state.step)
            all_or_none(self.accelerator, write if self.accelerator.is_main_process else None)

    def _resume(self, request: str):
        folder, passed_over = find_for_all(self.accelerator, self.output_dir, request)
        for line in passed_over:
            self.accelerator.print(line)
        if folder is None:
            self.accelerator.print(f"{self.output_dir} holds no checkpoint: the run starts at its beginning")
            return
        for line in check_same_run(self.config, folder):
            self.accelerator.print(line)
        self._stream_state = load_run(self, folder)
        self.last_checkpoint = folder
        self.accelerator.print(f"going on from {folder} (step {self.state.step}, {self.state.position} images seen)")
