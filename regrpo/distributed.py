"""Several processes that train one model: who am I, and what all of them add up.

The processes are those of ``torchrun`` or ``accelerate launch``, which tell each its place by
environment variables. Losses are normalised over the whole update, so gradients are *added* over
processes, not averaged; once an update, behind all of its backward passes, so processes need not
have equally many. What goes from one process to all others is small, but for gradients.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

import torch
from torch import distributed

from regrpo.errors import RunError

T = TypeVar("T")
BUCKET_BYTES = 128 << 20
# One waits for another that samples or writes; one that ended is noticed at once.
TIMEOUT = timedelta(hours=1)
# A launcher ends all when one ends; the one that says why has the time to.
GRACE_S = 3.0
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """This process among ``size`` of them; a context manager.

    Every method but ``seed`` is a collective: all processes call it, in the same order.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, store: "distributed.Store | None" = None
    ) -> None:
        self.rank = rank
        self.size = size
        self._store = store

    @classmethod
    def from_environment(cls) -> "Ranks":
        """The process that the launcher's environment variables describe; alone without them.

        Raises:
            RunError: variables are missing, or this machine has not a GPU for each process on it.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return ALONE
        missing = [name for name in VARIABLES if name not in os.environ]
        if missing:
            raise RunError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} not set; "
                "start the processes with torchrun or accelerate launch"
            )
        backend = "gloo"
        if torch.cuda.is_available():
            local, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= devices:
                raise RunError(
                    f"LOCAL_RANK is {local}, but this machine has {devices} CUDA devices; start at "
                    "most one process a device"
                )
            torch.cuda.set_device(local)
            backend = "cpu:gloo,cuda:nccl"
        store, rank, size = next(distributed.rendezvous("env://", timeout=TIMEOUT))
        distributed.init_process_group(
            backend,
            store=distributed.PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
        )
        return cls(rank, size, distributed.PrefixStore("regrpo", store))

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Behind an error the first process to fail says why; the others end without a word."""
        if self.size == 1:
            return
        if kind is None:
            distributed.destroy_process_group()
        elif self._store is not None and not self._first_to_fail(self._store):
            time.sleep(GRACE_S)
            raise SystemExit(1) from None

    def _first_to_fail(self, store: "distributed.Store") -> bool:
        own = str(self.rank)
        try:
            return store.compare_set("failed", "", own) == own.encode()
        except RuntimeError:  # the store went down with the process that held it
            return True

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def seed(self, seed: int, step: int = 0) -> int:
        """What this process seeds a generator with; another number in every process and step."""
        return 1_000_003 * (seed + 10_007 * self.rank) + step

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            first = str(error).strip().split("\n")[0]
            raise RunError(f"rank {self.rank} of {self.size} lost the others: {first}") from error

    def gather(self, value: T) -> list[T]:
        """The value of every process, in the order of ranks, in every process."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        with self._together():
            distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def sum(self, value: float) -> float:
        return sum(self.gather(value))

    def any(self, value: bool) -> bool:
        return any(self.gather(value))

    def wait(self) -> None:
        """Until all processes are here."""
        self.gather(None)

    def require_same(self, value: object, what: str) -> None:
        """Raises a ``RunError`` in every process if the values differ; ``what`` they are."""
        values = self.gather(value)
        other = next((r for r, v in enumerate(values) if v != values[0]), None)
        if other is not None:
            raise RunError(
                f"ranks 0 and {other} differ in {what}: {values[0]!r} and {values[other]!r}; "
                "expected the same in all processes"
            )

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Adds the gradients of all processes up, in place; one that has none adds zeros.

        Parameters that no process has a gradient of keep none, as in one process.
        """
        if self.size == 1:
            return
        found = self.gather([p.grad is not None for p in parameters])
        used = [p for p, *have in zip(parameters, *found, strict=True) if any(have)]
        with self._together():
            for bucket in _buckets(used):
                gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
                flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
                distributed.all_reduce(flat)
                parts = flat.split([gradient.numel() for gradient in gradients])
                for p, gradient, part in zip(bucket, gradients, parts, strict=True):
                    p.grad = gradient.copy_(part.view_as(gradient))


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters of one dtype, in order, ``BUCKET_BYTES`` of them at a time."""
    bucket: list[torch.nn.Parameter] = []
    room = 0
    for p in parameters:
        size = p.numel() * p.element_size()
        if bucket and (size > room or p.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        if not bucket:
            room = BUCKET_BYTES
        bucket.append(p)
        room -= size
    if bucket:
        yield bucket


ALONE = Ranks()
