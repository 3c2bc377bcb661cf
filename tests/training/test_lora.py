"""Runs that train an adapter of a pipeline's network alone."""

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file

from diffusers_ext import DiffusionPipeline, DiTModel, ExtDDIMScheduler, GuidedDiffusionPipeline
from diffusers_ext.trainer.run_folder import ADAPTER_FILE
from tiny import image_of, tiny_stock_unet, tiny_unet
from training.train_ddpm import TrainConfig, main


SMALL = {
    "train_batch_size": 4,
    "max_train_samples": 40,
    "num_inference_steps": 2,
    "sample_columns": 1,
    "max_train_steps": 2,
    "mixed_precision": "no",
}
LORA = {"lora_rank": 2, "lora_alpha": 8.0, "learning_rate": 0.01, "lr_scheduler": "constant"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    names = {label: str(label) for label in range(10)}
    GuidedDiffusionPipeline(
        tiny_unet(num_classes=10), ExtDDIMScheduler(timestep_spacing="trailing"), id2label=names
    ).save_pretrained(folder)
    return str(folder)


def train(output_dir, base, **settings):
    settings = SMALL | LORA | {"output_dir": str(output_dir), "pretrained_pipeline": base} | settings
    return main(TrainConfig(**settings))


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "run", base, checkpointing_steps=1)


def test_only_the_adapter_is_trained_and_the_pipeline_has_it_in_its_weights(run, base):
    before, after = (DiffusionPipeline.from_pretrained(folder).denoiser.state_dict() for folder in (base, run))
    assert before.keys() == after.keys()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and all(name.rsplit(".", 2)[1] in ("to_q", "to_kv", "to_out") for name in changed)


def test_the_card_says_that_an_adapter_was_trained(run, base):
    assert f"fine-tuned by an adapter of rank 2 (LoRA) from `{base}`" in (run / "README.md").read_text()


def test_the_pipeline_it_began_with_and_the_adapter_make_the_pictures_of_the_pipeline_saved(run, base):
    assert all(name.startswith("denoiser.") and "lora" in name for name in load_file(run / ADAPTER_FILE))
    pipe = DiffusionPipeline.from_pretrained(base)
    plain = image_of(pipe)
    pipe.load_lora_weights(run)
    expected = image_of(DiffusionPipeline.from_pretrained(run))
    assert np.abs(image_of(pipe) - expected).max() < 1e-4 < np.abs(plain - expected).max()


def test_it_goes_on_from_a_checkpoint_to_the_same_adapter(run, base, tmp_path):
    train(tmp_path / "parts", base, max_train_steps=1, checkpointing_steps=1)
    folder = train(tmp_path / "parts", base, resume_from_checkpoint="latest", checkpointing_steps=1)
    ours, theirs = load_file(folder / ADAPTER_FILE), load_file(run / ADAPTER_FILE)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_what_an_adapter_cannot_do_is_refused(base, tmp_path):
    def refused(message, base=base, **settings):
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "refused", base, **settings)

    with pytest.raises(ValueError, match="lora_rank has no meaning without pretrained_pipeline"):
        TrainConfig(lora_rank=2)
    refused("ema_snapshot_steps takes averages of all weights", ema_snapshot_steps=1)
    refused("lora_rank trains factors of them: take adamw", optimizer="muon")
    refused("lora_target_modules must be ends .* such as .*to_q.*, got q", lora_target_modules=("q",))
    DDPMPipeline(tiny_stock_unet(), DDPMScheduler()).save_pretrained(tmp_path / "stock")
    refused("lora_rank is for UNetModel and DiTModel", base=str(tmp_path / "stock"), unconditional=True)
    unlabelled = GuidedDiffusionPipeline(DiTModel(8, 4, 1, None, 16, 1, 2), ExtDDIMScheduler())
    unlabelled.save_pretrained(tmp_path / "unlabelled")
    refused("which trains no embeddings, got the new 0, 1", base=str(tmp_path / "unlabelled"))
    without_null = tiny_unet(num_classes=10)
    without_null.register_to_config(learned_unconditional=False)
    GuidedDiffusionPipeline(without_null, ExtDDIMScheduler()).save_pretrained(tmp_path / "no_null")
    refused("an adapter does not learn to embed none", base=str(tmp_path / "no_null"))
