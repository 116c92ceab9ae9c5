"""Several processes that train one model, each on its share of every batch: torchrun starts them, torch.distributed joins them.

Every process holds the same settings and computes the same plan; what is sampled, scored and differentiated is split by rows,
and what was measured on them is put together again before it is used. One process alone finds all of this a no-op.

Gradients are summed during the backward pass, by DistributedDataParallel or, sharded, by FSDP2. Neither may average them: the
losses divide by the whole batch already.
"""

import atexit
import contextlib
import datetime
import os
import sys
from collections.abc import Iterator
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

M = TypeVar("M", bound=nn.Module)
STORE: list[dist.Store] = []  # the one key-value store of the run, once there are several processes


def start() -> None:
    """Join the other processes if torchrun started this one. Only the main one, of rank 0, prints from now on."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    store, rank, world = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    patience = datetime.timedelta(hours=1)  # as long as the main process may evaluate while the others wait
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    STORE.append(store)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if rank:
        sys.stdout = open(os.devnull, "w")


def stop() -> None:
    """The end of a process that has done its work, where it is one of several."""
    if dist.is_initialized():
        dist.destroy_process_group()
        leave(0)


def leave(status: int) -> NoReturn:
    """End with this status. One of several processes ends at once: torn down in the order that the interpreter picks, torch's
    threads now and then abort a process ("terminate called without an active exception"), whose status is then lost."""
    if STORE:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files, evaluates, and speaks."""
    return rank() == 0


def told() -> bool:
    """Whether a process of this run has said already why it ends."""
    return bool(STORE) and STORE[0].check(["told"])


def first_to_tell() -> bool:
    """True once per run: of an error that all processes meet, or that one inflicts on the others, one line is enough."""
    return not STORE or STORE[0].add("told", 1) == 1


def lost_peer(error: BaseException) -> bool:
    """Whether this is how the end of another process looks from here."""
    return isinstance(error, dist.DistError) or dist.is_initialized() and "gloo" in str(error)


# ---- rows ------------------------------------------------------------------------------------------------------------


def piece(rows, index: int, count: int):
    """The index-th of count pieces of a list or tensor: consecutive rows, sizes that differ by one at most.

    >>> [piece([1, 2, 3, 4, 5], index, 3) for index in range(3)]
    [[1], [2, 3], [4, 5]]
    """
    return rows[len(rows) * index // count:len(rows) * (index + 1) // count]


def share(rows):
    """The rows that fall to this process."""
    return piece(rows, rank(), processes())


def micro_batches(rows, size: int, learner: nn.Module) -> Iterator:
    """This process's share, at most `size` rows at a time (0: all), each for one forward and backward pass of the learner;
    replicas exchange gradients in the last. As many pieces on every process, since sharded passes wait for each other; so one
    process may get two rows where size is 1."""
    fewest, most = len(rows) // processes(), -(-len(rows) // processes())
    count = max(1, min(fewest, -(-most // (size or most))))
    for index in range(count):
        last = index + 1 == count
        with learner.no_sync() if isinstance(learner, Replica) and not last else contextlib.nullcontext():
            yield piece(share(rows), index, count)


def gathered(batch):
    """A NamedTuple of lists [B] and tensors [B, ...], with the rows of all processes in their order. Columns are filled up
    with 0: on the left where the name begins with prompt, else on the right."""
    if processes() == 1:
        return batch
    parts = [None] * processes()
    dist.all_gather_object(parts, type(batch)(*(x.cpu() if isinstance(x, Tensor) else x for x in batch)))

    def join(name: str, columns: tuple):
        if isinstance(columns[0], list):
            return [row for column in columns for row in column]
        if columns[0].dim() > 1:
            gaps = [max(x.shape[1] for x in columns) - x.shape[1] for x in columns]
            pads = [(gap, 0) if name.startswith("prompt") else (0, gap) for gap in gaps]
            columns = tuple(map(nn.functional.pad, columns, pads))
        return torch.cat(columns).to(getattr(batch, name).device)

    return type(batch)(*map(join, batch._fields, zip(*parts)))


def summed(x: Tensor) -> Tensor:
    """The sum of x over all processes."""
    if processes() > 1:
        dist.all_reduce(x)
    return x


def agreed(number: int) -> int:
    """The largest number that any process brings: the same on all of them."""
    if processes() == 1:
        return number
    box = torch.tensor(number)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


def from_main(value):
    """The main process's value, on all of them."""
    box = [value]
    if processes() > 1:
        dist.broadcast_object_list(box)
    return box[0]


# ---- weights ---------------------------------------------------------------------------------------------------------


class Replica(DistributedDataParallel):
    """One process's copy of a model. What the losses read beside forward(), embedding and heads, is the model's own."""

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def replicate(model: nn.Module) -> Replica:
    """The model, for passes whose gradients are summed over the processes while they are found. Every weight that requires a
    gradient must get one in each pass."""
    replica = Replica(model, gradient_as_bucket_view=True)
    replica.register_comm_hook(None, lambda _, bucket: dist.all_reduce(
        bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0]))  # a sum: by itself it takes the mean
    return replica


def shard(model: nn.Module, device: torch.device) -> None:
    """Split weights, gradients and whatever the optimiser keeps over the processes, block by block (FSDP2)."""
    from torch.distributed.fsdp import fully_shard  # half a second, for those who need it
    mesh = dist.init_device_mesh(device.type, (processes(),))
    for part in (*model.get_submodule("blocks").children(), model):
        split = fully_shard(part, mesh=mesh)
        split.set_gradient_divide_factor(1.0)  # a sum: the losses divide by the whole batch
        split.set_force_sum_reduction_for_comms(True)  # as gloo knows no other


def sharded(x) -> bool:
    """Whether x is a DTensor, of which this process holds a part."""
    return hasattr(x, "full_tensor")


def whole_tensor(x) -> Tensor:
    return x.full_tensor() if sharded(x) else x


def split_like(value, like):
    """This process's part of a whole tensor where `like` is a sharded tensor of that shape; anything else as it is."""
    if not sharded(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_states(states):
    """State dicts with whole tensors, on the CPU, in place of sharded ones. Every process must take part; only the main one
    keeps the result."""
    if isinstance(states, dict):
        return {key: whole_states(value) for key, value in states.items()}
    full = whole_tensor(states)
    return states if full is states else full.cpu() if is_main() else None


def whole(model: M) -> M:
    """The model itself; of a sharded one a plain copy with all its weights, for passes that each process takes alone."""
    if not any(map(sharded, model.parameters())):
        return model
    with torch.device("meta"):
        plain = type(model).__bases__[1](model.config)  # FSDP made a class of its own and this one
    plain.load_state_dict({name: whole_tensor(value) for name, value in model.state_dict().items()}, assign=True)
    return plain
