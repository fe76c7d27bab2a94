"""Several processes as one run: sums over all of them, errors that each hears of, weights replicated or sharded.

Accelerate starts the processes and knows their devices. Where each has all of the weights, they speak once in an
optimiser step, to add their gradients up; so each may cut its rows into as many micro-batches as it likes. Where
weights are sharded (`Sharding`), every pass gathers them, so all processes make equally many.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from leibler.errors import LeiblerError, RunError
from leibler.train.sharding import Sharding, full, is_share

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator

    from leibler.policy import CausalLM
    from leibler.train.options import Options

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Processes:
    """The processes of a run, as each of them sees the others.

    Attributes:
        accelerator: Accelerate's view of them.
        sharding: how weights are cut, or None where every process has all of them.
    """

    accelerator: Accelerator
    sharding: Sharding | None = None

    @classmethod
    def start(cls, options: Options, out: Path) -> Processes:
        """Join the processes that ``torchrun`` or ``accelerate launch`` started; this one alone, if none did.

        Raises:
            RunError: a setting of Accelerate's that cannot be followed.
        """
        from accelerate import Accelerator

        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
            raise RunError(
                "DeepSpeed would take over the optimiser steps that Leibler makes itself; weights are shared out as in "
                "its ZeRO-3 with the configuration fsdp2 (see `leibler config`), and as in ZeRO-2 with "
                "fsdp_reshard_after_forward: false in it."
            )
        sharding = _sharding()
        # Where the option was left alone, Accelerate's own configuration counts.
        set_there = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        started = int(os.environ.get("WORLD_SIZE", "1"))
        try:
            accelerator = Accelerator(
                # Without it, processes on a machine without devices would not know of each other.
                cpu=started > 1 and not torch.accelerator.is_available(),
                mixed_precision=set_there if options.mixed_precision == "no" else options.mixed_precision,
                log_with="tensorboard" if options.tensorboard else None,
                project_dir=str(out),
            )
        except ValueError as error:
            raise RunError(
                f"mixed_precision={options.mixed_precision} cannot be set ({str(error).split(', ')[0]}); it holds for "
                "a whole Python process, so start a new one."
            ) from error
        if accelerator.num_processes != started:
            raise RunError(
                f"{started} processes were started but Accelerate found {accelerator.num_processes}; start as many as "
                "there are devices, or set ACCELERATE_USE_CPU=1 to run on the CPU."
            )
        alone = not torch.distributed.is_initialized()
        return cls(accelerator, None if alone else sharding)

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def main(self) -> bool:
        """True for the one process that prints and writes."""
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    # ---- numbers ---------------------------------------------------------------------------------------------------

    def sum(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return x if self.world == 1 else cast(Tensor, self.accelerator.reduce(x, "sum"))

    def most(self, number: int) -> int:
        """The largest of a number over all processes."""
        if self.world == 1:
            return number
        every = cast(Tensor, self.accelerator.gather(torch.tensor([number], device=self.device)))
        return int(every.max())

    # ---- objects and errors ------------------------------------------------------------------------------------------

    def gather(self, item: T) -> list[T]:
        """What each process gave, in order.

        Raises:
            LeiblerError: another process met an error in `together` meanwhile.
        """
        return [given for given, _ in self._exchange(item, None)]

    def together(self, make: Callable[[], T]) -> T:
        """The result of ``make`` in this process, once it has succeeded in all; an error in one is raised in all."""
        if self.world == 1:
            return make()
        try:
            result = make()
        except Exception as error:
            # What was met in an exchange within ``make`` the others know already, and exchange no more.
            if getattr(error, "elsewhere", None) is None:
                self._exchange(None, error)
            raise
        self._exchange(None, None)
        return result

    def from_main(self, make: Callable[[], T]) -> T:
        """What ``make`` gives in the first process, in all; its error is raised in all."""
        return self.gather(self.together(lambda: make() if self.main else cast(T, None)))[0]

    def _exchange(self, item: Any, error: Exception | None) -> list[tuple[Any, Any]]:
        if self.world == 1:
            return [(item, None)]
        fault = None if error is None else (error if isinstance(error, LeiblerError) else _told(error, self.rank))
        every: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(every, (item, fault))
        faults = [(rank, e) for rank, (_, e) in enumerate(every) if e is not None]
        if faults:
            first, found = faults[0]
            if error is None:
                found.elsewhere = True
                raise found
            # The first process that met it says it.
            cast(Any, error).elsewhere = first != self.rank
        return every

    def agreed(self, error: LeiblerError) -> LeiblerError:
        """An error that all processes meet at once: the first says it."""
        error.elsewhere = not self.main
        return error

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside the block, a process that is gone ends this one with a sentence about it."""
        try:
            yield
        except LeiblerError as error:
            # Met in the middle of a step, perhaps here alone.
            error.elsewhere = bool(error.elsewhere)
            raise
        except RuntimeError as error:
            if self.world == 1 or not _lost(error):
                raise
            raise RunError(
                "another process of this run ended; the first message above says why. Go on from the last checkpoint "
                "with: leibler train --resume DIR."
            ) from error

    # ---- weights ---------------------------------------------------------------------------------------------------

    def place(self, models: Iterable[CausalLM], modules: Iterable[nn.Module]) -> None:
        """Bring models to this process's device, each its share where weights are sharded."""
        for model in {id(m): m for m in models}.values():
            if self.sharding is None:
                model.to(self.device)
            else:
                self.sharding.shard(model, self.device)
        for module in modules:
            module.to(self.device)

    @contextmanager
    def whole(self, *models: nn.Module) -> Iterator[None]:
        """Inside the block the models can be called freely, however they are sharded."""
        if self.sharding is None:
            yield
        else:
            with self.sharding.whole(*models):
                yield

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """The mean gradient over all processes, of the parameters that each has whole (a share's is averaged already).

        A parameter that got a gradient in some process counts as 0 in the others; one that got none keeps none.
        """
        mine = [p for p in parameters if p.requires_grad and not is_share(p)]
        if self.world == 1 or not mine:
            return
        have = self.sum(torch.tensor([float(p.grad is not None) for p in mine], device=self.device)).tolist()
        sums = []
        for parameter in (p for p, some in zip(mine, have, strict=True) if some):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            sums.append((parameter.grad, torch.distributed.all_reduce(parameter.grad, async_op=True)))
        for gradient, work in sums:
            work.wait()
            gradient.div_(self.world)

    def clip(self, parameters: list[nn.Parameter], most: float) -> float:
        """Clip the gradient to a norm of at most ``most``; returns the norm it had."""
        norm = self.accelerator.clip_grad_norm_(parameters, most)
        return 0.0 if norm is None else float(full(cast(Tensor, norm)))


def is_main() -> bool:
    """True for the one process that prints, also before and after a run."""
    return int(os.environ.get("RANK", "0")) == 0


def leave() -> None:
    """Part from the other processes, at the end of a program."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _sharding() -> Sharding | None:
    """What Accelerate's settings (``accelerate launch`` passes them on as variables) say about sharding."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    from accelerate.utils import FullyShardedDataParallelPlugin

    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise RunError("FSDP is followed in its version 2 only; set fsdp_version: 2 in the accelerate configuration.")
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise RunError("weights cannot be offloaded to the CPU; set fsdp_offload_params: false.")
    # Models are loaded whole in every process and cut here: those that only the first had loaded would be empty.
    plugin = FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)
    return Sharding(
        tuple(plugin.transformer_cls_names_to_wrap or ()),
        bool(plugin.reshard_after_forward),
        bool(plugin.activation_checkpointing),
    )


def _told(error: Exception, rank: int) -> RunError:
    text = str(error).strip().splitlines() or [""]
    return RunError(f"process {rank} failed ({type(error).__name__}: {text[0]}); its traceback says where.")


def _lost(error: RuntimeError) -> bool:
    """True if a collective failed because a peer is gone or silent."""
    if isinstance(error, torch.distributed.DistError):
        return True
    signs = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "gloo")
    return any(sign in str(error) for sign in signs)
