"""A calculator for language models: arithmetic without eval, and calls in a stream of tokens.

Exported from chapters/08_inference.py (chapter 08, Inference); edit there, not here.
"""

import ast
import math
import re
from decimal import Decimal

from nanochat.tokenizer import Tokenizer

__all__ = [
    "MAX_DEPTH",
    "MAX_EXPONENT",
    "MAX_LENGTH",
    "MAX_VALUE",
    "OPERATORS",
    "QUOTED",
    "THOUSANDS",
    "ToolCalls",
    "calculate",
    "count_call",
    "evaluate",
    "format_number",
    "power",
]


MAX_LENGTH, MAX_DEPTH, MAX_VALUE, MAX_EXPONENT = 500, 50, 1e30, 100
OPERATORS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.Pow: lambda a, b: power(a, b),
    ast.UAdd: lambda a: a,
    ast.USub: lambda a: -a,
}


def power(base: float, exponent: float) -> float:
    """Return base ** exponent; ValueError before the work when the result would be too large."""
    if abs(exponent) > MAX_EXPONENT or (base and exponent * math.log10(abs(base)) > 30):
        raise ValueError("the power is too large")
    return base**exponent


def count_call(node: ast.AST) -> int:
    """Compute `"text".count("t")`, the one call there is; ValueError for any other node."""
    match node:
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(text)), attr="count"),
            args=[ast.Constant(value=str(part))],
            keywords=[],
        ):
            return text.count(part)
    raise ValueError(f"{type(node).__name__} is not allowed")


def evaluate(node: ast.AST, depth: int = 0) -> int | float:
    """Compute a syntax tree of allowed nodes; ValueError for any other node or size."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = evaluate(node.left, depth + 1), evaluate(node.right, depth + 1)
        value = OPERATORS[type(node.op)](left, right)
    elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](evaluate(node.operand, depth + 1))
    else:
        value = count_call(node)
    if isinstance(value, complex) or not abs(value) <= MAX_VALUE:  # `not <=` is true for NaN
        raise ValueError("the number is too large")
    return value


QUOTED = re.compile(r"""("[^"\\\n]*"|'[^'\\\n]*')""")
THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?![\d,])")


def format_number(value: int | float) -> str:
    """Write a number as the training data do: 12 not 12.0, 0.3 not 0.30000000000000004."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        return str(value)
    return format(Decimal(f"{value:.12g}"), "f")


def calculate(expression: str) -> str | None:
    """Return the value of a short expression as text, or None for whatever is not one.

    Allowed: + - * / // % **, parentheses, decimal numbers (with thousands commas) and
    `"text".count("t")`. Nothing is ever executed: the text is parsed, and the tree is computed
    node by node with limits on length, depth, size and exponents.
    """
    if len(expression) > MAX_LENGTH:
        return None
    pieces = QUOTED.split(expression.strip())  # plain, quoted, plain, quoted, ..., plain
    for i in range(0, len(pieces), 2):
        plain = pieces[i] = THOUSANDS.sub(lambda m: m[0].replace(",", ""), pieces[i])
        if not re.fullmatch(r"[0-9.+\-*/%() ]*", plain.replace(".count", "")):
            return None
        if plain.count("(") > MAX_DEPTH:
            return None
    try:
        tree = ast.parse("".join(pieces), mode="eval")
        return format_number(evaluate(tree.body))
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return None


class ToolCalls:
    """Watches the ids that a model chooses, and answers its calls of the calculator."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.start, self.end = map(tokenizer.special, ("python_start", "python_end"))
        self.expression: list[int] | None = None  # ids since python_start; None outside of a call

    def push(self, id: int) -> list[int]:
        """Take one id; return the ids to force next: none unless it closes a call with a value."""
        if id == self.start:
            self.expression = []
        elif self.expression is None:
            return []
        elif id == self.end:
            value = calculate(self.tokenizer.decode(self.expression))
            self.expression = None
            if value is not None:
                output, special = self.tokenizer.encode(value), self.tokenizer.special
                return [special("output_start"), *output, special("output_end")]
        else:
            self.expression.append(id)
        return []
