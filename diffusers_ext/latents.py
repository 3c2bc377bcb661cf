"""Images to the latents that a denoiser is trained on, and back: encoding, decoding, and the scale between the two.

    z_model = (z - shift) scale

makes the latents of a VAE have mean 0 and standard deviation 1, as its config's `shift_factor` and `scaling_factor`
say: one number, or one for each channel. Some VAEs of diffusers have `latents_mean` and `latents_std` for each channel
beside them; the shift is then that mean, and the scale `scaling_factor / latents_std`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from diffusers_ext.command_names import name_commands


def check_one_level(vae: nn.Module, name: str = "vae") -> None:
    """Refuses an autoencoder with several levels of latents, such as `HierarchicalVAEModel`.

    Raises:
        ValueError: with what to take instead; `name` is that of the autoencoder.
    """
    if vae.config.get("num_levels") is not None:
        raise ValueError(
            name_commands(
                f"{name} must have latents of one level, which a denoiser is trained on, got a {type(vae).__name__}: its levels "
                "have a prior of their own, by which it makes images itself (.sample). Train a VAEModel instead, by "
                "training/train_vae.py --architecture conv"
            )
        )


def image_channels(config: Mapping[str, Any]) -> int:
    """Channels of the images that an autoencoder decodes, by its config; those of diffusers may say but what they take."""
    return config.get("out_channels", config["in_channels"])


def latent_scale(vae: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale of the latents of `vae`, float32, broadcasting against `like`.

    Args:
        like: Latents, shape `(batch, latent_channels, ...)`.

    Raises:
        ValueError: if the scale was never measured, or is not a positive finite number; or if there are several levels.
    """
    check_one_level(vae)
    config = vae.config
    scale, shift = config.get("scaling_factor"), config.get("shift_factor")
    if scale is None or not getattr(vae, "is_measured", True):
        raise ValueError(
            name_commands(
                f"the scale of this {type(vae).__name__}'s latents was never measured: its config has scaling_factor {scale} and "
                f"shift_factor {shift}. Set them by vae.register_to_config(shift_factor=MEAN, scaling_factor=1 / STD), with mean and std "
                "of the latents of the training images; training/train_vae.py does so at its end"
            )
        )
    # On the host until it is checked, so that an accelerator is not waited for.
    scale, shift = _broadcasting(scale, like), _broadcasting(0.0 if shift is None else shift, like)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        shift, scale = _broadcasting(mean, like), scale / _broadcasting(std, like)
    if not (scale.isfinite().all() and (scale > 0).all() and shift.isfinite().all()):
        raise ValueError(
            f"{type(vae).__name__}.config must have a positive finite scaling_factor and a finite shift_factor, got "
            f"{config.get('scaling_factor')} and {config.get('shift_factor')}"
        )
    return shift.to(like.device, non_blocking=True), scale.to(like.device, non_blocking=True)


def normalize_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """Latents of the VAE to those that a denoiser is trained on, float32."""
    shift, scale = latent_scale(vae, latents)
    return (latents.float() - shift) * scale


def encode_latents(
    vae: nn.Module, images: Tensor, generator: Generator | list[Generator] | None = None, sample: bool = False
) -> Tensor:
    """Images to the latents that a denoiser is trained on.

    Args:
        vae: `VAEModel`, or an autoencoder of diffusers.
        images: In [-1, 1], shape `(batch, channels, *spatial)`.
        generator: Source of the draw, if `sample`. With a list, that of image i comes from generator i alone.
        sample: Draw from the posterior, rather than take its mode.

    Returns:
        float32, shape `(batch, latent_channels, *latent_spatial)`.

    Raises:
        ValueError: if the scale of the latents was never measured.
    """
    check_one_level(vae)
    encoded = vae.encode(images.to(vae.dtype))
    if not hasattr(
        encoded, "latent_dist"
    ):  # of a VQModel or an AutoencoderDC: one code for an image, and no posterior
        return normalize_latents(vae, encoded[0])
    posterior = encoded.latent_dist
    if not sample:
        return normalize_latents(vae, posterior.mode())
    if not isinstance(generator, list | tuple):
        return normalize_latents(vae, posterior.sample(generator))
    mean = posterior.mode()
    if len(generator) != len(mean):
        raise ValueError(f"generator must be one or one for each of {len(mean)} images, got {len(generator)}")
    noise = [torch.randn(mean.shape[1:], generator=g, device=g.device) for g in generator]
    std = posterior.logvar.mul(0.5).exp()
    return normalize_latents(vae, mean + std * torch.stack(noise).to(mean))


def decode_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """Latents of a denoiser to images, float32, in about [-1, 1]; `encode_latents` backwards.

    Raises:
        ValueError: if the scale of the latents was never measured.
    """
    shift, scale = latent_scale(vae, latents)
    return vae.decode((latents.float() / scale + shift).to(vae.dtype), return_dict=False)[0].float()


def _broadcasting(value: float | list[float], like: Tensor) -> Tensor:
    values = torch.as_tensor(value, dtype=torch.float32, device="cpu").flatten()
    if len(values) not in (1, like.shape[1]):
        raise ValueError(f"the latents' scale must be one or one for each of {like.shape[1]} channels, got {value}")
    return values.view(-1, *[1] * (like.ndim - 2))
