"""The ranks of a process group, who agree before they work and fail together."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastif_ext.distributed.facts import texts

TIMEOUT = 600.0


class RankError(RuntimeError):
    """Ranks disagree, one of them failed, or one does not come: the same error on all of them."""


class Ranks:
    """The ranks of a process group: they meet before every collective, and are let in together.

    At a meeting each rank says what it is about to do and with what, or that it failed; each reads
    what all others said. So a rank that disagrees (seed, model, length of the data, another call
    altogether) or fails makes the same RankError on all ranks, and one that does not come, dead or
    stuck, makes one that names it, on all others, after `timeout` seconds. Nothing hangs.

    Meetings go through the store of the process group, whatever its backend; tensors on the CPU
    through gloo connections of their own, with the same timeout; tensors on a GPU through the nccl
    group given (with its timeout), and over the CPU where it is none. After an error that nobody
    missed the ranks can go on; after a lost rank they cannot.

    Args:
        group: a process group, torch's default one if None; all its ranks make a Ranks of it.
        timeout: seconds that a rank waits for the others at most; the work between two meetings
            must not be more uneven than that.

    Attributes:
        rank, size: of this process within the group (in the order of global ranks), and of the
            group.

    Raises:
        RuntimeError: there is no process group.
        RankError: the others do not come.

    Example:
        >>> import torch, torch.distributed as dist, fastif_ext as fi
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> ranks = fi.distributed.Ranks(timeout=10)  # torchrun starts more than one
        >>> ranks.meet("sizes", 7, seed=0), ranks.all_reduce("a sum", torch.ones(2))
        ([7], tensor([1., 1.]))
        >>> dist.destroy_process_group()
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, timeout: float = TIMEOUT) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "there is no process group: call torch.distributed.init_process_group() first, in "
                "processes that torchrun started"
            )
        if not timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout}")
        if dist.get_rank(group) < 0:
            raise ValueError("group: this process is not one of its ranks")
        parent = dist.group.WORLD if group is None else group
        assert parent is not None
        members = sorted(dist.get_process_group_ranks(group))
        self.rank, self.size = members.index(dist.get_rank()), len(members)
        self.timeout = timeout
        self._nccl = parent if "nccl" in dist.get_backend_config(group) else None
        # A connection of its own: one that waits holds up whoever else uses it.
        store = parent.get_group_store().clone()  # type: ignore[attr-defined]
        number = store.add(f"fastif_ext/{self.rank}", 1)  # all ranks open them in one order
        self._store = dist.PrefixStore(f"fastif_ext/{number}", store)
        self._meetings = 0
        self._lost: str | None = None
        self._told: Exception | None = None
        self.meet("Ranks", timeout=timeout, size=self.size)
        with self._connected("Ranks"):
            self._gloo: Any = dist.ProcessGroupGloo(
                dist.PrefixStore("gloo", self._store),
                self.rank,
                self.size,
                timedelta(seconds=timeout),
            )

    def meet(self, what: str, value: Any = None, **facts: object) -> list[Any]:
        """Wait for all ranks, see that they are here for the same, and exchange small values.

        Args:
            what: the call that the ranks are in.
            value: anything that JSON can hold.
            **facts: what must be the same on all ranks.

        Returns:
            The values of all ranks, in their order.

        Raises:
            RankError: ranks disagree, one failed, or one does not come.
        """
        return self._meet({"what": what, "value": value, "facts": texts(facts), "error": None})

    @contextmanager
    def telling(self, what: str) -> Iterator[None]:
        """Where the block fails on this rank, tell the others at the meeting they go to next."""
        try:
            yield
        except RankError:
            raise  # all know
        except Exception as error:
            if error is not self._told:
                self._told = error
                text = f"{type(error).__name__}: {error}"[:1000]
                try:
                    self._meet({"what": what, "value": None, "facts": {}, "error": text})
                except RankError as ending:
                    if self._lost is not None:  # a lost rank is news; the rest is this very error
                        raise error from ending
            raise

    @contextmanager
    def together(self, what: str, **facts: object) -> Iterator[None]:
        """All ranks enter the block with the same facts, and leave it if none failed in it."""
        self.meet(what, **facts)
        with self.telling(what):
            yield
        self.meet(f"the end of {what}")

    def all_reduce(self, what: str, tensor: Tensor, *, maximum: bool = False) -> Tensor:
        """The sum of all ranks' tensors, or their elementwise maximum, the same bits on all."""
        self.meet(what, shape=list(tensor.shape), dtype=tensor.dtype)
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        if not (total.is_cuda and self._nccl):
            total = total.cpu()
        options: Any = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
        with self._connected(what):
            group: Any = self._nccl if total.is_cuda else self._gloo
            group.allreduce([total], options).wait()
        return total.to(tensor.device)

    def gather_rows(self, what: str, rows: Tensor, *, to: int | None = None) -> Tensor | None:
        """All ranks' rows [n_r, ...], one behind the other, on all ranks or on rank `to` alone.

        Args:
            what: for messages.
            rows: on the CPU; any n_r, 0 too.
            to: the rank that gets them; the others get None.
        """
        lengths = self.meet(what, len(rows), columns=list(rows.shape[1:]), dtype=rows.dtype, to=to)
        if to is not None and to != self.rank:
            self._move(what, rows, lambda part: self._gloo.send([part], to, 0))
            return None
        whole = rows.new_empty(sum(lengths), *rows.shape[1:])
        for source, part in enumerate(whole.split(lengths)):
            if source == self.rank:
                part.copy_(rows)
            if to is None:
                self._broadcast(what, part, source)
            elif source != self.rank:
                self._receive(what, part, source)
        return whole

    def broadcast_(self, what: str, tensors: list[Tensor], *, source: int = 0) -> None:
        """Overwrite the tensors by those of rank `source`."""
        self.meet(what, shapes=[list(t.shape) for t in tensors], source=source)
        for tensor in tensors:
            place = tensor.detach().cpu().contiguous()
            self._broadcast(what, place, source)
            tensor.detach().copy_(place)

    def _receive(self, what: str, t: Tensor, source: int) -> None:
        self._move(what, t, lambda part: self._gloo.recv([part], source, 0))

    def _broadcast(self, what: str, t: Tensor, source: int) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = source
        self._move(what, t, lambda part: self._gloo.broadcast([part], options))

    def _move(self, what: str, t: Tensor, collective: Callable[[Tensor], Any]) -> None:
        """A contiguous tensor as bytes (gloo has not every dtype), a GiB at a time."""
        if t.numel():  # of none there is nothing to move, on any rank
            for part in t.reshape(-1).view(torch.uint8).split(1 << 30):
                with self._connected(what):
                    collective(part).wait()

    @contextmanager
    def _connected(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._lost = f"{what}: a rank was lost on the way, as rank {self.rank} sees it: {error}"
            raise RankError(self._lost) from error

    def _meet(self, mine: dict[str, Any]) -> list[Any]:
        if self._lost is not None:
            raise RankError(f"{self._lost}; start all ranks again")
        self._meetings += 1
        keys = [f"{self._meetings}/{r}" for r in range(self.size)]
        try:
            self._store.set(keys[self.rank], json.dumps(mine))
            self._wait(keys, mine["what"])
            said = [json.loads(text) for text in self._store.multi_get(keys)]
            # All came, so all have read what was said the last time.
            self._store.delete_key(f"{self._meetings - 1}/{self.rank}")
        except dist.DistError as error:
            self._lost = (
                f"{mine['what']}: the process that hosts the store, by which ranks meet, is gone "
                f"({error})"
            )
            raise RankError(self._lost) from error
        problem = _problem(said)
        if problem is not None:
            raise RankError(problem)
        return [words["value"] for words in said]

    def _wait(self, keys: list[str], what: str) -> None:
        """Until all have come: looks often at first, and can be interrupted."""
        start = time.monotonic()
        while not self._store.check(keys):
            waited = time.monotonic() - start
            if waited > self.timeout:
                missing = [r for r, key in enumerate(keys) if not self._store.check([key])]
                self._lost = (
                    f"{what}: {_names(missing)} did not come within {self.timeout:g} s: dead, "
                    f"stuck or in other work; see its own output, or raise timeout="
                )
                raise RankError(self._lost)
            time.sleep(min(0.1 * waited, 0.05))


def opened(group: dist.ProcessGroup | Ranks | None) -> Ranks:
    """The ranks given, or the ranks of a group."""
    return group if isinstance(group, Ranks) else Ranks(group)


def _problem(said: list[dict[str, Any]]) -> str | None:
    """What is wrong with what the ranks said, in the same words on all of them; None if nothing."""
    failed = [(r, words) for r, words in enumerate(said) if words["error"] is not None]
    if failed:
        return "; ".join(f"{w['what']} failed on rank {r}: {w['error']}" for r, w in failed)
    calls = [words["what"] for words in said]
    if len(set(calls)) > 1:
        return f"ranks are in different calls: {_by_value(calls)}"
    facts = [words["facts"] for words in said]
    different = [
        f"{name} is {_by_value([f.get(name, 'not given') for f in facts])}"
        for name in dict.fromkeys(name for f in facts for name in f)
        if len({f.get(name) for f in facts}) > 1
    ]
    if different:
        return f"{calls[0]}: ranks disagree: {'; '.join(different)}"
    return None


def _by_value(values: list[str]) -> str:
    owners: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        owners.setdefault(value, []).append(rank)
    return ", ".join(f"{value} on {_names(ranks)}" for value, ranks in owners.items())


def _names(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
