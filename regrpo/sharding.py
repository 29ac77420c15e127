"""FSDP2: each process keeps a share of every weight, its gradient and its optimizer state.

Layers are gathered one at a time, for their forward and for their backward pass (Zhao et al. 2023,
arXiv 2304.11277). So every pass is a collective, and processes need equally many of them.
Gradients are added over processes, as without sharding. Sampling gathers everything once, because
a collective a layer and token costs more, and processes sample different numbers of tokens.

Tensors leave this file whole or sharded, so checkpoints do not know about it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel


def shard(root: torch.nn.Module, model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Shards the layers of a model, and ``root``, through which it is called, with the rest of it.

    Args:
        dtype: in which weights are gathered; gradients are added up in float32 then.

    Raises:
        NotImplementedError: the model does not name its layers.
    """
    names = set(model._no_split_modules or ())
    layers = [m for m in model.modules() if type(m).__name__ in names]
    if not layers:
        raise NotImplementedError(
            f"{type(model).__name__} does not name its layers (_no_split_modules); "
            "expected a model that does, with parallel: fsdp"
        )
    mesh = init_device_mesh(model.device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*layers, root):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for sharded in _sharded(root):
        sharded.set_gradient_divide_factor(1.0)  # a sum
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other
    _set_reshard_after_forward(root, True)


def is_sharded(model: torch.nn.Module) -> bool:
    return bool(_sharded(model))


def _sharded(root: torch.nn.Module) -> list[FSDPModule]:
    return [m for m in root.modules() if isinstance(m, FSDPModule)]


def _set_reshard_after_forward(root: torch.nn.Module, value: bool) -> None:
    """Of the layers; the root, whose head the loss needs, stays gathered until backward."""
    for module in _sharded(root):
        module.set_reshard_after_forward(value and module is not root, recurse=False)


def release(root: torch.nn.Module) -> None:
    """Frees whole weights that a pass without backward has left behind.

    They would be used again, whatever became of the shards.
    """
    for module in _sharded(root):
        module.reshard()


@contextlib.contextmanager
def gathered(root: torch.nn.Module) -> Iterator[None]:
    """A block without collectives, in which all weights are whole; nothing without sharding."""
    modules = _sharded(root)
    if not modules:
        yield
        return
    _set_reshard_after_forward(root, False)
    try:
        for module in modules:
            module.unshard()
        yield
    finally:
        release(root)
        _set_reshard_after_forward(root, True)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor, a collective; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole_state(state: Any, keep: bool) -> Any:
    """``whole`` of all tensors in dicts and lists, one at a time, onto the CPU; a collective.

    ``keep``: False for a process that only takes part; it has None where a tensor was sharded.
    """
    seen: dict[int, torch.Tensor | None] = {}  # tied weights stay one tensor

    def copy(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(copy(item) for item in value)
        if not isinstance(value, DTensor):
            return value
        if id(value) not in seen:
            gathered = whole(value)
            seen[id(value)] = gathered.cpu() if keep else None
        return seen[id(value)]

    return copy(state)


def like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor that all processes have, sharded as the parameter is."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(
        tensor.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        src_data_rank=None,
    )
