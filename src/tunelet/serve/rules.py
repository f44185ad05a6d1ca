"""Limits of what an answer may be held to: grammars and schemas that llama.cpp would take minutes or all memory for, or
that end its process. Not for whether they make sense: that is asked of llama.cpp itself (infer/llama_cpp.py).

Found by trying: an array of at most 10^8 items took 12 GB; 100,000 brackets in one another ended the process. A grammar
can still be made that takes minutes for a token, while nobody else is answered (20 rules, each the next one with and
without a letter): so grammars are off unless the server's owner allows them. Schemas have limits of llguidance's own.
"""

from __future__ import annotations

from typing import Any

from tunelet.serve.refusal import bad

ITEMS = 4096  # of an array: more than a context has room for
BRACKETS = 200
LETTERS = 4096
COUNTED = ("minItems", "maxItems")


def check_grammar(grammar: str) -> None:
    if grammar.startswith("%"):
        raise bad("'grammar' is GBNF.", "grammar")
    if len(grammar) > LETTERS or grammar.count("(") > BRACKETS:
        raise bad(f"'grammar' may have {LETTERS} letters and {BRACKETS} brackets.", "grammar")


def check_schema(schema: Any, param: str) -> None:
    """Raises Refusal where an array in it has too many items, wherever that stands."""
    left = [schema]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            for name in COUNTED:
                number = one.get(name)
                if isinstance(number, int | float) and number > ITEMS:
                    raise bad(f"'{name}' of a schema may be at most {ITEMS}.", param)
            left += one.values()
        elif isinstance(one, list):
            left += one
