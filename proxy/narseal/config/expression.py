"""Expressions over a predicate, in the Common Expression Language (https://cel.dev)."""

from __future__ import annotations

import json
from typing import Any

import celpy
from celpy.adapter import json_to_cel
from celpy.celparser import CELParseError
from celpy.evaluation import CELEvalError

_MAX_TEXT = 4096
_MAX_PREDICATE = 1 << 20  # bytes of JSON


class Expression:
    """One that is true or false of a predicate. ValueError if it cannot be read."""

    def __init__(self, text: str) -> None:
        if len(text) > _MAX_TEXT:
            raise ValueError(f"an expression of more than {_MAX_TEXT} characters")
        self._text = text
        environment = celpy.Environment()
        try:
            self._program = environment.program(environment.compile(text))
        except (CELParseError, CELEvalError) as error:
            raise ValueError(f"not CEL: {' '.join(str(error).split())[:300]}") from error

    def failure(self, predicate: dict[str, Any]) -> str | None:
        """Why a predicate does not meet it; None if it does. It takes a core: off the loop."""
        if len(json.dumps(predicate)) > _MAX_PREDICATE:
            return f"its predicate has more than {_MAX_PREDICATE} bytes"
        try:
            result = self._program.evaluate({"predicate": json_to_cel(predicate)})
        except (CELEvalError, RecursionError, TypeError, ValueError) as error:
            return f"its predicate cannot be judged: {' '.join(str(error).split())[:200]}"
        is_met = isinstance(result, celpy.celtypes.BoolType | bool) and bool(result)
        return None if is_met else f"its predicate is not as {self._text} asks"
