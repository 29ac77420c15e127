"""An adapter added into the weights while sampling.

A decoding step is a few rows against every weight, so an adapter's two small products a projection
cost nearly as much as the projection. Added into a copy of its weight they cost nothing.
"""

import contextlib
from collections.abc import Iterator

import torch
from peft.tuners import lora

from regrpo.sharding import is_sharded


@contextlib.contextmanager
def merged_adapter(model: torch.nn.Module) -> Iterator[None]:
    """A block in which LoRA projections (Hu et al. 2021, arXiv 2106.09685) are one product.

    Takes the memory of a second copy of these weights. Afterwards the tensors of before are back,
    not what subtracting would leave of them. Weights below float32 stay as they are, since rounding
    the sum would change the policy; so do shards, and adapters that have biases.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, lora.Linear)
        and not (module.merged or module.disable_adapters or any(module.lora_bias.values()))
        and module.get_base_layer().get_parameter("weight").dtype in (torch.float32, torch.float64)
    ]
    with contextlib.ExitStack() as stack:
        for layer in layers if not is_sharded(model) else ():
            weight = layer.get_base_layer().get_parameter("weight")
            stack.callback(_restore, layer, weight, weight.data)
            layer.merge(safe_merge=True)  # into a new tensor
        yield


def _restore(layer: lora.Linear, weight: torch.nn.Parameter, data: torch.Tensor) -> None:
    layer.merged_adapters.clear()
    weight.data = data
