"""Networks."""

from diffusers_ext.models.unet import UNetModel


__all__ = ["UNetModel"]
