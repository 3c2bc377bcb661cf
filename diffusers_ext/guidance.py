"""How several predictions of a network become one: diffusers' guiders, run by hand.

A guider of diffusers (`diffusers.guiders`) says which predictions it needs, prepares the network for each of them, and
combines them. What stands here is the loop between, for pipelines that are not modular.
"""

from collections.abc import Callable

import torch
from diffusers.guiders import BaseGuidance, ClassifierFreeGuidance
from torch import Tensor, nn


def classifier_free_guidance(guidance_scale: float) -> ClassifierFreeGuidance | None:
    """The guider for a scale, where 1 is the conditional prediction alone (Ho & Salimans 2022, with w = scale - 1).

    At a scale of 1 there is nothing to guide: `None`, so that a step costs one call of the network.
    """
    return None if guidance_scale == 1.0 else ClassifierFreeGuidance(guidance_scale=float(guidance_scale))


def guided_prediction(
    guider: BaseGuidance | None,
    model: nn.Module,
    predict: Callable[[dict[str, Tensor | None]], Tensor],
    conditions: dict[str, tuple[Tensor, Tensor]],
    channels: int,
    low_memory: bool = False,
) -> Tensor:
    """One prediction from as many as the guider asks for.

    Args:
        guider: Set to the current step (`set_state`), or `None` for the conditional prediction alone.
        model: What the guider may put hooks on.
        predict: Maps conditions by name, each of shape `(n * batch, ...)`, to the network's output for them.
        conditions: Pairs (conditional, unconditional) of tensors by name, each of shape `(batch, ...)`.
        channels: Channels of the prediction. Further ones, of a learned variance, are not guided: they stay those of
            the conditional prediction.
        low_memory: Call the network once for each prediction, instead of once for all.

    Returns:
        Shape of one output of the network.
    """
    if guider is None:
        return predict({name: pair[0] for name, pair in conditions.items()})
    batches = guider.prepare_inputs(conditions)
    changes_model = type(guider).prepare_models is not BaseGuidance.prepare_models
    if low_memory or changes_model or len(batches) == 1:
        outputs = []
        for batch in batches:
            guider.prepare_models(model)
            outputs.append(predict({name: getattr(batch, name) for name in conditions}))
            guider.cleanup_models(model)
    else:
        for _ in batches:
            guider.prepare_models(model)  # counts the predictions; leaves the model as it is
        stacked = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in conditions}
        outputs = predict(stacked).chunk(len(batches))
    for batch, output in zip(batches, outputs, strict=True):
        batch.noise_pred = output[:, :channels]
    guided = guider(batches).pred
    return torch.cat([guided, outputs[0][:, channels:]], dim=1) if outputs[0].shape[1] > channels else guided
