"""Several processes that train one model, each on its share of every batch. torchrun starts them.

All processes hold the same settings and make the same random choices. Sampling, scoring and
differentiation are split by rows, and the results are gathered before they are used.
With one process, no function here communicates.

Gradients are summed during the backward pass, by DistributedDataParallel or, if the model is
sharded, by FSDP2. They are not averaged: the losses already divide by the size of the whole batch.
"""

import atexit
import contextlib
import datetime
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

from minirlhf.run.errors import Exit

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Model = TypeVar("Model", bound=nn.Module)
STORE: list[dist.Store] = []  # the run's key-value store, if there are several processes


def init_processes() -> None:
    """Join the other processes if torchrun started this one. From now on only rank 0 prints."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    store, rank, world_size = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = datetime.timedelta(hours=1)  # the others wait while the main process evaluates
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    STORE.append(store)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if rank:
        sys.stdout = open(os.devnull, "w")


def finish_processes() -> None:
    """End a process that has done its work, if it is one of several."""
    if dist.is_initialized():
        dist.destroy_process_group()
        exit_process(0)


def exit_process(status: int) -> NoReturn:
    """Exit with this status.

    One of several processes exits without the interpreter's shutdown: during it, torch's threads
    occasionally abort the process, and then the status is lost.
    """
    if STORE:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise Exit(status)


def process_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files, evaluates and prints."""
    return process_rank() == 0


def error_reported() -> bool:
    """Whether a process of this run has already printed why the run ends."""
    return bool(STORE) and STORE[0].check(["error reported"])


def claim_error_report() -> bool:
    """True for the first caller of a run only: one error line is enough for all processes."""
    return not STORE or STORE[0].add("error reported", 1) == 1


def is_lost_peer(error: BaseException) -> bool:
    """Whether the error means that another process has ended."""
    is_gloo_error = dist.is_initialized() and "gloo" in str(error)
    return isinstance(error, dist.DistError) or is_gloo_error


# ---- rows ----------------------------------------------------------------------------------------


def chunk(rows, index: int, count: int):
    """The index-th of `count` consecutive parts of a list or tensor; sizes differ by at most one.

    >>> [chunk([1, 2, 3, 4, 5], index, 3) for index in range(3)]
    [[1], [2, 3], [4, 5]]
    """
    return rows[len(rows) * index // count:len(rows) * (index + 1) // count]


def local_rows(rows):
    """The rows that this process computes."""
    return chunk(rows, process_rank(), process_count())


def by_rows(function: Callable) -> Callable:
    """Split function(model, batch, ...) by rows: each process computes its share.

    Every process gets the result for all rows.

    batch: a NamedTuple of lists [B] and tensors [B, ...].
    The function returns a tensor [B, ...] or a tuple of such tensors.
    """
    @functools.wraps(function)
    def on_all_rows(model, batch, *rest):
        if process_count() == 1:
            return function(model, batch, *rest)
        return all_gather_rows(function(model, type(batch)(*map(local_rows, batch)), *rest))
    return on_all_rows


def micro_batches(rows, size: int, learner: nn.Module) -> Iterator:
    """This process's rows, about `size` for each forward and backward pass (0: all in one pass).

    Replicas exchange gradients in the last pass only. All processes make the same number of passes,
    because sharded passes wait for each other. So a pass can exceed `size` by a row: 3 rows in
    2 processes with size 1 are one pass, of 1 row here and 2 rows there.
    """
    fewest = len(rows) // process_count()
    most = math.ceil(len(rows) / process_count())
    # at most `fewest` passes, so that every process has a row in each (or one pass without a row)
    count = max(1, min(fewest, math.ceil(most / (size or most))))
    for index in range(count):
        is_last = index + 1 == count
        context: contextlib.AbstractContextManager = contextlib.nullcontext()
        if isinstance(learner, Replica) and not is_last:
            context = learner.no_sync()  # adds up gradients in this process only
        with context:
            yield chunk(local_rows(rows), index, count)


def all_gather_rows(batch):
    """The rows of all processes, in the order of the processes.

    batch: a tensor, or a tuple or NamedTuple of lists [B] and tensors [B, ...]. Shorter tensors are
    padded with 0, on the left if the field's name begins with "prompt", otherwise on the right. (0
    is not PAD, but the masks are padded too.)
    """
    if process_count() == 1:
        return batch
    if isinstance(batch, Tensor):
        return all_gather_rows((batch,))[0]
    own = tuple(column.cpu() if isinstance(column, Tensor) else column for column in batch)
    parts: list = [None] * process_count()
    dist.all_gather_object(parts, own)
    names = getattr(batch, "_fields", [""] * len(batch))
    columns = [_join(name, column) for name, column in zip(names, zip(*parts))]
    columns = [column.to(mine.device) if isinstance(mine, Tensor) else column
               for column, mine in zip(columns, batch)]
    return type(batch)(*columns) if hasattr(batch, "_fields") else tuple(columns)


def _join(name: str, parts: tuple):
    """One column from the parts of all processes."""
    if isinstance(parts[0], list):
        return [row for part in parts for row in part]
    if parts[0].dim() > 1:
        width = max(part.shape[1] for part in parts)
        gaps = [width - part.shape[1] for part in parts]
        pads = [(gap, 0) if name.startswith("prompt") else (0, gap) for gap in gaps]
        parts = tuple(map(nn.functional.pad, parts, pads))
    return torch.cat(parts)


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of x over all processes. Changes x."""
    if process_count() > 1:
        dist.all_reduce(x)
    return x


def all_reduce_max(number: int) -> int:
    """The largest number of any process."""
    if process_count() == 1:
        return number
    box = torch.tensor(number)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


def broadcast(value):
    """The main process's value, in all processes."""
    box = [value]
    if process_count() > 1:
        dist.broadcast_object_list(box)
    return box[0]


# ---- weights -------------------------------------------------------------------------------------


class Replica(DistributedDataParallel):
    """One process's copy of a model. Attributes that the wrapper lacks come from the model."""

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def replicate(model: nn.Module) -> Replica:
    """The model wrapped so that each backward pass sums its gradients over the processes.

    Every weight that requires a gradient must get one in each pass.
    """
    def sum_gradients(_, bucket):  # DistributedDataParallel would average
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    replica = Replica(model, gradient_as_bucket_view=True)
    replica.register_comm_hook(None, sum_gradients)
    return replica


def shard(model: nn.Module, device: torch.device) -> None:
    """Split weights, gradients and optimizer state over the processes, block by block (FSDP2)."""
    from torch.distributed.fsdp import fully_shard  # takes half a second to import

    mesh = dist.init_device_mesh(device.type, (process_count(),))
    for part in (*model.get_submodule("blocks").children(), model):
        module = fully_shard(part, mesh=mesh)
        module.set_gradient_divide_factor(1.0)  # sum: the losses divide by the whole batch
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction


def is_sharded(x) -> bool:
    """Whether x is a DTensor, of which this process holds a part."""
    return hasattr(x, "full_tensor")


def full_tensor(x) -> Tensor:
    return x.full_tensor() if is_sharded(x) else x


def split_like(value, like):
    """This process's part of a full tensor, if `like` is a sharded tensor of its shape."""
    if not is_sharded(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements,
                             src_data_rank=None)


def full_states(states):
    """State dicts with full tensors on the CPU in place of sharded ones.

    Every process must call this; only the main process keeps the result.
    """
    if isinstance(states, dict):
        return {key: full_states(value) for key, value in states.items()}
    full = full_tensor(states)
    if full is states:
        return states
    return full.cpu() if is_main() else None


def unsharded(model: Model) -> Model:
    """The model; if it is sharded, a plain copy with all weights. Every process must call this."""
    if not any(map(is_sharded, model.parameters())):
        return model
    with torch.device("meta"):
        # FSDP2 replaced the class by a subclass of (FSDPModule, Transformer)
        plain = type(model).__bases__[1](model.config)
    state = {name: full_tensor(value) for name, value in model.state_dict().items()}
    plain.load_state_dict(state, assign=True)
    plain.bf16 = model.bf16
    return plain
