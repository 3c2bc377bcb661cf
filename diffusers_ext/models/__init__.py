"""Networks."""

from diffusers_ext.models.dit import DiTModel
from diffusers_ext.models.gaussian_prior import GaussianPriorModel
from diffusers_ext.models.hierarchical_vae import HierarchicalVAEModel
from diffusers_ext.models.statistics import DataStatisticsModel
from diffusers_ext.models.unet import UNetModel
from diffusers_ext.models.vae import VAEModel


__all__ = ["DataStatisticsModel", "DiTModel", "GaussianPriorModel", "HierarchicalVAEModel", "UNetModel", "VAEModel"]
