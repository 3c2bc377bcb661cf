"""Options by the names that other trainers give them, for the error about one that a script does not have.

Those are diffusers' `examples/unconditional_image_generation` and `examples/text_to_image`, lucidrains'
`denoising_diffusion_pytorch`, the commonest of OpenAI's guided-diffusion, and one of transformers. Names that are accepted as they are stand as aliases beside the options themselves.
"""

from collections.abc import Collection
from typing import NamedTuple


class Foreign(NamedTuple):
    """The counterpart of an option of another trainer.

    Args:
        names: Options of this package; the first that a script has is the counterpart.
        note: A hint, as a clause; or, without `names`, why there is none.
    """

    names: tuple[str, ...]
    note: str = ""


_STEPS = "runs end after optimizer steps, or after a time by max_train_time"
_WEIGHTS = "pretrained_pipeline takes the weights that a pipeline loads by default"
_EMA = "the average is a power function by ema_std, or an exponential one by ema_decay"

FOREIGN_OPTIONS = {
    # diffusers, both examples
    "num_epochs": Foreign(("num_train_epochs", "max_train_steps"), _STEPS),
    "num_train_epochs": Foreign(("max_train_steps",), _STEPS),
    "save_images_epochs": Foreign(("save_images_steps",), "it counts optimizer steps"),
    "save_model_epochs": Foreign(("checkpointing_steps",), "it counts optimizer steps"),
    "validation_epochs": Foreign(("validation_steps",), "it counts optimizer steps"),
    "center_crop": Foreign(("resize_mode",), "crop cuts in the middle"),
    "image_interpolation_mode": Foreign((), "images are always resized bicubically, with antialiasing"),
    "model_config_name_or_path": Foreign(("model",), "the network's sizes are options of their own"),
    "pretrained_model_name_or_path": Foreign(("pretrained_pipeline", "pipeline", "run")),
    "revision": Foreign((), _WEIGHTS),
    "variant": Foreign((), _WEIGHTS),
    "non_ema_revision": Foreign((), _WEIGHTS),
    "proportion_empty_prompts": Foreign(("caption_dropout", "label_dropout")),
    "ema_inv_gamma": Foreign((), _EMA),
    "ema_power": Foreign(("ema_std",), _EMA),
    "offload_ema": Foreign((), "the average stays where the weights are"),
    "foreach_ema": Foreign((), "the average is always updated by torch's foreach operations"),
    "logging_dir": Foreign(("output_dir",), "logs go into it"),
    "local_rank": Foreign((), "accelerate launch sets it"),
    "scale_lr": Foreign((), "learning_rate is the one that is taken: multiply it yourself"),
    "use_8bit_adam": Foreign((), "AdamW keeps its moments in fp32"),
    "allow_tf32": Foreign((), "it is torch's setting: torch.backends.cuda.matmul"),
    "enable_xformers_memory_efficient_attention": Foreign((), "torch's own fused attention is used where it is fast"),
    "dream_training": Foreign((), "it is not built in"),
    "dream_detail_preservation": Foreign((), "dream_training is not built in"),
    "noise_offset": Foreign(
        ("rescale_betas_zero_snr",), "it mends what the offset is for, the last noise level that is not pure noise"
    ),
    "input_perturbation": Foreign((), "it is not built in"),
    "preserve_input_precision": Foreign((), "16-bit images are read as such"),
    "hub_strategy": Foreign(("push_to_hub_every",), "the end is pushed in any case"),
    # lucidrains
    "gradient_clip": Foreign(("max_grad_norm",)),
    "gradient_accumulate_every": Foreign(("gradient_accumulation_steps",)),
    "augment_horizontal_flip": Foreign(("random_flip",)),
    "train_lr": Foreign(("learning_rate",)),
    "train_num_steps": Foreign(("max_train_steps",)),
    "ema_update_every": Foreign((), "the average is updated after every optimizer step"),
    "adam_betas": Foreign(("adam_beta1",), "and adam_beta2"),
    "save_and_sample_every": Foreign(("save_images_steps",), "and checkpointing_steps"),
    "num_samples": Foreign(("num_images", "sample_columns")),
    "num_fid_samples": Foreign(("num_images",)),
    "calculate_fid": Foreign((), "training/evaluate.py measures a run"),
    "results_folder": Foreign(("output_dir",)),
    "amp": Foreign(("mixed_precision",), "no, fp16 or bf16"),
    "mixed_precision_type": Foreign(("mixed_precision",)),
    "split_batches": Foreign((), "train_batch_size is of one process"),
    "convert_image_to": Foreign(("image_mode",)),
    "image_size": Foreign(("resolution",)),
    "timesteps": Foreign(("num_train_timesteps",)),
    "sampling_timesteps": Foreign(("num_inference_steps",)),
    "min_snr_loss_weight": Foreign(("loss_weighting",), "min_snr is one of them"),
    "min_snr_gamma": Foreign(("snr_gamma",)),
    "offset_noise_strength": Foreign(("rescale_betas_zero_snr",), "it mends what the offset is for"),
    "ddim_sampling_eta": Foreign((), "it is an argument of the pipeline's call, eta"),
    "auto_normalize": Foreign((), "images are always put into [-1, 1]"),
    "dim": Foreign(("block_out_channels", "hidden_size"), "hidden_size of a transformer"),
    "dim_mults": Foreign(("block_out_channels",), "the channels themselves"),
    "self_condition": Foreign((), "it is not built in"),
    "folder": Foreign(("dataset_name",)),
    "channels": Foreign(("image_mode",), "channels are those of the images, or as many as that mode has"),
    "init_dim": Foreign(("block_out_channels",), "the first width is that of the first convolution too"),
    "out_dim": Foreign((), "it follows from the images and the objective"),
    "learned_variance": Foreign(("objective",), "hybrid and vlb learn the variance"),
    "learned_sinusoidal_cond": Foreign((), "the time is embedded by fixed sines"),
    "random_fourier_features": Foreign((), "the time is embedded by fixed sines"),
    "learned_sinusoidal_dim": Foreign((), "the time is embedded by fixed sines"),
    "sinusoidal_pos_emb_theta": Foreign((), "the time is embedded by sines of a fixed range of frequencies"),
    "attn_dim_head": Foreign(("attention_head_dim",)),
    "attn_heads": Foreign(("attention_head_dim", "num_attention_heads"), "heads follow from the width and that"),
    "full_attn": Foreign(("attention_resolutions",), "the sides of the maps with attention"),
    "flash_attn": Foreign((), "torch's own fused attention is used where it is fast"),
    "schedule_fn_kwargs": Foreign(("beta_start",), "and beta_end"),
    "immiscible": Foreign((), "it is not built in"),
    "inception_block_idx": Foreign((), "training/evaluate.py measures a run"),
    "save_best_and_latest_only": Foreign(("checkpoints_total_limit",), "how many of the last are kept"),
    # OpenAI's guided-diffusion
    "log_interval": Foreign(("logging_steps",)),
    "save_interval": Foreign(("checkpointing_steps",)),
    "microbatch": Foreign(("gradient_accumulation_steps",), "forward passes of a step, not images of one"),
    "ema_rate": Foreign(("ema_decay",)),
    "lr_anneal_steps": Foreign(("max_train_steps",), "and lr_scheduler linear"),
    "num_channels": Foreign(("block_out_channels",), "the channels themselves"),
    "channel_mult": Foreign(("block_out_channels",), "the channels themselves"),
    "num_res_blocks": Foreign(("layers_per_block",)),
    "num_head_channels": Foreign(("attention_head_dim",)),
    "diffusion_steps": Foreign(("num_train_timesteps",)),
    "noise_schedule": Foreign(("beta_schedule",)),
    "learn_sigma": Foreign(("objective",), "hybrid and vlb learn the variance"),
    "schedule_sampler": Foreign(("timestep_sampling",), "importance is the one by the second moment of the loss"),
    "timestep_respacing": Foreign(("num_inference_steps",)),
    # short names that are common
    "lr": Foreign(("learning_rate",)),
    "batch_size": Foreign(("train_batch_size", "eval_batch_size")),
    "epochs": Foreign(("num_train_epochs", "max_train_steps"), _STEPS),
    "data_dir": Foreign(("dataset_name",)),
    "num_workers": Foreign(("dataloader_num_workers",)),
    "weight_decay": Foreign(("adam_weight_decay",)),
    "clip_grad_norm": Foreign(("max_grad_norm",)),
    "resume": Foreign(("resume_from_checkpoint",), "latest, or a path"),
    "wandb": Foreign(("report_to",)),
    "steps": Foreign(("max_train_steps",)),
    "max_steps": Foreign(("max_train_steps",)),
    "dataset": Foreign(("dataset_name",)),
    "data_path": Foreign(("dataset_name",)),
    "save_dir": Foreign(("output_dir",)),
    "fp16": Foreign(("mixed_precision",), "no, fp16 or bf16"),
    "bf16": Foreign(("mixed_precision",), "no, fp16 or bf16"),
    "device": Foreign((), "the GPU is taken if there is one; accelerate launch has options for others"),
    "num_gpus": Foreign((), "accelerate launch --num_processes has it"),
    "cfg_scale": Foreign(("guidance_scale",)),
}


def explain_foreign(name: str, known: Collection[str], prefix: str = "") -> str | None:
    """The counterpart of another trainer's option, or why there is none, as the end of a sentence; `None` if not known.

    Args:
        name: As it was given, with underscores or hyphens.
        known: The options that the script has.
        prefix: Of options, such as "--".
    """
    foreign = FOREIGN_OPTIONS.get(name.replace("-", "_"))
    if foreign is None:
        return None
    here = next((other for other in foreign.names if other in known), None)
    if here is not None:
        # The note on steps is about one option alone, and would be wrong of another.
        note = foreign.note if foreign.note != _STEPS or here == "max_train_steps" else ""
        return f"here it is {prefix}{here}" + (f": {note}" if note else "")
    is_training = "learning_rate" in known
    return f"there is none here: {foreign.note}" if foreign.note and is_training else None
