"""Networks."""

from diffusers_ext.models.dit import DiTModel
from diffusers_ext.models.hierarchical_vae import HierarchicalVAEModel
from diffusers_ext.models.unet import UNetModel
from diffusers_ext.models.vae import VAEModel


__all__ = ["DiTModel", "HierarchicalVAEModel", "UNetModel", "VAEModel"]
