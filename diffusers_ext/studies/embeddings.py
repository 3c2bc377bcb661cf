"""Images, samples and latents in the plane, by t-SNE and UMAP, and how well neighbours there share a label."""

import importlib.util

import numpy as np
import torch
from torch import Tensor


METHODS = ("t-SNE", "UMAP")
NUM_NEIGHBOURS = 10


def missing_methods() -> list[str]:
    """Those whose library is not installed."""
    return [] if importlib.util.find_spec("umap") else ["UMAP"]


def embed(points: Tensor, method: str, seed: int = 0) -> np.ndarray:
    """Points in the plane, shape `(points, 2)`.

    Args:
        points: Shape `(points, ...)`.
        method: "t-SNE", by scikit-learn, or "UMAP", by umap-learn.

    Raises:
        ValueError: for another method.
    """
    flat = points.flatten(1).cpu().double().numpy()
    if method == "t-SNE":
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(flat) - 1) / 3)
        return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(flat)
    if method == "UMAP":
        import umap

        return umap.UMAP(n_components=2, n_neighbors=min(15, len(flat) - 1), random_state=seed).fit_transform(flat)
    raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def label_agreement(points: np.ndarray | Tensor, labels: Tensor, number: int = NUM_NEIGHBOURS) -> float:
    """The mean share of a point's nearest neighbours that have its label.

    Args:
        points: Shape `(points, ...)`.
    """
    points = torch.as_tensor(points).flatten(1).double()
    distances = torch.cdist(points, points).fill_diagonal_(torch.inf)
    neighbours = distances.topk(min(number, len(points) - 1), largest=False).indices
    return (labels[neighbours] == labels[:, None]).double().mean().item()


def draw_planes(planes: dict[str, dict[str, np.ndarray]], labels: dict[str, Tensor], names: list[str]):
    """A row for each method and a column for each kind of points, coloured by label.

    Args:
        planes: From methods to the points of each kind.
        labels: Of each kind.
        names: Of the labels.
    """
    from matplotlib.figure import Figure

    kinds = list(labels)
    figure = Figure(figsize=(3.6 * len(kinds) + 1, 3.6 * len(planes)), layout="constrained")
    grid = figure.subplots(len(planes), len(kinds), squeeze=False)
    for row, (method, of_kinds) in zip(grid, planes.items(), strict=True):
        for axes, kind in zip(row, kinds, strict=True):
            for label, name in enumerate(names):
                x, y = of_kinds[kind][labels[kind].numpy() == label].T
                axes.scatter(x, y, s=4, color=f"C{label % 10}", label=name)
            axes.set_title(f"{kind}, {method}")
            axes.set_xticks([])
            axes.set_yticks([])
    grid[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize="small", markerscale=3)
    return figure
