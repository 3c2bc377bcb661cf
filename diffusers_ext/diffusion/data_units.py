"""From samples as a model knows them back to the data: an affine map of each coordinate.

A density p of samples x is one of the data y = shift + scale x by the change of variables, p(y) = p(x) / scale for each
coordinate; of a normal it moves the mean and the standard deviation. Divergences between two densities stay what they are,
so that of a variational bound the distortion alone is in the units of the data.
"""

from typing import NamedTuple

from torch import Tensor

from diffusers_ext.diffusion.noising import Normal


class DataUnits(NamedTuple):
    """The data are `shift + scale x`; both broadcast against samples `(batch, channels, ...)`, and `scale` is positive."""

    shift: Tensor
    scale: Tensor

    def data(self, x: Tensor) -> Tensor:
        """Samples in the units of the data."""
        return self.shift.to(x) + self.scale.to(x) * x

    def normal(self, p: Normal) -> Normal:
        """A normal of samples as one of the data."""
        return Normal(self.data(p.mean), self.scale.to(p.mean) * p.std)
