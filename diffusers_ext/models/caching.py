"""Caches of diffusers (`diffusers.hooks`), which skip blocks or attention of a network in steps that resemble the last."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from diffusers import CacheMixin
from torch import nn

from diffusers_ext.models.parallel import check_no_cache, spreads_tokens


# By the names of their configs, since not each version of diffusers has all of them.
CACHES = (
    "FirstBlockCacheConfig",
    "MagCacheConfig",
    "TaylorSeerCacheConfig",
    "PyramidAttentionBroadcastConfig",
    "FasterCacheConfig",
)
# Those that skip blocks as a whole, so that what a middle layer puts out is none of this step's.
OF_BLOCKS = ("FirstBlockCacheConfig", "MagCacheConfig")
# Those that have one state for all predictions of a step, which so have to come in one call of the network.
OF_ONE_STATE = ("PyramidAttentionBroadcastConfig", "FasterCacheConfig")


class CachedBlocksMixin(CacheMixin):
    """Caches for a network that has blocks in `transformer_blocks`, and a linear layer `patch_out` after them.

    With none enabled, nothing of this is run.
    """

    _cached_size: int | None = None  # of the last call's batch

    def enable_cache(self, config) -> None:
        """From the next call of a pipeline on, skips blocks or attention as `config` says, which makes other images.

        Args:
            config: One of `CACHES` of diffusers. The `current_timestep_callback` that some have is
                `lambda: pipe.current_timestep`.

        Raises:
            ValueError: if it is another one, or one that would go wrong with this network.
        """
        name = type(config).__name__
        if name not in CACHES:
            raise ValueError(f"the cache must be one of {', '.join(CACHES)}, got {name}")
        check_no_cache(True, spreads_tokens(self))
        num_blocks = len(self.transformer_blocks)
        if name == "FirstBlockCacheConfig" and num_blocks < 2:
            raise ValueError(f"FirstBlockCacheConfig needs a network of at least 2 blocks, got {num_blocks}")
        if name == "FasterCacheConfig" and not config.is_guidance_distilled:
            raise ValueError(
                "FasterCacheConfig must have is_guidance_distilled=True, which skips attention alone: what it would make of "
                "the conditional prediction in the place of the unconditional one knows no guider"
            )
        if name == "TaylorSeerCacheConfig" and config.use_lite_mode:
            # That mode knows the last layer by its name in other networks, and would predict zeros without it.
            config = replace(
                config,
                use_lite_mode=False,
                cache_identifiers=["(internal_)?patch_out"],
                skip_predict_identifiers=[r"transformer_blocks\.\d+"],
            )
        if name == "TaylorSeerCacheConfig":
            patterns = [*(config.cache_identifiers or ()), *(config.skip_predict_identifiers or ())]
            names = [name for name, _ in self.named_modules()]
            idle = [pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in names)]
            if idle:
                raise ValueError(
                    f"{', '.join(idle)} of TaylorSeerCacheConfig must match the name of a module, got none"
                )
        super().enable_cache(config)

    @property
    def caches_blocks(self) -> bool:
        """Whether blocks are skipped, and what comes out of the last of them is made up for."""
        return self.is_cache_enabled and type(self._cache_config).__name__ in OF_BLOCKS

    @property
    def caches_apart(self) -> bool:
        """Whether each prediction of a step is to be a call of its own, whose cache has a state of its own."""
        return self.is_cache_enabled and type(self._cache_config).__name__ not in OF_ONE_STATE

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        # A pipeline calls this at its end, and diffusers' own would leave a hook on a network that has none.
        if any(hasattr(module, "_diffusers_hook") for module in self.modules()):
            self._cached_size = None
            super()._reset_stateful_cache(recurse)

    @contextmanager
    def _prediction(self, name: str, size: int) -> Iterator[None]:
        """A call for a prediction of this name, of a batch of this size, to the cache that is enabled."""
        if self.caches_apart:
            with self.cache_context(name):
                yield
            return
        if size != self._cached_size and self._cached_size is not None:
            if type(self._cache_config).__name__ == "FasterCacheConfig":
                raise ValueError(
                    "FasterCacheConfig needs the same predictions in each step: guide in all of them or in none, or take "
                    "another cache"
                )
            self._reset_stateful_cache()
        self._cached_size = size
        yield


def has_cache(network: nn.Module) -> bool:
    """Whether a cache is enabled; those of other libraries' networks count too."""
    return bool(getattr(network, "is_cache_enabled", False))


def prediction_of(network: nn.Module, name: str, size: int):
    """The context of a call of `network` for a prediction of this name ("cond", "uncond", ...), of so many samples."""
    if not has_cache(network):
        return nullcontext()
    own = getattr(network, "_prediction", None)
    return network.cache_context(name) if own is None else own(name, size)


def predicts_apart(network: nn.Module) -> bool:
    """Whether the predictions of a step must not come in one call, since a cache tells them apart."""
    return has_cache(network) and getattr(network, "caches_apart", True)


def forget(network: nn.Module | None) -> None:
    """Empties the cache of a network, if it has one, of what the last call left."""
    if network is not None and has_cache(network):
        network._reset_stateful_cache()
