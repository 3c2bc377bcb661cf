"""Networks."""

from diffusers_ext.models.dit import DiTModel
from diffusers_ext.models.unet import UNetModel


__all__ = ["DiTModel", "UNetModel"]
