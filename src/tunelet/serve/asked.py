"""The fields of requests, as OpenAI's API has them: which are read, which change nothing, which are refused.

Not for carrying them out (chat.py, completions.py). Types are strict: "1" is no number, true is none either. What is
not known is refused, as OpenAI does, because a field that is passed over changes results unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunelet.errors import did_you_mean
from tunelet.serve.refusal import Refusal, bad

# These say who asks, where the answer is kept or what it costs: no token depends on them.
HARMLESS = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
)
# Refused unless they say what happens anyway.
REFUSED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "functions": ([],),
    "function_call": (),
    "dimensions": (),
}
MOST_STOPS = 16
MOST_LOGPROBS = 20
ONES = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)


class StreamOptions(Strict):
    include_usage: bool = False


class Sampled(Strict):
    """What both routes that write text share."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=128)
    seed: int | None = None
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int = Field(0, ge=0, lt=2**31)
    repetition_penalty: float = Field(1.0, gt=0, le=10, allow_inf_nan=False)
    presence_penalty: ONES = 0.0
    frequency_penalty: ONES = 0.0
    stop: str | list[str] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] = Field(default_factory=dict)
    grammar: str = ""

    @property
    def stops(self) -> tuple[str, ...]:
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(found) > MOST_STOPS:
            raise bad(f"'stop' may hold {MOST_STOPS} strings.", "stop")
        return tuple(end for end in found if end)

    @property
    def biases(self) -> dict[int, float]:
        if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in self.logit_bias):
            raise bad("The keys of 'logit_bias' are ids of tokens.", "logit_bias")
        return {int(key): value for key, value in self.logit_bias.items()}


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Called(Strict):
    name: str
    arguments: str


class Call(Strict):
    id: str
    type: Literal["function"] = "function"
    function: Called


class Turn(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[Call] = Field(default_factory=list)
    tool_call_id: str | None = None
    refusal: None = None


class Function(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool = False


class Tool(Strict):
    type: Literal["function"]
    function: Function


class Named(Strict):
    name: str


class Choice(Strict):
    type: Literal["function"]
    function: Named


class Schema(Strict):
    name: str = "answer"
    description: str = ""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = True


class Format(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


class Chat(Sampled):
    messages: list[Turn] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    response_format: Format | None = None
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | Choice = "auto"
    parallel_tool_calls: bool = True


class Completion(Sampled):
    prompt: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1)]
    max_tokens: int = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt  # type: ignore[list-item, return-value]


class Embedding(Strict):
    model: str
    input: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        one = isinstance(self.input, str) or isinstance(self.input[0], int)
        return [self.input] if one else self.input  # type: ignore[list-item, return-value]


Asked = TypeVar("Asked", bound=BaseModel)


def read(kind: type[Asked], body: Mapping[str, Any]) -> Asked:
    """The request that a body is. null is as if the field were not there. Raises Refusal (400) naming the field."""
    given = {name: value for name, value in body.items() if value is not None and name not in HARMLESS}
    for name, fine in REFUSED.items():
        if name in given and given.pop(name) not in fine:
            raise bad(f"'{name}' is not supported by this server.", name, "unsupported_parameter")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _told(kind, error) from None


def _told(kind: type[BaseModel], error: ValidationError) -> Refusal:
    """What is wrong with the first field that is; of a union, whose sides all report, the one that went furthest."""
    all_found = error.errors(include_url=False, include_context=False)
    here = [one for one in all_found if one["loc"][:1] == all_found[0]["loc"][:1]]
    found = max(here, key=lambda one: _depth(one["loc"]))
    path = ".".join(str(part) for part in found["loc"] if isinstance(part, int) or part.isidentifier())[:100]
    if found["type"] == "extra_forbidden":
        near = did_you_mean(str(found["loc"][-1])[:60], kind.model_fields) if len(found["loc"]) == 1 else ""
        return bad(f"Unknown parameter: '{path}'.{near}", path, "unknown_parameter")
    if found["type"] == "missing":
        return bad(f"Missing required parameter: '{path}'.", path, "missing_required_parameter")
    return bad(f"Invalid value for '{path}': {found['msg']}.", path, "invalid_value")


def _depth(place: tuple[Any, ...]) -> int:
    return sum(isinstance(part, int) for part in place)
