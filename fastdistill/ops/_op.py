"""`Op`: one registration for every op, so that an op's own file holds only its mathematics."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.ops._arguments import per_sample
from fastdistill.ops._backend import choose_backend

_library = torch.library.Library("fastdistill", "DEF")
_PLAIN = frozenset((Tensor, nn.Parameter))


class Op:
    """An op registered as ``torch.ops.fastdistill.<name>`` with one argument list everywhere.

    In eager mode the chosen backend is called directly, since a custom-op boundary costs 10 to
    60 microseconds and these ops take about two; under ``torch.compile``, on the meta device and
    on tensor subclasses (fake tensors, DTensor) the registered op is called.

    Args:
        name: the op's name, and the name of its launcher in ``kernels/`` and in ``csrc/``.
        schema: arguments and results in torch's schema language.
        reference: pure-torch implementation; the truth that the others are tested against.
        fake: shapes and dtypes of the results.
        kernel: module in ``fastdistill.kernels`` that holds the Triton launcher.
        batch_outputs: how many results there are, each with the batch as dimension 0.
        replicated: positions of tensor arguments without a batch dimension (DTensor keeps them
            whole); None where the whole batch is needed at once, so that nothing is sharded.
        summed: whether results are sums over the batch, so that those of shards add up.
        native_cpu: whether C++ has a kernel; an op whose reference is torch's own CPU kernels in a
            row has none, and runs its reference where others run C++.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        kernel: str,
        batch_outputs: int = 1,
        replicated: tuple[int, ...] | None = (),
        summed: bool = False,
        native_cpu: bool = True,
    ) -> None:
        self.name = name
        self.reference = reference
        self._kernel = kernel
        self.replicated = replicated
        self._batch_outputs = batch_outputs
        self.summed = summed
        self._launchers: dict[str, Callable[..., Any]] = {"reference": reference}
        self.native_cpu = native_cpu
        if not native_cpu:
            self._launchers["cpu"] = reference
        self._dtensor_ready = False
        _library.define(f"{name}{schema}")
        _library.impl(name, self._launch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastdistill::{name}", fake, lib=_library)
        self.overload = getattr(torch.ops.fastdistill, name).default

    def register_autograd(
        self, backward: Callable[..., Any], setup_context: Callable[..., Any]
    ) -> None:
        """Attach the backward formula that compiled and traced programs use."""
        torch.library.register_autograd(
            f"fastdistill::{self.name}", backward, setup_context=setup_context, lib=_library
        )

    def register_cotangent(
        self,
        scale: int,
        loss: Callable[[Tensor], Tensor],
        cotangents: Mapping[int, int] | None = None,
    ) -> None:
        """Make an op that returns cotangents and, last, its losses a differentiable loss.

        Args:
            scale: position of the argument that scales the cotangents but not the losses.
            loss: finds the loss of each sample [B] in the gradient of the last result.
            cotangents: for the position of each differentiable argument that of its cotangent
                among the results; the first argument's is the first result if absent.
        """
        places = {0: 0} if cotangents is None else dict(cotangents)

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            found = [output[place] for place in places.values()]
            ctx.save_for_backward(*found)
            ctx.mark_non_differentiable(*output[:-1])
            ctx.scale, ctx.inputs = inputs[scale], len(inputs)
            ctx.dtypes = [getattr(inputs[place], "dtype", None) for place in places]

        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            result: list[Tensor | None] = [None] * ctx.inputs
            factor = loss(grads[-1]) / ctx.scale
            for place, cotangent, dtype in zip(places, ctx.saved_tensors, ctx.dtypes, strict=True):
                if ctx.needs_input_grad[place]:
                    wide = per_sample(factor, cotangent, factor.dtype)
                    result[place] = (wide * cotangent).to(dtype)
            return tuple(result)

        self.register_autograd(backward, setup_context)

    def __call__(self, *args: Any) -> Any:
        """Run the op on the backend of its first tensor; differentiable through its formula."""
        if self.needs_dispatcher(args):
            return self.overload(*args)
        return self._launch(*args)

    def needs_dispatcher(self, args: Sequence[Any]) -> bool:
        """Whether a call with ``args`` must go through torch's dispatcher."""
        if torch.compiler.is_compiling():
            return True
        grad = torch.is_grad_enabled()
        for value in args:
            if type(value) in _PLAIN:
                if value.is_meta or (grad and value.requires_grad):
                    return True
            elif isinstance(value, Tensor):
                self._register_dtensor_rule(args)
                return True
        return False

    def _launch(self, *args: Any) -> Any:
        backend = choose_backend(args[0])
        launcher = self._launchers.get(backend)
        if launcher is None:
            launcher = self._launchers[backend] = self._find_launcher(backend)
        return launcher(*args)

    def _find_launcher(self, backend: str) -> Callable[..., Any]:
        if backend == "cpu":
            return getattr(torch.ops.fastdistill_cpu, self.name).default
        try:
            module = importlib.import_module(f"fastdistill.kernels.{self._kernel}")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"fastdistill::{self.name} on CUDA tensors needs Triton ({error}); "
                "`pip install triton`, or fastdistill.ops.use_backend('reference')"
            ) from error
        return getattr(module, self.name)

    def _register_dtensor_rule(self, args: Sequence[Any]) -> None:
        """Teach DTensor, once and only when it appears, how this op is sharded."""
        if self._dtensor_ready:
            return
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
        from torch.distributed.tensor.experimental import register_sharding

        if not any(isinstance(value, DTensor) for value in args):
            return
        self._dtensor_ready = True

        @register_sharding(self.overload)
        def rule(*args: Any, **kwargs: Any) -> list[tuple[list[Any], list[Any]]]:
            tensors = [hasattr(value, "tensor_meta") for value in args]

            def placed(placement: Any) -> tuple[list[Any], list[Any]]:
                kept = self.replicated or ()
                inputs = [
                    (Replicate() if index in kept else placement) if is_tensor else None
                    for index, is_tensor in enumerate(tensors)
                ]
                shared = Partial() if self.summed and placement.is_shard() else placement
                return [shared] * self._batch_outputs, inputs

            whole = placed(Replicate())
            return [whole] if self.replicated is None else [whole, placed(Shard(0))]
