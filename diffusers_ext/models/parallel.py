"""Context parallelism of diffusers: the tokens of an image are spread over processes (Jacobs et al. 2023, "Ulysses")."""

from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


# Backends of attention that do not give the normaliser of the softmax, by which ring attention joins the parts of a sum.
WITHOUT_NORMALISER = ("native", "_native_npu")

_GATHERED = ContextParallelOutput(gather_dim=1, expected_dims=3)


class SpreadTokensMixin(ModelMixin):
    """`enable_parallelism` for a network with blocks in `transformer_blocks` and a linear layer `patch_out` after them.

    Tokens, with the registers, are spread over processes from the first block to an output layer.
    """

    _cp_plan = {
        "transformer_blocks.*": {"rotation": ContextParallelInput(split_dim=1, expected_dims=3)},
        "transformer_blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
        "patch_out": _GATHERED,
    }

    def enable_parallelism(self, *, config, cp_plan=None) -> None:
        """From the next call on, each process computes its part of the tokens; every process calls the network.

        Args:
            config: `ContextParallelConfig`, or the `ParallelConfig` of diffusers that holds one.
            cp_plan: Which tensors are spread and gathered; by default the plan of this network.

        Raises:
            ValueError: if attention cannot be spread so, or a cache is enabled, about which processes would disagree.
        """
        context = getattr(config, "context_parallel_config", config)
        if isinstance(context, ContextParallelConfig):
            _check_attention(self, context)
            check_no_cache(self.is_cache_enabled, True)
            if cp_plan is None:
                cp_plan = self._cp_plan
                if self.internal_patch_out is not None:
                    cp_plan = cp_plan | {"internal_patch_out": _GATHERED}
        super().enable_parallelism(config=config, cp_plan=cp_plan)

    def _check_tokens(self, number: int) -> None:
        """Refuses an image whose tokens, so many with the registers, cannot be spread evenly."""
        context = _context_of(self)
        if context is None or context.ulysses_anything or context.ring_anything:
            return
        processes = context.ring_degree * context.ulysses_degree
        if number % processes:
            raise ValueError(
                f"the tokens of an image must be a multiple of the {processes} processes that share them, got {number} with "
                "the registers: take images of another size, other processes, or, by NCCL, ulysses_anything=True"
            )


def _check_attention(network: nn.Module, context: ContextParallelConfig) -> None:
    heads = network.config.num_attention_heads
    if heads % context.ulysses_degree and not context.ulysses_anything:
        raise ValueError(
            f"ulysses_degree must divide the {heads} heads of attention, got {context.ulysses_degree}: take another, or, by "
            "NCCL, ulysses_anything=True"
        )
    backends = {processor._attention_backend for processor in network.attn_processors.values()}
    backends = {AttentionBackendName(each or _AttentionBackendRegistry.get_active_backend()[0]) for each in backends}
    unable = [backend.value for backend in backends if backend.value in WITHOUT_NORMALISER]
    if context.ring_degree > 1 and unable:
        raise ValueError(
            "ring_degree above 1 needs a backend of attention that gives the normaliser of its softmax, got "
            f"{', '.join(unable)}: choose one first, as by set_attention_backend('_native_cudnn') on a GPU of NVIDIA, or "
            "spread the tokens by ulysses_degree"
        )


def check_no_cache(has_cache: bool, is_spread: bool) -> None:
    """Refuses a network with a cache whose tokens are spread."""
    if has_cache and is_spread:
        raise ValueError(
            "a cache must not be enabled where tokens are spread over processes, since each would decide by its own tokens "
            "what to skip, and wait for the others without end: call disable_cache(), or leave enable_parallelism out"
        )


def spreads_tokens(network: nn.Module) -> bool:
    """Whether a layer of the network sees this process's tokens alone."""
    return _context_of(network) is not None


def _context_of(network: nn.Module) -> ContextParallelConfig | None:
    return getattr(getattr(network, "_parallel_config", None), "context_parallel_config", None)
