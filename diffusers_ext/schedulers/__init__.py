"""Schedulers that take the place of diffusers' own."""

from diffusers_ext.schedulers.scheduling_annealed_langevin import AnnealedLangevinScheduler
from diffusers_ext.schedulers.scheduling_consistency import ConsistencyScheduler
from diffusers_ext.schedulers.scheduling_ddim import ExtDDIMScheduler
from diffusers_ext.schedulers.scheduling_ddim_inverse import ExtDDIMInverseScheduler
from diffusers_ext.schedulers.scheduling_ddpm import ExtDDPMScheduler
from diffusers_ext.schedulers.scheduling_flow import FlowScheduler
from diffusers_ext.schedulers.scheduling_score_sde import ScoreSDEScheduler
from diffusers_ext.schedulers.scheduling_v_prediction import VPredictionScheduler


__all__ = [
    "AnnealedLangevinScheduler",
    "ConsistencyScheduler",
    "ExtDDIMInverseScheduler",
    "ExtDDIMScheduler",
    "ExtDDPMScheduler",
    "FlowScheduler",
    "ScoreSDEScheduler",
    "VPredictionScheduler",
]
