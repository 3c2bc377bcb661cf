"""Compilation block by block, for networks whose blocks are of many kinds."""

import inspect

import torch


# A block is compiled anew for training and for sampling, and for a few sizes of batch or sample.
COMPILATIONS_PER_BLOCK = 4


class RegionalCompilation:
    """Goes before `ModelMixin` in a network whose `_repeated_blocks` differ in widths."""

    def compile_repeated_blocks(self, *args, **kwargs) -> None:
        """Compiles each block by itself (regional compilation of diffusers), in less time than the whole network takes.

        Blocks of other widths, resolutions or layers need code of their own, and PyTorch gives up after 8 by default: it
        then runs the rest uncompiled, or raises with `fullgraph=True`. Here the limit grows with the number of blocks,
        in versions of PyTorch in which `torch.compile` has one.

        Args:
            args, kwargs: For `torch.compile`.
        """
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            blocks = [module for module in self.modules() if type(module).__name__ in self._repeated_blocks]
            kwargs.setdefault("recompile_limit", COMPILATIONS_PER_BLOCK * len(blocks))
        super().compile_repeated_blocks(*args, **kwargs)
