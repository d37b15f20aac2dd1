"""Full tuning whose weights, gradients and moments lie in slices, one on each rank (torch's fully_shard).

A weight is put together for the time that a block needs it. Files hold whole tensors, so that a run goes on with any
number of ranks, sharded or not.
"""

from __future__ import annotations

from collections.abc import Mapping

from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..config import Config, ConfigError
from ..models import ClipModel
from ..models.blocks import LastBlock
from ..runtime.ranks import Ranks


def check_fsdp(config: Config) -> None:
    """Raises ConfigError where train.fsdp meets an option that it does not go together with."""
    options = config.train
    for bad, remedy in (
        (config.model.tuning == "lora", "needs model.tuning=full: adapters are too small to share"),
        (options.micro_batch_size > 0, "needs train.micro_batch_size=0: use train.checkpointing, or more ranks"),
        (options.compile, "needs train.compile=false"),
        (options.precision == "fp16", "needs train.precision=bf16 or fp32"),
    ):
        if options.fsdp and bad:
            raise ConfigError(f"train.fsdp=true {remedy}")


def shard_weights(clip: ClipModel, ranks: Ranks) -> None:
    """Leave this rank its slice of every weight, in place. The weights must be the same on all ranks.

    `clip` is called as before, by all ranks equally often; gradients are averaged over the ranks.
    """
    mesh = init_device_mesh(clip.device.type, (ranks.world,))
    scalars = {p for p in clip.parameters() if p.ndim == 0}  # the logit scale and bias
    for module in clip.modules():
        if isinstance(module, ResidualAttentionBlock | LastBlock):
            fully_shard(module, mesh=mesh)
    # by default the outermost weights stay whole after a pass without gradients, and would miss what changes them then
    fully_shard(clip, mesh=mesh, ignored_params=scalars, reshard_after_forward=True)


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """`tensors` with slices put together on the CPU, one after the other; every rank takes part, those that `keep`
    get them."""
    found = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            tensor = whole(tensor).detach()
            tensor = tensor.cpu() if keep else tensor.new_empty(0)
        found[name] = tensor
    return found


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may lie in slices, as a plain one on its device."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sliced_like(model: Tensor, tensor: Tensor) -> Tensor:
    """This rank's slice of a whole `tensor`, if `model`, of the same shape, lies in slices; else `tensor` itself."""
    if not isinstance(model, DTensor):
        return tensor
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None)
