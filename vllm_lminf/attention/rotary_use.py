"""Whether a model's attention module turns its heads by the rotary module that it holds.

Some models make a rotary module in every layer and call it in a few; some turn a part of each head
that is not the leading one. Both look like any other layer from outside, and a far pair would be
turned wrongly in them.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import nn

from vllm_lminf.startup import UnsupportedError

if TYPE_CHECKING:
    from vllm_lminf.attention.rotary import ExactRotaryEmbedding

_Condition = tuple[ast.expr, bool]
"""An expression, and the truth value that it must have."""


def check_use(
    attention: nn.Module, rotary: "ExactRotaryEmbedding", layer_name: str, head_size: int
) -> None:
    """Makes sure that a layer's heads are turned by its rotary module, each as a whole.

    The conditions under which it is called are taken from the source of the attention module, and
    evaluated on it.

    Args:
        attention: the module that holds the attention layer and the rotary module.
        rotary: the latter.
        layer_name: for messages.
        head_size: the attention layer's.

    Raises:
        UnsupportedError: the rotary module isn't used, or that can't be told.
    """
    kind = type(attention).__name__
    if rotary.head_size != head_size:
        raise UnsupportedError(
            [
                f"layer {layer_name}: {kind} turns {rotary.head_size} dimensions that lie "
                f"somewhere in heads of {head_size}"
            ]
        )
    (name,) = (name for name, module in attention.named_children() if module is rotary)
    calls = [call for method in _methods(attention) for call in _calls(method, name)]
    try:
        is_used = any(_holds(conditions, method, attention) for method, conditions in calls)
    except Exception as error:
        raise UnsupportedError(
            [
                f"layer {layer_name}: {kind} calls its rotary module under a condition that is not "
                f"known before it runs ({error})"
            ]
        ) from error
    if not is_used:
        raise UnsupportedError(
            [
                f"layer {layer_name}: {kind} holds the rotary module {name} and does not call it "
                "here: a layer without a relative encoding"
            ]
        )


def _methods(attention: nn.Module) -> Iterator[Callable]:
    for _, method in inspect.getmembers(type(attention), inspect.isfunction):
        if not method.__module__.startswith("torch."):
            yield method


def _calls(method: Callable, name: str) -> Iterator[tuple[Callable, list[_Condition]]]:
    """Every call of ``self.<name>`` in a method, with the conditions around it."""

    def visit(node: ast.AST, conditions: list[_Condition]) -> Iterator[list[_Condition]]:
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{name}":
            yield conditions
        if isinstance(node, ast.If):
            yield from visit_all(node.body, [*conditions, (node.test, True)])
            yield from visit_all(node.orelse, [*conditions, (node.test, False)])
        elif isinstance(node, ast.FunctionDef):
            yield from visit_all(node.body, conditions)
        else:
            for child in ast.iter_child_nodes(node):
                yield from visit(child, conditions)

    def visit_all(
        statements: list[ast.stmt], conditions: list[_Condition]
    ) -> Iterator[list[_Condition]]:
        for statement in statements:
            yield from visit(statement, conditions)
            if isinstance(statement, ast.If) and isinstance(statement.body[-1], ast.Return):
                conditions = [*conditions, (statement.test, False)]

    for conditions in visit(ast.parse(textwrap.dedent(inspect.getsource(method))), []):
        yield method, conditions


def _holds(conditions: list[_Condition], method: Callable, attention: nn.Module) -> bool:
    scope = inspect.unwrap(method).__globals__
    return all(
        bool(eval(ast.unparse(test), scope, {"self": attention})) == value
        for test, value in conditions
    )
