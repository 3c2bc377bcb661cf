"""Measures of how well a set of generated images matches a set of real ones.

The measures take features, one row an image, and import nothing but torch. The features may be pixels, or those of a
`FeatureClassifierModel` trained on the data set.
"""

from diffusers_ext.metrics.features import FeatureClassifierModel
from diffusers_ext.metrics.frechet import FeatureStatistics, frechet_distance
from diffusers_ext.metrics.neighbours import PrecisionRecall, nearest_distances, precision_recall


__all__ = [
    "FeatureClassifierModel",
    "FeatureStatistics",
    "PrecisionRecall",
    "frechet_distance",
    "nearest_distances",
    "precision_recall",
]
