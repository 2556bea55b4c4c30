"""What OpenAI's clients send and read: requests, answers, pieces of answers, errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

from commandv.errors import InputError
from commandv.serving.logprobs import MOST_TOP, Told

MOST_CHOICES = 16  # answers to one request
MOST_STOPS = 4

# Fields that change no answer; and fields that do, with the values at which they would not.
_IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "verbosity",
)  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "web_search_options": (None,),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Strict):
    """What a stream holds beside pieces."""

    include_usage: bool = Field(False, strict=True)
    include_obfuscation: bool = Field(False, strict=True)


class Asked(_Strict):
    """What requests of both kinds say."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2, strict=True)
    top_p: float = Field(1.0, gt=0, le=1, strict=True)
    seed: int | None = Field(None, strict=True)
    stop: str | list[str] | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES, strict=True)
    stream: bool = Field(False, strict=True)
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, neutral in _NEUTRAL.items():
            if name in given and given[name] not in neutral:
                raise ValueError(f"{name} is not supported here; leave it out")
        left_out = {*_IGNORED, *_NEUTRAL}
        nothing = {name for name, value in given.items() if value is None and name in cls.model_fields}
        return {name: value for name, value in given.items() if name not in left_out and name not in nothing}

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts before which an answer ends."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if "" in stops or len(stops) > MOST_STOPS:
            raise InputError(f"stop: {len(stops)} texts, expected at most {MOST_STOPS}, none of them empty")
        return stops


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None

    def said(self) -> dict[str, str]:
        """Return role and text, as chat templates know them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatAsked(Asked):
    """A request to `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, strict=True)
    max_completion_tokens: int | None = Field(None, ge=1, strict=True)
    logprobs: bool = Field(False, strict=True)
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP, strict=True)

    @property
    def limit(self) -> int | None:
        """The longest answer asked for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def n_logprobs(self) -> int | None:
        """Alternatives wanted for each token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TextAsked(Asked):
    """A request to `/v1/completions`."""

    prompt: str | list[str] | list[StrictInt] | list[list[StrictInt]]
    max_tokens: int = Field(16, ge=1, strict=True)
    logprobs: int | None = Field(None, ge=0, le=5, strict=True)

    @property
    def limit(self) -> int:
        """The longest answer asked for."""
        return self.max_tokens

    @property
    def n_logprobs(self) -> int | None:
        """Alternatives wanted for each token; None for no log-probabilities."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Return each prompt, as text or as tokens."""
        given = self.prompt
        single = isinstance(given, str) or (given and isinstance(given[0], int))
        many: list[Any] = [given] if single else list(given)
        if not 1 <= len(many) * self.n <= 8 * MOST_CHOICES:
            raise InputError(f"{len(many)} prompts with n={self.n}: expected 1 to {8 * MOST_CHOICES} answers")
        return many


def usage(n_prompt: int, n_answer: int) -> dict[str, int]:
    """Return what a request cost, in tokens."""
    return {"prompt_tokens": n_prompt, "completion_tokens": n_answer, "total_tokens": n_prompt + n_answer}


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def chat_logprobs(tokenizer: Any, told: Sequence[Told]) -> dict[str, Any]:
    """Return log-probabilities as chat completions tell them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token])
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}

    return {
        "content": [
            {**entry(one.token, one.logprob), "top_logprobs": [entry(*other) for other in one.top]} for one in told
        ],
        "refusal": None,
    }


def text_logprobs(tokenizer: Any, told: Sequence[Told], start: int) -> dict[str, Any]:
    """Return log-probabilities as completions tell them, for text that begins at offset `start` of the answer."""
    texts = [tokenizer.decode([one.token]) for one in told]
    offsets = [start + sum(map(len, texts[:i])) for i in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": [_finite(one.logprob) for one in told],
        "top_logprobs": [
            {tokenizer.decode([token]): _finite(logprob) for token, logprob in one.top} or None for one in told
        ],
        "text_offset": offsets,
    }


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity; this is what OpenAI says of a token that cannot come
