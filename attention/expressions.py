"""Methods by name, as command lines and results write them."""

import ast
import dataclasses
from typing import Any

from attention.method import METHODS, Method
from attention.registry import unknown


def make_method(name: str, **fields: Any) -> Method:
    """The method called `name` on the command line, with `fields` set.

    Raises:
        ValueError: the name or a field is unknown; the message gives the nearest one.
    """
    if name not in METHODS:
        raise ValueError(unknown("method", name, METHODS))
    known = [field.name for field in dataclasses.fields(METHODS[name])]
    for field in fields:
        if field not in known:
            raise ValueError(unknown(f"field of {METHODS[name].__name__}", field, known))
    return METHODS[name](**fields)


def parse_method(expression: str) -> Method:
    """The method that prints as `expression`, such as `TopK(k=16)`; a name alone has its defaults.

    Raises:
        ValueError: the name or a field is unknown, or this is no such expression. Nothing is evaluated.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(func=tree, args=[], keywords=[])
        if not isinstance(call.func, ast.Name) or call.args or any(word.arg is None for word in call.keywords):
            raise ValueError(f"{expression!r} is not a name with keyword arguments")
        fields = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"method is {expression!r}: expected a name, or an expression like TopK(k=16)") from error
    return make_method(call.func.id.lower(), **fields)
