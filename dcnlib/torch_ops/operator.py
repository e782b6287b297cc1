"""What every operator beside the convolution has in common: all that torch is told about it.

An `Operator` has a schema, names for its tensors, a description of a call (its problem), composites
and a way to fold mapped examples into one call. From those follow the kernels for data, for fake
tensors, for autograd, autocast and vmap, of the operator and of its backward operator, as
`schemas.py`, `kernels.py`, `autograd.py` and `transforms.py` have them for the convolution.

A call is a dict: every argument by name, in the order of the schema.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _config
from .._dispatch import check_name, choose
from .._problem import Shape, Spec, value_error
from . import autograd, kernels, schemas
from .schemas import LIBRARY, check_dense

Call = dict[str, Any]
_CASTABLE = (torch.float32, torch.float16, torch.bfloat16)


class Operator:
    """One operator and its backward operator. Subclasses say what is theirs."""

    name: ClassVar[str]
    #: The arguments. The backward operator takes grad_output before and output_mask behind them.
    arguments: ClassVar[str]
    #: Its tensors, and those of them that have a gradient.
    tensors: ClassVar[tuple[str, ...]]
    differentiable: ClassVar[tuple[str, ...]]
    #: The backends' functions, forward and backward; their operands and gradients in order. Those
    #: that the operator does not have are None.
    functions: ClassVar[tuple[str, str]]
    operands: ClassVar[tuple[str, ...]]
    gradients: ClassVar[tuple[str, ...]]
    #: Whether tensors in channels-last format are computed and returned in it.
    keeps_format: ClassVar[bool] = False

    def __init__(self) -> None:
        self.backward_name = f"{self.name}_backward"
        #: False if this process has the operators already, from another import of this package.
        self.defined_here = not hasattr(torch.ops.dcnlib, self.name)
        if self.defined_here:
            grads = ", ".join(f"Tensor grad_{name}" for name in self.differentiable)
            count = len(self.differentiable)
            every = ", ".join(["True"] * count)
            for schema in (
                f"{self.name}({self.arguments}) -> Tensor",
                f"{self.backward_name}(Tensor grad_output, {self.arguments},"
                f" bool[{count}] output_mask=[{every}]) -> ({grads})",
            ):
                LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
        self.operator = getattr(torch.ops.dcnlib, self.name).default
        self.backward_operator = getattr(torch.ops.dcnlib, self.backward_name).default
        self._signatures = {
            operator: [(a.name, a.default_value) for a in operator._schema.arguments]
            for operator in (self.operator, self.backward_operator)
        }
        # Where the tensors stand in a call.
        self._places = self._places_of(self.operator, self.tensors)
        self._backward_places = self._places_of(
            self.backward_operator, ("grad_output", *self.tensors)
        )
        self._remembered = lru_cache(maxsize=256)(self._describe)

    # ---- what subclasses have to say

    def describe(
        self, op: str, specs: dict[str, Spec | None], options: Call, channels_last: bool
    ) -> Any:
        """Check a call and return its problem; `specs` has grad_output, too, None if forward."""
        raise NotImplementedError

    def operand(self, op: str, name: str, tensor: Tensor, problem: Any) -> Tensor:
        """A tensor as backends read it."""
        last = problem.channels_last and name in ("input", "grad_output")
        return kernels._dense(op, name, tensor, last)

    def compose(self, problem: Any, call: Call) -> Tensor:
        """The result in torch's own differentiable operators."""
        raise NotImplementedError

    def compose_backward(
        self, problem: Any, call: Call, output_mask: Sequence[bool]
    ) -> list[Tensor | None]:
        """The wanted gradients in torch's own differentiable operators."""
        raise NotImplementedError

    def fold(self, size: int, call: Call, axes: Call, every_input: bool) -> tuple[Call, Any]:
        """Mapped examples as one call, and what `unfold` has to know.

        `axes` are the mapped axes by name. With `every_input` each example needs an input of its
        own, for its gradient.
        """
        raise NotImplementedError

    def unfold(self, name: str, tensor: Tensor, size: int, note: Any) -> Tensor:
        """A result of a folded call with the mapped axis in front."""
        raise NotImplementedError

    # ---- calls

    def __call__(self, *arguments: Any) -> Tensor:
        """The operator; every argument in order."""
        return self._shortest(self.operator, self._run, self._places, arguments)

    def backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        """The backward operator; every argument in order."""
        return self._shortest(
            self.backward_operator, self._run_backward, self._backward_places, arguments
        )

    @staticmethod
    def _shortest(operator, run, places, arguments):
        """A call by the dispatcher, or past it where that finds `run` and nothing else."""
        tensors = [arguments[i] for i in places]
        if autograd._is_plain(tensors) and not autograd._is_recorded(tensors):
            return run(*arguments)
        return operator(*arguments)

    def problem(
        self, op: str, call: Call, symbolic: bool = True, channels_last: bool = False
    ) -> Any:
        """Check a call and describe it. Without symbols a repeated call costs one look-up."""
        device = call["input"].device
        specs, options = [], []
        for name, value in call.items():
            if name in self.tensors or name == "grad_output":
                if value is not None and value.device != device:
                    raise self._different_devices(op, call)
                specs.append((name, None if value is None else (value.shape, value.dtype)))
            elif name not in ("backend", "output_mask"):
                options.append((name, tuple(value) if isinstance(value, list) else value))
        describe = self._describe if symbolic else self._remembered
        return describe(op, tuple(specs), tuple(options), channels_last)

    def _keeps_last(self, call: Call) -> bool:
        return self.keeps_format and schemas.is_channels_last(call["input"])

    def _describe(self, op: str, specs: tuple, options: tuple, channels_last: bool) -> Any:
        found = {"grad_output": None} | {
            name: None if spec is None else (tuple(spec[0]), schemas._DTYPE_NAMES[spec[1]])
            for name, spec in specs
        }
        return self.describe(op, found, dict(options), channels_last)

    def _bound(self, operator: torch._ops.OpOverload, arguments: Sequence, keywords: Call) -> Call:
        """Every argument by name; torch's dispatcher drops those that have their default."""
        signature = self._signatures[operator]
        call = {name: value for (name, _), value in zip(signature, arguments, strict=False)}
        for name, default in signature[len(call) :]:
            call[name] = keywords.get(name, default)
        return call

    def _places_of(self, operator: torch._ops.OpOverload, names: Sequence[str]) -> list[int]:
        order = [name for name, _ in self._signatures[operator]]
        return [order.index(name) for name in names]

    def _wanted(self, call: Call) -> tuple[bool, ...]:
        """`output_mask` checked; what is not there has no gradient."""
        output_mask, count = call["output_mask"], len(self.differentiable)
        if len(output_mask) != count:
            raise value_error(
                self.backward_name,
                "output_mask",
                f"must tell for {', '.join(self.differentiable)}",
                f"{count} values",
                list(output_mask),
            )
        return tuple(
            is_wanted and call[name] is not None
            for name, is_wanted in zip(self.differentiable, output_mask, strict=True)
        )

    def _different_devices(self, op: str, call: Call) -> ValueError:
        devices = {name: value.device for name, value in call.items() if isinstance(value, Tensor)}
        device = call["input"].device
        return value_error(
            op,
            next(name for name, other in devices.items() if other != device),
            "must be on the device of input",
            device,
            ", ".join(f"{name} on {other}" for name, other in devices.items()),
            "move them with .to(device)",
        )

    def _new_gradients(
        self, problem: Any, input: Tensor, output_mask: Sequence[bool]
    ) -> tuple[Tensor, ...]:
        """Memory for the wanted gradients in the caller's shapes; empty tensors for the others."""
        return tuple(
            schemas.new_like(
                input,
                problem.unbatch(getattr(problem, f"{name}_shape")) if is_wanted else (0,),
                is_wanted and name == "input" and problem.channels_last,
            )
            for name, is_wanted in zip(self.differentiable, output_mask, strict=True)
        )

    # ---- registration

    def register(self) -> None:
        """Tell torch everything."""
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(self.name, self._run, device)
            LIBRARY.impl(self.backward_name, self._run_backward, device)
        # Every other device, and sparse, quantized and nested tensors, which count as devices.
        for key in ("CompositeExplicitAutograd", "NestedTensorCPU", "NestedTensorCUDA"):
            LIBRARY.impl(self.name, self._decline, key)
            LIBRARY.impl(self.backward_name, self._decline_backward, key)
        LIBRARY.impl(self.name, self._differentiably, "Autograd", with_keyset=True)
        LIBRARY.impl(
            self.backward_name, self._differentiably_backward, "Autograd", with_keyset=True
        )
        for device in ("cpu", "cuda"):
            LIBRARY.impl(self.name, self._autocast(device), f"Autocast{device.upper()}")
        register = torch.library.register_fake
        register(f"dcnlib::{self.name}", self._fake, lib=LIBRARY)
        register(f"dcnlib::{self.backward_name}", self._fake_backward, lib=LIBRARY)
        register = torch.library.register_vmap
        register(f"dcnlib::{self.name}", self._vmap, lib=LIBRARY)
        register(f"dcnlib::{self.backward_name}", self._vmap_backward, lib=LIBRARY)

    # ---- kernels for data

    def _run(self, *arguments, **keywords):
        call = self._bound(self.operator, arguments, keywords)
        problem = self.problem(self.name, call, False, self._keeps_last(call))
        input = call["input"]
        chosen = choose(self.name, call["backend"], input.device.type)
        try:
            operands = self._operands(self.name, self.operands, call, problem)
            output = schemas.new_like(
                input, problem.unbatch(problem.output_shape), problem.channels_last
            )
        except RuntimeError as error:
            raise kernels._memory_error(self.name, error) from None
        self._execute(chosen, self.functions[0], problem, operands, [output])
        return output

    def _run_backward(self, *arguments, **keywords):
        call = self._bound(self.backward_operator, arguments, keywords)
        op, input = self.backward_name, call["input"]
        output_mask = self._wanted(call)
        problem = self.problem(op, call, False, self._keeps_last(call))
        chosen = choose(op, call["backend"], input.device.type)
        try:
            operands = self._operands(op, ("grad_output", *self.operands), call, problem)
            results = self._new_gradients(problem, input, output_mask)
        except RuntimeError as error:
            raise kernels._memory_error(op, error) from None
        if any(output_mask):
            found = zip(self.differentiable, results, output_mask, strict=True)
            wanted = {name: result for name, result, is_wanted in found if is_wanted}
            grads = [wanted.get(name) for name in self.gradients]
            self._execute(chosen, self.functions[1], problem, operands, grads)
        return results

    def _execute(
        self,
        chosen: ModuleType,
        function: str,
        problem: Any,
        operands: list[Tensor | None],
        results: list[Tensor | None],
    ) -> None:
        """Call a backend: "cpu" gets addresses, "reference" arrays, "cuda" tensors."""
        forward = function == self.functions[0]
        run = getattr(chosen, function)
        if chosen.name == "cpu":
            operands = [None if t is None else t.data_ptr() for t in operands]
            addresses = [None if t is None else t.data_ptr() for t in results]
            threads = _config.num_threads(torch.get_num_threads())
            run(problem, *operands, addresses[0] if forward else addresses, num_threads=threads)
        elif chosen.name == "reference":
            inputs, outputs = self.operands, ("output",)
            if not forward:
                inputs, outputs = ("grad_output", *inputs), self.gradients
            arrays = [
                None if t is None else kernels._array(t).reshape(self._shape(problem, name))
                for name, t in zip(inputs, operands, strict=True)
            ]
            new = [
                None
                if t is None
                else kernels._new_array(problem, t).reshape(self._shape(problem, name))
                for name, t in zip(outputs, results, strict=True)
            ]
            run(problem, *arrays, new[0] if forward else new)
            for tensor, array in zip(results, new, strict=True):
                if tensor is not None:
                    kernels._fill(chosen, tensor, array.reshape(tensor.shape))
        else:
            run(problem, *operands, results[0] if forward else results)

    @staticmethod
    def _shape(problem: Any, name: str) -> Shape:
        return getattr(problem, "output_shape" if name == "grad_output" else f"{name}_shape")

    def _operands(
        self, op: str, names: Sequence[str], call: Call, problem: Any
    ) -> list[Tensor | None]:
        tensors = [call.get(name) for name in names]
        return [
            None if tensor is None else self.operand(op, name, tensor, problem)
            for name, tensor in zip(names, tensors, strict=True)
        ]

    def _decline(self, *arguments, **keywords):
        self._check(self.name, self._bound(self.operator, arguments, keywords))

    def _decline_backward(self, *arguments, **keywords):
        self._check(self.backward_name, self._bound(self.backward_operator, arguments, keywords))

    def _check(self, op: str, call: Call) -> None:
        check_dense(op, **{name: value for name, value in call.items() if self._is_tensor(name)})
        choose(op, call["backend"], call["input"].device.type)

    def _is_tensor(self, name: str) -> bool:
        return name in self.tensors or name == "grad_output"

    # ---- results without data

    def _fake(self, *arguments, **keywords):
        call = self._bound(self.operator, arguments, keywords)
        problem = self._described(self.name, call)
        shape = problem.unbatch(problem.output_shape)
        return schemas.new_like(call["input"], shape, problem.channels_last)

    def _fake_backward(self, *arguments, **keywords):
        call = self._bound(self.backward_operator, arguments, keywords)
        problem = self._described(self.backward_name, call)
        return self._new_gradients(problem, call["input"], self._wanted(call))

    def _described(self, op: str, call: Call) -> Any:
        check_dense(op, **{name: value for name, value in call.items() if self._is_tensor(name)})
        check_name(op, call["backend"])
        return self.problem(op, call, channels_last=self._keeps_last(call))

    # ---- derivatives

    def _differentiably(self, keyset, *arguments, **keywords):
        call = self._bound(self.operator, arguments, keywords)
        tensors = [call[name] for name in self.differentiable]
        if autograd._has_tangents(tensors):
            problem = self.problem(self.name, call)
            with autograd._as_typed(call["input"]):
                return self.compose(problem, call)
        if autograd._is_recorded(tensors):
            return autograd._record(
                _Forward, keyset, self, call, *(call[name] for name in self.tensors)
            )
        return autograd._below(self.operator, keyset, *call.values())

    def _differentiably_backward(self, keyset, *arguments, **keywords):
        call = self._bound(self.backward_operator, arguments, keywords)
        tensors = [call[name] for name in ("grad_output", *self.differentiable)]
        if autograd._has_tangents(tensors):
            output_mask = self._wanted(call)
            problem = self.problem(self.backward_name, call)
            with autograd._as_typed(call["input"]):
                grads = self.compose_backward(problem, call, output_mask)
            return tuple(call["input"].new_empty(0) if g is None else g for g in grads)
        if autograd._is_recorded(tensors):
            names = ("grad_output", *self.tensors)
            return autograd._record(_Backward, keyset, self, call, *(call[name] for name in names))
        return autograd._below(self.backward_operator, keyset, *call.values())

    # ---- autocast and vmap

    def _autocast(self, device: str):
        def forward(*arguments, **keywords):
            dtype = torch.get_autocast_dtype(device)
            call = self._bound(self.operator, arguments, keywords)
            for name in self.differentiable:
                tensor = call[name]
                if tensor is not None and tensor.dtype in _CASTABLE:
                    call[name] = tensor.to(dtype)
            with torch.autocast(device, enabled=False):
                return self.operator(*call.values())

        return forward

    def _vmap(self, info, in_dims, *arguments):
        call, axes = self._mapped(self.operator, in_dims, arguments)
        self.problem(self.name, call | self._examples(call, axes))
        folded, note = self.fold(info.batch_size, call, axes, False)
        output = self.operator(*folded.values())
        return self.unfold("output", output, info.batch_size, note), 0

    def _vmap_backward(self, info, in_dims, *arguments):
        call, axes = self._mapped(self.backward_operator, in_dims, arguments)
        example = call | self._examples(call, axes)
        self.problem(self.backward_name, example)
        output_mask = self._wanted(example)
        folded, note = self.fold(info.batch_size, call, axes, output_mask[0])
        grads = self.backward_operator(*folded.values())
        results = [
            (self.unfold(name, grad, info.batch_size, note), 0) if is_wanted else (grad, None)
            for name, grad, is_wanted in zip(self.differentiable, grads, output_mask, strict=True)
        ]
        return tuple(zip(*results, strict=True))

    def _mapped(self, operator, in_dims: Sequence, arguments: Sequence) -> tuple[Call, Call]:
        """A call, and the mapped axes of its tensors."""
        call = self._bound(operator, arguments, {})
        axes = dict(zip(call, in_dims, strict=False))  # the dispatcher drops defaults
        return call, {name: axes.get(name) for name in call if self._is_tensor(name)}

    def _examples(self, call: Call, axes: Call) -> Call:
        """Stand-ins for what one example gets, to be checked: shape, dtype and device."""
        examples = {}
        for name, axis in axes.items():
            if axis is not None:
                shape: Shape = list(call[name].shape)
                del shape[axis]
                examples[name] = call[name].new_empty(()).expand(shape)
        return examples


class _Forward(autograd.Record):
    """An operator with its gradients."""

    @staticmethod
    def forward(ctx, keyset, operator, call, *tensors):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.operator = operator
        ctx.call = dict.fromkeys(call) | _without(call, operator.tensors)
        call = call | dict(zip(operator.tensors, tensors, strict=True))
        return autograd._below_record(operator.operator, keyset, *call.values())

    @staticmethod
    def backward(ctx, grad_output):
        operator = ctx.operator
        if grad_output is None:
            return (None,) * (3 + len(operator.tensors))
        needed = dict(zip(operator.tensors, ctx.needs_input_grad[3:], strict=True))
        call = ctx.call | dict(zip(operator.tensors, ctx.saved_tensors, strict=True))
        output_mask = [needed[name] for name in operator.differentiable]
        grads = operator.backward(grad_output, *call.values(), output_mask)
        found = dict(zip(operator.differentiable, grads, strict=True))
        return (None,) * 3 + tuple(
            found.get(name) if needed[name] else None for name in operator.tensors
        )


class _Backward(autograd.Record):
    """A backward operator with its gradients: those of the composite."""

    @staticmethod
    def forward(ctx, keyset, operator, call, *tensors):
        names = ("grad_output", *operator.tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.operator = operator
        ctx.call = dict.fromkeys(call) | _without(call, names)
        ctx.output_mask = operator._wanted(call)
        call = call | dict(zip(names, tensors, strict=True))
        return autograd._below_record(operator.backward_operator, keyset, *call.values())

    @staticmethod
    def backward(ctx, *grads):
        operator = ctx.operator
        names = ("grad_output", *operator.tensors)
        output_mask = [w and g is not None for w, g in zip(ctx.output_mask, grads, strict=True)]
        if not any(output_mask):
            return (None,) * (3 + len(names))
        call = ctx.call | dict(zip(names, ctx.saved_tensors, strict=True))
        problem = operator.problem(operator.backward_name, call)
        by = [
            name
            for name, is_needed in zip(names, ctx.needs_input_grad[3:], strict=True)
            if is_needed and name in ("grad_output", *operator.differentiable)
        ]

        def wanted_gradients(*differentiated):
            outputs = operator.compose_backward(
                problem, call | dict(zip(by, differentiated, strict=True)), output_mask
            )
            return tuple(output for output in outputs if output is not None)

        with autograd._as_typed(call["input"]):
            _, pull_back = torch.func.vjp(wanted_gradients, *(call[name] for name in by))
            wanted = tuple(g for g, w in zip(grads, output_mask, strict=True) if w)
            found = dict(zip(by, pull_back(wanted), strict=True))
        return (None,) * 3 + tuple(found.get(name) for name in names)


def _without(call: Call, names: Sequence[str]) -> Call:
    return {name: value for name, value in call.items() if name not in names}


def in_front(tensor: Tensor, axis: int | None, size: int) -> Tensor:
    """`tensor` with its mapped axis first, a new one if it has none."""
    return tensor.expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
