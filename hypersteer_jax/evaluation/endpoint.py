"""Chat endpoints that speak OpenAI's protocol: many prompts at once, retries, and what they cost.

    preview = check_cost(endpoint, prompts, max_cost=5.0)  # raises before anything is paid
    for index, reply in ask_all(endpoint, prompts, max_cost=5.0):  # as they come, in any order
        ...

A call that fails after all its retries is a reply that says so; what would fail for every call (a wrong key, a wrong
URL, a server that is down) stops everything.
"""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import islice
from operator import length_hint
from threading import Event
from typing import NamedTuple

import openai
import tenacity
from openai.types.chat import ChatCompletion

from hypersteer_jax.config import ConfigError

OPENAI = "https://api.openai.com/v1"
FIRST_WAIT, LONGEST_WAIT = 1.0, 120.0  # seconds between tries: doubled each time, or what Retry-After says
DOWN = 20  # calls that fail in a row before the endpoint is given up
BYTES_PER_TOKEN = 3  # of a prompt not sent yet; English has 4 to 5 bytes a token, so that the estimate is high


class EndpointError(ConfigError):
    """The endpoint cannot be used, or would cost more than allowed; the message names the setting and the fix."""


class Price(NamedTuple):
    """Dollars per million tokens."""

    prompt: float
    completion: float
    date: str  # when it was the price


# The price at which the model was announced; whoever pays another price gives it.
PRICES = {"gpt-4o-mini-2024-07-18": Price(0.15, 0.60, "2024-07-18")}


class Endpoint(NamedTuple):
    """Where to send prompts, and how."""

    model: str
    base_url: str = OPENAI
    key_variable: str | None = None  # environment variable with the key; None: OPENAI_API_KEY at OpenAI, else no key
    temperature: float = 0.0
    max_tokens: int = 512  # of a reply
    price: Price | None = None  # None: as in `PRICES`, if it is there
    workers: int = 16  # calls at the same time
    timeout: float = 60.0  # seconds for one try
    tries: int = 6  # of one call

    @property
    def known_price(self) -> Price | None:
        """The price given, or else the table's."""
        return self.price or PRICES.get(self.model)


class Reply(NamedTuple):
    """What came back for one prompt."""

    text: str  # the model's words, or what went wrong
    failed: bool
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Preview(NamedTuple):
    """What a run would cost at most: every reply as long as it may be."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    dollars: float | None  # None: no price is known
    price: Price | None

    def __str__(self) -> str:
        """One line."""
        tokens = f"{self.prompt_tokens:,} prompt tokens (estimated), {self.completion_tokens:,} reply tokens at most"
        if self.price is None or self.dollars is None:
            return f"{self.calls:,} calls, {tokens}; price unknown"
        prices = f"{self.price.prompt:g} and {self.price.completion:g} dollars per million, {self.price.date}"
        return f"{self.calls:,} calls, {tokens}: {self.dollars:.2f} dollars at most ({prices})"


def preview(endpoint: Endpoint, prompts: Sequence[str]) -> Preview:
    """Calls, tokens and dollars of a run, before it."""
    tokens = sum(map(_estimated_tokens, prompts))
    completion = len(prompts) * endpoint.max_tokens
    price = endpoint.known_price
    dollars = None if price is None else _dollars(price, tokens, completion)
    return Preview(len(prompts), tokens, completion, dollars, price)


def check_cost(endpoint: Endpoint, prompts: Sequence[str], max_cost: float | None) -> Preview:
    """The preview of a run that may cost `max_cost` dollars; None allows anything.

    Raises:
        EndpointError: it may cost more, or no price is known.
    """
    found = preview(endpoint, prompts)
    if max_cost is None or not prompts:
        return found
    if found.dollars is None:
        raise EndpointError(f"max_cost is {max_cost:g} and the price of {endpoint.model} is not known; give the price")
    if found.dollars > max_cost:
        raise EndpointError(f"max_cost is {max_cost:g} dollars and this is {found}; raise it or ask for less")
    return found


def ask_all(endpoint: Endpoint, prompts: Sequence[str], max_cost: float | None = None) -> Iterator[tuple[int, Reply]]:
    """Index and reply of every prompt, as they come.

    A call begins only when fewer than `endpoint.workers` replies are not read yet, so that a reader who writes each one
    down loses no more than that when killed. Whoever stops reading stops the calls; those under way are waited for.

    Args:
        endpoint: where to send them.
        prompts: each is one user turn.
        max_cost: dollars, by the tokens that the endpoint reports; a few calls more may be under way by then.

    Raises:
        EndpointError: no key, wrong key or URL, no quota, `DOWN` failures in a row, or `max_cost` is reached.
    """
    key, stop = _key(endpoint), Event()
    price, spent, in_a_row = endpoint.known_price, 0.0, 0
    client = openai.OpenAI(base_url=endpoint.base_url, api_key=key, max_retries=0, timeout=endpoint.timeout)
    rows, calls = iter(range(len(prompts))), dict[Future[Reply], int]()
    with client, ThreadPoolExecutor(endpoint.workers) as pool:
        try:
            while True:
                for row in islice(rows, endpoint.workers - len(calls)):
                    calls[pool.submit(_ask, client, endpoint, prompts[row], stop)] = row
                if not calls:
                    return
                call = next(as_completed(calls))
                reply = call.result()
                yield calls[call], reply
                del calls[call]
                in_a_row = in_a_row + 1 if reply.failed else 0
                if in_a_row == DOWN:
                    raise EndpointError(f"{endpoint.base_url}: {DOWN} calls in a row failed, the last: {reply.text}")
                if price is not None:
                    spent += _dollars(price, reply.prompt_tokens, reply.completion_tokens)
                if max_cost is not None and spent >= max_cost and (calls or length_hint(rows)):
                    raise EndpointError(
                        f"max_cost is {max_cost:g} dollars and {spent:.2f} are spent; raise it to go on"
                    )
        finally:
            stop.set()  # ends the waits between tries


class _UnreadableError(Exception):
    """An answer that is not a chat completion."""


UNREADABLE = (json.JSONDecodeError, UnicodeDecodeError, _UnreadableError)


def _ask(client: openai.OpenAI, endpoint: Endpoint, prompt: str, stop: Event) -> Reply:
    """One call with its retries."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_pass),
        wait=_wait,
        stop=tenacity.stop_any(tenacity.stop_after_attempt(endpoint.tries), tenacity.stop_when_event_set(stop)),
        sleep=tenacity.sleep_using_event(stop),
        reraise=True,
    )
    try:
        return retrying(_try, client, endpoint, prompt)
    except (openai.AuthenticationError, openai.NotFoundError) as error:
        raise EndpointError(
            f"{endpoint.base_url} refuses model {endpoint.model}: {error}; check model, key and URL"
        ) from error
    except (openai.OpenAIError, *UNREADABLE) as error:
        if _no_quota(error):
            raise EndpointError(f"{endpoint.base_url}: the account has no quota left: {error}; top it up") from error
        return Reply(f"{type(error).__name__}: {error}", failed=True)


def _try(client: openai.OpenAI, endpoint: Endpoint, prompt: str) -> Reply:
    answer = client.chat.completions.create(
        model=endpoint.model,
        messages=[{"role": "user", "content": prompt}],
        temperature=endpoint.temperature,
        max_tokens=endpoint.max_tokens,
    )
    if not isinstance(answer, ChatCompletion) or not answer.choices or answer.choices[0].message is None:
        raise _UnreadableError(f"not a chat completion with a choice: {str(answer)[:200]!r}")
    text, usage = answer.choices[0].message.content, answer.usage
    counts = (_estimated_tokens(prompt), endpoint.max_tokens)
    if usage is not None:
        counts = (usage.prompt_tokens, usage.completion_tokens)
    if not text:
        return Reply(f"no text, finish_reason {answer.choices[0].finish_reason!r}", True, *counts)
    return Reply(text, False, *counts)


def _may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    if isinstance(error, openai.APIStatusError):
        return (error.status_code in (408, 409, 429) or error.status_code >= 500) and not _no_quota(error)
    return isinstance(error, (openai.APIConnectionError, *UNREADABLE))


def _no_quota(error: Exception) -> bool:
    return isinstance(error, openai.RateLimitError) and error.code == "insufficient_quota"


def _wait(state: tenacity.RetryCallState) -> float:
    """Seconds until the next try: what the server asks for, or a random time that doubles with each try."""
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.response.headers.get("retry-after", "") if isinstance(error, openai.APIStatusError) else ""
    backoff = tenacity.wait_random_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT)(state)
    return min(LONGEST_WAIT, max(backoff, _seconds(asked)))


def _seconds(retry_after: str) -> float:
    """Retry-After as seconds from now; it holds seconds or a date (RFC 9110, section 10.2.3)."""
    try:
        return float(retry_after)
    except ValueError:
        pass
    try:
        return (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):  # no date, or one without a time zone
        return 0.0


def _key(endpoint: Endpoint) -> str:
    """The key; OpenAI's own is never sent elsewhere unasked."""
    variable = endpoint.key_variable or ("OPENAI_API_KEY" if endpoint.base_url == OPENAI else None)
    if variable is None:
        return "none"  # the client wants one
    key = os.environ.get(variable)
    if not key:
        raise EndpointError(f"{variable} is not set; {endpoint.base_url} needs a key in this environment variable")
    return key


def _estimated_tokens(text: str) -> int:
    return -(-len(text.encode()) // BYTES_PER_TOKEN)


def _dollars(price: Price, prompt_tokens: int, completion_tokens: int) -> float:
    return (price.prompt * prompt_tokens + price.completion * completion_tokens) / 1e6
