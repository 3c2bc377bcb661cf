"""The training loop: optimizer steps until the budget is used up, watched, saved and resumable at each of them."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean as mean

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusers_ext.trainer.adversary import Adversary, frozen
from diffusers_ext.trainer.batches import BatchOptions, derived_seed
from diffusers_ext.trainer.checkpoints import find_checkpoint, remove_old, write_checkpoint
from diffusers_ext.trainer.config import TrainerConfig
from diffusers_ext.trainer.data import ImageData
from diffusers_ext.trainer.ema import WeightAverage
from diffusers_ext.trainer.options import to_yaml
from diffusers_ext.trainer.posthoc_ema import AverageSnapshots
from diffusers_ext.trainer.progress import ProgressBar, TimeShares
from diffusers_ext.trainer.run_folder import CONFIG_FILE, METRICS_FILE, MetricsLog, check_same_run
from diffusers_ext.trainer.schedule import LearningRate
from diffusers_ext.trainer.signals import StopRequest, catch_signals
from diffusers_ext.trainer.stream import StreamData, load_stream_state, make_batches, save_stream_state


STATE_FILE, AVERAGE_FILE, OBJECTIVE_FILE = "run_state.json", "average.safetensors", "objective.safetensors"


@dataclass
class RunState:
    """Where a run stands.

    Attributes:
        step: Optimizer steps done.
        position: Images looked at, by all processes together; the next batch starts there.
        num_images: Of the data set, on which the meaning of a position depends; None for a stream.
        seconds: Time of the run, from the first step on, over all its parts.
        warmup_seconds: `seconds` when the warm-up of the learning rate ended.
        losses, norms, adversary_losses: Of each step since the last line of the log.
    """

    step: int = 0
    position: int = 0
    num_images: int | None = 0
    seconds: float = 0.0
    warmup_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    adversary_losses: list[float] = field(default_factory=list)


class Trainer:
    """Trains one model.

    Args:
        config: The options, settled for this machine.
        accelerator: Of accelerate; the engine for devices, precision and processes.
        model: Whose parameters are trained, in float32.
        compute_loss: Takes the prepared model and a batch (see `TrainingBatches`) on its device, with `images` in
            [-1, 1] in place of `pixels`; gives the mean loss of the batch. Random numbers come from the batch. If it
            is a module without parameters to train, its buffers belong to the run: they go to the device and into the
            checkpoints, and must be the same in all processes after each step. If it has `metrics() -> dict[str,
            float]`, all processes call that at each line of the log, and the numbers are added to it; there, and only
            there, it may wait for the device. If it has `draw(folder)`, the main process calls that at the end.
        data: The images.
        batch_options: Keywords of `BatchOptions` beyond those that the config of every script has.
        on_images: Called with this object every `save_images_steps`, on the main process. It must leave the default
            generators as they are, or the run depends on how often it is called.
        adversary: A second network that learns against the model.

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
    ):
        self.config, self.accelerator, self.data = config, accelerator, data
        self.output_dir = Path(config.output_dir)
        self.compute_loss, self.on_images = compute_loss, on_images
        self.state, self.shares, self.last_checkpoint = RunState(num_images=data.num_images), TimeShares(), None

        self.module = model.to(accelerator.device)  # what is saved and sampled; `self.model` is what is called
        if config.channels_last:
            self.module.to(memory_format=torch.channels_last)
        if config.gradient_checkpointing:
            self.module.enable_gradient_checkpointing()
        if config.compile:
            self.module.compile()
        average = {"std": config.ema_std, "decay": config.ema_decay, "warmup": config.ema_warmup}
        self.average = WeightAverage(self.module, **average) if config.use_ema else None
        self.snapshots = None
        if config.ema_snapshot_steps:
            self.snapshots = AverageSnapshots(self.module, config.ema_stds, self.output_dir, self.average)
        optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
            fused=accelerator.device.type in ("cpu", "cuda"),
        )
        self.model, self.optimizer = accelerator.prepare(self.module, optimizer)
        self.adversary = adversary
        if adversary:
            adversary.prepare(accelerator, channels_last=config.channels_last)
        self.objective = self._check_objective(compute_loss)
        self.budget = config.budget()
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
        self._scale = 2 / torch.iinfo(torch.uint16 if data.dtype == "uint16" else torch.uint8).max
        self._losses, self._norms, self._adversary_losses = [], [], []
        self._stream_state = None  # of the checkpoint that the run goes on from

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
            (self.output_dir / CONFIG_FILE).write_text(to_yaml(config))
            if self.snapshots:
                self.snapshots.drop_after(state.step)
        self._log = MetricsLog(self.output_dir / METRICS_FILE, state.step) if is_main else None
        per_step = self.batch_options.images_per_step
        self._bar = ProgressBar(self.budget, per_step, steps=state.step, seconds=state.seconds, enabled=is_main)
        self._start = time.perf_counter() - state.seconds
        first_seconds = state.seconds
        try:
            with catch_signals() as request:
                self._run(request)
        finally:
            self._bar.close()
            if self._log:
                self._log.close()
            del self._stream  # ends the workers
        self.accelerator.print(f"time: {self.shares.summary(state.seconds - first_seconds)}")

    def _run(self, request: StopRequest):
        config, state = self.config, self.state
        self.model.train()
        while not self._is_over(request):
            self._step()
            state.step += 1
            state.position += self.batch_options.images_per_step
            self._bar.advance(state.step, self._now())
            if state.step % config.logging_steps == 0:
                self._report()
            # Before the checkpoint, so that one never stands without the snapshots up to its step.
            if self.snapshots and state.step % config.ema_snapshot_steps == 0:
                self._save_snapshot()
            if state.step % config.checkpointing_steps == 0:
                self.save_checkpoint()
            if self.on_images and config.save_images_steps and state.step % config.save_images_steps == 0:
                self._fetch()
                with self.shares.of("making images"):
                    if self.accelerator.is_main_process:
                        self.on_images(self)
                    self.accelerator.wait_for_everyone()
                self.model.train()
        if request.signal_number:
            self.save_checkpoint()
            raise SystemExit(self._stopped(request))
        self._report()
        if self.snapshots and state.step % config.ema_snapshot_steps:
            self._save_snapshot()
        if self.last_checkpoint is None or self.last_checkpoint.name != f"checkpoint-{state.step}":
            self.save_checkpoint()

    def _step(self):
        state, config, accelerator = self.state, self.config, self.accelerator
        if state.step == config.lr_warmup_steps:
            state.warmup_seconds = state.seconds
        rate = self.learning_rate.at(state.step, state.seconds, state.warmup_seconds)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if adversary := self.adversary:
            adversary.begin_step(state.step, rate / config.learning_rate)
        # Dropout draws from the default generators: they too follow from the position alone.
        torch.manual_seed(derived_seed(config.seed, state.position, accelerator.process_index))

        losses, adversary_losses = [], []
        models = [self.model, adversary.model] if adversary else [self.model]
        for _ in range(config.gradient_accumulation_steps):
            with self.shares.of("waiting for data"):
                batch = self._to_device(next(self._stream))
            with accelerator.accumulate(*models):
                with frozen(adversary.module) if adversary else nullcontext():
                    loss = self.compute_loss(self.model, batch)
                    accelerator.backward(loss)
                losses.append(loss.detach())
                if adversary and adversary.active:
                    adversary_losses.append(adversary.learn(accelerator, self.module, batch, self._max_norm))
                if accelerator.sync_gradients:
                    self._norms.append(self._clip())
                self.optimizer.step()
                self.optimizer.zero_grad()
        self._losses.append(torch.stack(losses).mean())
        if adversary_losses:
            self._adversary_losses.append(torch.stack(adversary_losses).mean())
        if self.average:
            self.average.update(self.module)
        if self.snapshots:
            self.snapshots.update(self.module)

    @property
    def _max_norm(self) -> float:
        return self.config.max_grad_norm or math.inf

    def _clip(self) -> Tensor:
        return torch.as_tensor(self.accelerator.clip_grad_norm_(self.model.parameters(), self._max_norm))

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = {name: value.to(self.accelerator.device, non_blocking=True) for name, value in batch.items()}
        batch["images"] = batch.pop("pixels").float().mul_(self._scale).sub_(1)
        if not self.config.channels_last:
            batch |= {name: batch[name].contiguous() for name in ("images", "noise")}
        return batch

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _is_over(self, request: StopRequest) -> bool:
        """Whether the run ends here; all processes agree on it, and on the time."""
        accelerator, state = self.accelerator, self.state
        # Asking the others costs a wait for the device, so that only CPUs do it at each step.
        if accelerator.num_processes == 1:
            state.seconds = self._now()
        elif accelerator.device.type == "cpu" or state.step % 10 == 0:
            mine = torch.tensor(
                [self._now(), request.signal_number or 0], device=accelerator.device, dtype=torch.float64
            )
            both = accelerator.gather(mine[None]).amax(0).tolist()
            state.seconds, request.signal_number = both[0], int(both[1]) or None
        else:
            return self.budget.is_over(state.step, 0.0)
        return bool(request.signal_number) or self.budget.is_over(state.step, state.seconds)

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

    def _report(self):
        """Logs the mean of the losses since the last report."""
        self._fetch()
        state = self.state
        if not state.losses:
            return
        loss, norm, seconds = mean(state.losses), mean(state.norms), self._now()
        more = {"adversary_loss": mean(state.adversary_losses)} if state.adversary_losses else {}
        if hasattr(self.objective, "metrics"):
            more |= self.objective.metrics()
        state.losses, state.norms, state.adversary_losses = [], [], []
        record = {
            "step": state.step,
            "images": state.position,
            "epoch": state.position / state.num_images if state.num_images else self._stream.passes,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": round(seconds, 3),
            "images_per_second": round(self._bar.report(state.step, seconds, loss), 1),
        } | more
        if self._log:
            self._log.write(record)
        self.accelerator.log({name: value for name, value in record.items() if name != "step"}, step=state.step)

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
        """The model in evaluation mode, with the averaged weights if there are any; its own come back at the end."""
        training = self.module.training
        self.module.eval()
        try:
            with self.average.applied_to(self.module) if self.average else nullcontext():
                yield self.module
        finally:
            self.module.train(training)

    def save_checkpoint(self):
        """Writes OUTPUT_DIR/checkpoint-STEP, unless a loss since the last report is not finite."""
        self._fetch()
        self.state.seconds = self._now()
        with self.shares.of("saving"):
            folder = write_checkpoint(self.accelerator, self.output_dir, self.state.step, self._save)
            if self.accelerator.is_main_process:
                config = self.config
                limits = {"limit": config.checkpoints_total_limit, "keep_every": config.checkpoints_keep_every}
                remove_old(self.output_dir, self.state.step, **limits)
        self.last_checkpoint = folder

    def _save_snapshot(self):
        self._fetch()
        with self.shares.of("saving"):
            if self.accelerator.is_main_process:
                self.snapshots.write(self.state.step)

    def _save(self, folder: Path):
        self.accelerator.save_state(str(folder))
        save_stream_state(self._stream.state, folder, self.accelerator.process_index)
        if not self.accelerator.is_main_process:
            return
        (folder / STATE_FILE).write_text(json.dumps(dataclasses.asdict(self.state), indent=2) + "\n")
        (folder / CONFIG_FILE).write_text(to_yaml(self.config))
        if self.average:
            save_file(self.average.state_dict(), folder / AVERAGE_FILE)
        if self.snapshots:
            self.snapshots.save(folder)
        if self.objective:
            state = self.objective.state_dict()
            # safetensors refuses tensors that share memory or lie in another order.
            save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / OBJECTIVE_FILE)

    def _resume(self, request: str):
        folder, passed_over = find_checkpoint(self.output_dir, request)
        for line in passed_over:
            self.accelerator.print(line)
        if folder is None:
            self.accelerator.print(f"{self.output_dir} holds no checkpoint: the run starts at its beginning")
            return
        for line in check_same_run(self.config, folder):
            self.accelerator.print(line)
        saved = json.loads((folder / STATE_FILE).read_text())
        if saved["num_images"] != self.data.num_images:
            raise ValueError(
                f"{folder} is of a run on {saved['num_images']} images, the data set {self.data.name} has "
                f"{self.data.num_images}: give the same data, or start a new run in another --output_dir"
            )
        if self.data.num_images is None:
            self._stream_state = load_stream_state(folder, self.accelerator.process_index)
        self.accelerator.load_state(str(folder))
        for name, value in saved.items():
            setattr(self.state, name, value)
        if self.average:
            self.average.load_state_dict(load_file(folder / AVERAGE_FILE))
        if self.snapshots:
            self.snapshots.load(folder)
        self._load_objective(folder)
        self.last_checkpoint = folder
        self.accelerator.print(f"going on from {folder} (step {self.state.step}, {self.state.position} images seen)")

    def _load_objective(self, folder: Path):
        if self.objective is None:
            return
        path = folder / OBJECTIVE_FILE
        if not path.exists():
            raise ValueError(
                f"{folder} has no {OBJECTIVE_FILE}, so it is of a run without one: give the same objective"
            )
        self.objective.load_state_dict(load_file(path))
