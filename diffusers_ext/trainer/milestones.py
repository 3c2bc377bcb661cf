"""What a run pushes to the Hub before it ends: the pipeline of every k-th checkpoint, as a branch.

The pipeline is saved between two steps, and uploaded by a thread while the steps go on. An upload that fails is tried
again with growing waits; it never stops the run, and keeps its folder, `OUTPUT_DIR/milestones/checkpoint-STEP`.
"""

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers import DiffusionPipeline, ModelMixin

from diffusers_ext.atomic_files import INDEX_FILES, finish_replacing, replace_files
from diffusers_ext.hub.cards import TrainingRun, describe_machine, source_commit, write_card
from diffusers_ext.hub.push import MILESTONES, push_patiently
from diffusers_ext.hub.remote_code import add_code
from diffusers_ext.trainer.checkpoints import list_checkpoints, remove_at_once, step_from_name


if TYPE_CHECKING:
    from diffusers_ext.trainer.loop import Trainer


class Milestones:
    """Pushes what a run would save if it ended here.

    Args:
        trainer: The run.
        saved: Enters with the pipeline or model that the run saves at its end, as it stands; every process calls it.
    """

    def __init__(
        self, trainer: "Trainer", saved: Callable[["Trainer"], AbstractContextManager[DiffusionPipeline | ModelMixin]]
    ):
        self._trainer, self._saved = trainer, saved
        self._pending: dict[str, Future[tuple[str | None, str]]] = {}
        self._hurry = threading.Event()  # set when nobody wants to wait between two tries any more
        self._uploads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="milestones")

    def before_checkpoint(self) -> None:
        """Saves the step's and begins to push it, if it is one of those; every process calls it, before the step's checkpoint.

        So a run that is ended in between goes on from before the step, and comes to its milestone again.
        """
        config, step = self._trainer.config, self._trainer.state.step
        if config.push_to_hub_every is None or step % (config.checkpointing_steps * config.push_to_hub_every):
            return
        with self._saved(self._trainer) as saved:
            if self._trainer.accelerator.is_main_process:
                self._save_and_push(saved, f"checkpoint-{step}")
        self._trainer.accelerator.wait_for_everyone()

    def go_on(self) -> None:
        """Begins to push what the run had saved before it was ended, up to the step that it goes on from."""
        root = self._trainer.output_dir / MILESTONES
        if self._trainer.config.push_to_hub_every is None or not self._trainer.accelerator.is_main_process:
            return
        for pushed in root.glob(".checkpoint-*"):  # and half removed
            shutil.rmtree(pushed, ignore_errors=True)
        for folder in list_checkpoints(root):
            finish_replacing(folder)
            is_complete = any((folder / index).is_file() for index in INDEX_FILES)
            if is_complete and step_from_name(folder) <= self._trainer.state.step:
                self._pending[folder.name] = self._uploads.submit(self._push, folder.name)

    def finish(self) -> list[str]:
        """Waits for the uploads, without further waits between tries; gives a line for each that could not be made."""
        self._hurry.set()
        self._uploads.shutdown()
        return [line for upload in self._pending.values() if (line := upload.result()[1])]

    def abandon(self) -> list[str]:
        """For a run that a signal ends: gives a line for each folder that is not pushed."""
        self._hurry.set()
        self._uploads.shutdown(wait=False, cancel_futures=True)
        return [
            f"{self._trainer.output_dir / MILESTONES / name} may not be pushed yet"
            for name, upload in self._pending.items()
            if upload.cancelled() or not upload.done() or upload.result()[1]
        ]

    def _save_and_push(self, saved: DiffusionPipeline | ModelMixin, name: str) -> None:
        try:
            self._save(saved, self._trainer.output_dir / MILESTONES / name)
        except Exception as error:  # libraries report a full disk as what they like
            self._pending[name] = Future()
            self._pending[name].set_result((None, f"{name} was not pushed, since it could not be saved: {error}"))
        else:
            self._pending[name] = self._uploads.submit(self._push, name)

    def _save(self, saved: DiffusionPipeline | ModelMixin, folder: Path) -> None:
        trainer = self._trainer
        name, (origin, base_model) = hub_name(trainer.config), trainer.config.origin
        run = TrainingRun(
            commit=source_commit(),
            seed=trainer.config.seed,
            num_steps=trainer.state.step,
            seconds=trainer.clock.now(),
            hardware=describe_machine(),
            origin=origin,
            base_model=base_model,
        )
        about = {
            "data": f"{trainer.data.name}, split {trainer.config.dataset_split}. The training was not at its end.",
            "title": f"{name.rpartition('/')[2]}, step {trainer.state.step}",
        }

        def write(partial: Path):
            saved.save_pretrained(partial)
            if isinstance(saved, ModelMixin):
                add_code(partial)
            write_card(partial, training=run, repo_id=name, revision=folder.name, **about)

        shutil.rmtree(folder, ignore_errors=True)  # of a run that was ended between this and its checkpoint
        replace_files(folder, "config.json" if isinstance(saved, ModelMixin) else "model_index.json", write)

    def _push(self, name: str) -> tuple[str | None, str]:
        config, folder = self._trainer.config, self._trainer.output_dir / MILESTONES / name
        address, line = push_patiently(
            folder,
            hub_name(config),
            branch=name,
            sleep=self._hurry.wait,
            commit_message=f"Upload {name}",
            **hub_access(config),
        )
        if address is not None:
            with suppress(OSError):
                remove_at_once(folder)
        return address, line


def hub_name(config) -> str:
    """The repository that a run is pushed to, as its options have it."""
    return config.hub_model_id or Path(config.output_dir).resolve().name


def hub_access(config) -> dict[str, str | bool | None]:
    """The options of a run that `diffusers_ext.hub.push` takes."""
    return {"token": config.hub_token, "private": config.hub_private_repo or None}
