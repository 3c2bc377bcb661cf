"""Measures of how well a set of generated images matches a set of real ones.

The measures take features, one row an image, and import nothing but torch. The features may be pixels, or those of a
`FeatureClassifierModel` trained on the data set.
"""

from diffusers_ext.metrics.classes import classifier_score
from diffusers_ext.metrics.features import FeatureClassifierModel
from diffusers_ext.metrics.frechet import FeatureStatistics, extrapolated_frechet_distance, frechet_distance
from diffusers_ext.metrics.kernel import KernelDistance, kernel_distance
from diffusers_ext.metrics.neighbours import (
    DensityCoverage,
    PrecisionRecall,
    density_coverage,
    nearest_distances,
    precision_recall,
)
from diffusers_ext.metrics.reconstruction import multi_scale_ssim, psnr, rmse, ssim
from diffusers_ext.metrics.shares import ShareDifference, share_difference


__all__ = [
    "DensityCoverage",
    "FeatureClassifierModel",
    "FeatureStatistics",
    "KernelDistance",
    "PrecisionRecall",
    "ShareDifference",
    "classifier_score",
    "density_coverage",
    "extrapolated_frechet_distance",
    "frechet_distance",
    "kernel_distance",
    "multi_scale_ssim",
    "nearest_distances",
    "precision_recall",
    "psnr",
    "rmse",
    "share_difference",
    "ssim",
]
