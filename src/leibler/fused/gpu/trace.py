"""Elementwise PyTorch functions as Triton statements.

A function is run once on tiny tensors under a tracer; what it did is written down, operation by operation. Only
elementwise operations are known: a function that does anything else raises ``NotElementwise`` and is left to PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

KINDS = {"entry": torch.float32, "flag": torch.bool, "row": torch.float32}
"""What an input may be: a number or a truth value at each entry, or a number of the whole row."""
_SIZES = ((2, 3), (3, 5))


class NotElementwise(Exception):
    """The function cannot become part of a kernel; the message says why."""


def statements(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[tuple[str, str]], prefix: str
) -> tuple[list[str], list[str]]:
    """Triton assignments that compute ``function``, and the names of its results.

    Args:
        function: elementwise; takes one tensor per input.
        inputs: (variable name in the kernel, kind) of each argument.
        prefix: begins the names of new variables.

    Raises:
        NotElementwise: an operation is unknown, or the result depends on the size of the vocabulary.

    Examples:
        >>> statements(lambda p, q: (p * (p - q),), [("p", "entry"), ("q", "entry")], "t")
        (['t0 = (p - q)', 't1 = (p * t0)'], ['t1'])
    """
    # Traced at two sizes: a size that has become a constant (1 / V, say) would be wrong in the kernel.
    first, second = (_Writer(inputs, prefix).write(_graph(function, inputs, size), size) for size in _SIZES)
    if first != second:
        raise NotElementwise("the function reads the size of its tensors")
    return first


def _graph(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[tuple[str, str]], size: tuple[int, int]
) -> Any:
    rows, _ = size
    example = [torch.zeros((rows, 1) if kind == "row" else size, dtype=KINDS[kind]) for _, kind in inputs]
    try:
        with torch.no_grad():
            table: Any = core_aten_decompositions()
            module = make_fx(lambda *args: tuple(function(*args)), decomposition_table=table)(*example)
    except RuntimeError as error:  # torch's own word for a branch on data, among others
        raise NotElementwise(str(error).splitlines()[0]) from error
    module.graph.eliminate_dead_code()
    return module


class _Writer:
    def __init__(self, inputs: Sequence[tuple[str, str]], prefix: str) -> None:
        self.inputs, self.prefix = inputs, prefix
        self.names: dict[Node, str] = {}
        self.lines: list[str] = []
        self.known: dict[str, str] = {}

    def write(self, module: Any, size: tuple[int, int]) -> tuple[list[str], list[str]]:
        shapes = {size, (size[0], 1), (1, 1), (1,), ()}
        arguments = iter(self.inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                self.names[node] = next(arguments)[0]
            elif node.op == "get_attr":
                # Its number would be frozen into the kernel, whoever changes it later.
                raise NotElementwise("the function holds a tensor")
            elif node.op == "output":
                return self.lines, [self.names[result] for result in node.args[0]]
            else:
                self._check(node, shapes)
                self._assign(node, _expression(node, [self._operand(a) for a in node.args]))
        raise AssertionError("a graph ends with its output")

    def _check(self, node: Node, shapes: set[tuple[int, ...]]) -> None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or tuple(value.shape) not in shapes:
            raise NotElementwise(f"{node.target} does not give one number per entry")
        if value.dtype not in (torch.float32, torch.bool):
            raise NotElementwise(f"{node.target} gives {value.dtype}")

    def _operand(self, argument: Any) -> Any:
        if isinstance(argument, Node):
            return self.names[argument]
        if isinstance(argument, bool | int | float):
            return _literal(float(argument))
        return argument

    def _assign(self, node: Node, expression: str) -> None:
        if expression not in self.known:
            self.known[expression] = f"{self.prefix}{len(self.lines)}"
            self.lines.append(f"{self.known[expression]} = {expression}")
        self.names[node] = self.known[expression]


def _literal(value: float) -> str:
    return f"({value!r})" if math.isfinite(value) else f'float("{value}")'


def _truth(node: Any) -> bool:
    return isinstance(node, Node) and node.meta["val"].dtype == torch.bool


_UNARY = {
    "neg": "(-{0})",
    "abs": "tl.abs({0})",
    "exp": "tl.exp2({0} * 1.4426950408889634)",
    "exp2": "tl.exp2({0})",
    "log": "(tl.log2({0}) * 0.6931471805599453)",
    "log2": "tl.log2({0})",
    "log1p": "log1p({0})",
    "expm1": "expm1({0})",
    "sqrt": "tl.sqrt({0})",
    "rsqrt": "(1.0 / tl.sqrt({0}))",
    "reciprocal": "(1.0 / {0})",
    "sign": "sign({0})",
    "sgn": "sign({0})",
    "relu": "tl.maximum({0}, 0.0)",
    "sigmoid": "(1.0 / (1.0 + tl.exp2({0} * -1.4426950408889634)))",
    "tanh": "tanh({0})",
    "square": "({0} * {0})",
    "isnan": "({0} != {0})",
}
_BINARY = {
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "rsub": "({1} - {0})",
    "mul": "({0} * {1})",
    "div": "({0} / {1})",
    "maximum": "tl.maximum({0}, {1})",
    "minimum": "tl.minimum({0}, {1})",
}
_COMPARE = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}
_LOGIC = {"logical_and": "&", "bitwise_and": "&", "logical_or": "|", "bitwise_or": "|", "logical_xor": "^"}
_SAME = ("alias", "detach", "clone", "expand", "lift_fresh_copy", "lift_fresh", "contiguous")
_FILLED = ("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")


def _expression(node: Node, args: list[Any]) -> str:
    name = getattr(node.target, "_opname", str(node.target)).removesuffix("_")
    kwargs = dict(node.kwargs)
    numbers = [f"{a}.to(tl.float32)" if _truth(raw) else a for a, raw in zip(args, node.args)]
    if name in _SAME:
        return args[0]
    if name == "copy":  # what an operation in place becomes
        return numbers[1]
    if name in _UNARY:
        return _UNARY[name].format(*numbers)
    alpha: Any = kwargs.get("alpha", 1)
    if name in ("add", "sub", "rsub") and alpha != 1:
        numbers[0 if name == "rsub" else 1] = f"({numbers[0 if name == 'rsub' else 1]} * {_literal(float(alpha))})"
    if name in _BINARY and not kwargs.get("rounding_mode"):
        if name == "mul" and all(map(_truth, node.args)):
            return f"({args[0]} & {args[1]})"
        return _BINARY[name].format(*numbers)
    if name in _COMPARE:
        return f"({numbers[0]} {_COMPARE[name]} {numbers[1]})"
    if name in _LOGIC:
        return f"({args[0]} {_LOGIC[name]} {args[1]})"
    if name in ("logical_not", "bitwise_not"):
        return f"({args[0]} == 0)"
    if name == "where":
        return f"tl.where({args[0]}, {numbers[1]}, {numbers[2]})"
    if name == "masked_fill":
        return f"tl.where({args[1]}, {numbers[2]}, {numbers[0]})"
    if name in ("clamp", "clamp_min", "clamp_max"):
        low = args[1] if name != "clamp_max" and len(args) > 1 else None
        high = args[1] if name == "clamp_max" else args[2] if len(args) > 2 else None
        out = numbers[0] if low is None else f"tl.maximum({numbers[0]}, {low})"
        return out if high is None else f"tl.minimum({out}, {high})"
    if name == "pow" and isinstance(node.args[1], int | float):
        return _power(numbers[0], float(node.args[1]))
    if name in _FILLED:
        value = "0.0" if "zeros" in name else "1.0" if "ones" in name else args[-1]
        filled = f"tl.full((BLOCK,), {value}, tl.float32)"
        return f"({filled} != 0)" if _truth(node) else filled
    if name == "scalar_tensor":
        return args[0]
    if name == "_to_copy":
        return numbers[0] if node.meta["val"].dtype == torch.float32 else f"({args[0]} != 0)"
    raise NotElementwise(f"no kernel knows the operation {name}")


def _power(base: str, exponent: float) -> str:
    if exponent == 0.5:
        return f"tl.sqrt({base})"
    if exponent.is_integer() and 1.0 <= abs(exponent) <= 8.0:
        product = f"({' * '.join([base] * int(abs(exponent)))})"
        return product if exponent > 0 else f"(1.0 / {product})"
    return f"tl.exp2(tl.log2({base}) * {_literal(exponent)})"
