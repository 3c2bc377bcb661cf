"""The score that is known as the Inception score with the classes of a particular InceptionV3 (Salimans et al. 2016)."""

import torch
from torch import Tensor

from diffusers_ext.diffusion.precision import to_float64


def classifier_score(logits: Tensor) -> float:
    """exp(E KL(p(y | x) || p(y))), where p(y) is the mean of p(y | x) over the images (arXiv 1606.03498, Section 4).

    1 where the classifier says the same of all images; the number of classes where it is sure of each image, and gives
    each class to equally many. It looks at no real image, and grows with the number of images.

    Args:
        logits: Of the classes, shape `(number, num_classes)`, one row an image.

    Raises:
        ValueError: for another shape, no image, or logits that are not finite.
    """
    if logits.ndim != 2 or not len(logits) or logits.shape[1] < 2:
        raise ValueError(
            f"logits must have shape (number, num_classes) with 2 classes or more, got {tuple(logits.shape)}"
        )
    if not torch.isfinite(logits).all():
        raise ValueError("logits must be finite, got NaN or infinity: look at the images they were made from")
    log_p = to_float64(logits.detach()).log_softmax(1)
    log_mean = log_p.logsumexp(0) - torch.tensor(float(len(log_p)), dtype=log_p.dtype).log()
    return float((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
