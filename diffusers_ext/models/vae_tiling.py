"""A network applied to overlapping tiles of a large sample, so that memory is that of one tile."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


def apply_tiled(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    tile: tuple[int, ...],
    overlap: tuple[int, ...],
    in_scale: int = 1,
    out_scale: int = 1,
) -> Tensor:
    """Cuts `x` into tiles, applies `function` to each, and blends the results where tiles overlap.

    In an overlap the weight of a tile rises linearly from its edge. All tiles have the full size: the last one of an
    axis ends where `x` ends. A function of each position alone gives the same as without tiles; one with a larger
    receptive field, or that normalises over the sample, differs by what it would see beyond a tile's edge.

    Args:
        function: Takes `(batch, channels, *spatial)` and scales each side by `out_scale / in_scale`.
        tile: Sides of a tile, in units of `in_scale` positions of the input and `out_scale` of the output. An axis that
            is shorter than that is not cut.
        overlap: Least overlap of two neighbours, in the same units; less than `tile`.
    """
    sides = [side // in_scale for side in x.shape[2:]]
    tile = tuple(min(length, side) for length, side in zip(tile, sides, strict=True))
    starts = [_starts(side, length, shared) for side, length, shared in zip(sides, tile, overlap, strict=True)]
    if all(len(along) == 1 for along in starts):
        return function(x)
    out = total = None
    for corner in itertools.product(*starts):
        cut = [
            slice(start * in_scale, (start + length) * in_scale) for start, length in zip(corner, tile, strict=True)
        ]
        part = function(x[(..., *cut)])
        if out is None:
            shape = [side * out_scale for side in sides]
            out = part.new_zeros((*part.shape[:2], *shape), dtype=torch.promote_types(part.dtype, torch.float32))
            total = out.new_zeros(shape)
        weight = _weight(corner, tile, sides, overlap, out_scale).to(out)
        paste = tuple(
            slice(start * out_scale, (start + length) * out_scale) for start, length in zip(corner, tile, strict=True)
        )
        out[(..., *paste)] += part * weight
        total[paste] += weight
    return (out / total).to(part.dtype)


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    return [*range(0, side - tile, max(tile - overlap, 1)), side - tile]


def _weight(corner, tile, sides, overlap, scale: int) -> Tensor:
    weight = torch.ones(())
    for start, length, side, shared in zip(corner, tile, sides, overlap, strict=True):
        along = torch.ones(length * scale)
        if shared:
            ramp = (torch.arange(length * scale) + 0.5) / (shared * scale)
            if start > 0:
                along = torch.minimum(along, ramp)
            if start + length < side:
                along = torch.minimum(along, ramp.flip(0))
        weight = weight.unsqueeze(-1) * along
    return weight
