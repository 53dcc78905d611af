"""The client against a server that misbehaves on purpose."""

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

pytest.importorskip("openai", reason="not run: the client of chat endpoints; install the extra [endpoint]")

from hypersteer_jax.evaluation import endpoint as module
from hypersteer_jax.evaluation.endpoint import (
    OPENAI,
    Endpoint,
    EndpointError,
    Price,
    Reply,
    ask_all,
    check_cost,
    preview,
)
from tests.evaluation.server import HANG, Answer, Behaviour, failure, said, serving

GOOD = said("Rating: [[1]]")
REPLY = Reply("Rating: [[1]]", False, 10, 5)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT", 0.001)


def ask(behave: Behaviour, prompts: list[str], **settings) -> tuple[list[Reply], dict[str, int]]:
    """Replies in the order of the prompts, and the server's calls."""
    with serving(behave) as server:
        replies = dict(ask_all(Endpoint("judge", server.url, **{"timeout": 5.0, "tries": 3} | settings), prompts))
    return [replies[row] for row in range(len(prompts))], dict(server.calls)


def test_replies_belong_to_their_prompts() -> None:
    prompts = [f"prompt {row}" for row in range(50)]
    replies, calls = ask(lambda prompt, _: said(prompt.upper()), prompts)
    assert [reply.text for reply in replies] == [prompt.upper() for prompt in prompts]
    assert calls == dict.fromkeys(prompts, 1)


def test_what_is_sent() -> None:
    with serving(lambda *_: GOOD) as server:
        list(ask_all(Endpoint("some-model", server.url, temperature=0.7, max_tokens=9), ["Hello"]))
    [request] = server.requests
    assert request["model"] == "some-model"
    assert request["messages"] == [{"role": "user", "content": "Hello"}]
    assert request["temperature"] == 0.7
    assert request["max_tokens"] == 9


@pytest.mark.parametrize(
    "bad",
    [
        failure(500),
        failure(503),
        failure(429),
        Answer(GOOD.body[:60]),  # whole answer, half a JSON
        GOOD._replace(cut=60),  # the connection breaks
        Answer('{"choices": []}'),
        Answer('{"choices": [{}]}'),
        Answer("null"),
        Answer("[1]"),
    ],
    ids=["500", "503", "429", "truncated JSON", "broken connection", "no choices", "no message", "null", "a list"],
)
def test_what_may_pass_is_tried_again(bad: Answer) -> None:
    assert ask(lambda _, before: bad if before < 2 else GOOD, ["a"]) == ([REPLY], {"a": 3})
    [reply], calls = ask(lambda *_: bad, ["a"])
    assert reply.failed
    assert reply.text
    assert calls == {"a": 3}


def test_a_call_without_an_answer_is_tried_again() -> None:
    assert ask(lambda _, before: HANG if before == 0 else GOOD, ["a"], timeout=0.2) == ([REPLY], {"a": 2})
    [reply], calls = ask(lambda *_: HANG, ["a"], timeout=0.1)
    assert reply.failed
    assert "timed out" in reply.text
    assert calls == {"a": 3}


def test_retry_after_is_obeyed() -> None:
    with serving(lambda _, before: failure(429, retry_after="0.5") if before == 0 else GOOD) as server:
        assert dict(ask_all(Endpoint("judge", server.url), ["a"])) == {0: REPLY}
    (_, first), (_, second) = server.times
    assert second - first >= 0.5


def test_retry_after_as_a_date() -> None:
    then = format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True)
    assert 38 < module._seconds(then) <= 40
    assert module._seconds("3") == 3
    assert module._seconds("") == module._seconds("soon") == module._seconds("Mon, 01 Jan 2035 00:00:00 -0000") == 0


@pytest.mark.parametrize("bad", [failure(400), failure(422), said(None), said("")])
def test_what_will_not_pass_is_asked_once(bad: Answer) -> None:
    replies, calls = ask(lambda prompt, _: bad if prompt == "b" else GOOD, ["a", "b", "c"])
    assert [reply.failed for reply in replies] == [False, True, False]
    assert calls == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (failure(401), "check model, key and URL"),
        (failure(404), "check model, key and URL"),
        (failure(429, code="insufficient_quota"), "no quota left"),
    ],
)
def test_what_fails_for_all_stops_at_once(bad: Answer, message: str) -> None:
    with (
        serving(lambda *_: bad) as server,
        pytest.raises(EndpointError, match=message),
    ):
        list(ask_all(Endpoint("judge", server.url, workers=2), [str(row) for row in range(100)]))
    assert server.calls.total() <= 3


def test_a_server_that_is_down_is_given_up() -> None:
    with serving(lambda *_: GOOD) as server:
        pass
    with pytest.raises(EndpointError, match="20 calls in a row failed, the last: APIConnectionError"):
        list(ask_all(Endpoint("judge", server.url, tries=1), [str(row) for row in range(100)]))


def test_failures_with_answers_between_them_do_not_stop_it() -> None:
    replies, _ = ask(lambda prompt, _: failure(400) if int(prompt) % 4 else GOOD, [str(row) for row in range(80)])
    assert sum(reply.failed for reply in replies) == 60


def test_whoever_stops_reading_stops_the_calls() -> None:
    with serving(lambda *_: GOOD) as server:
        replies = ask_all(Endpoint("judge", server.url, workers=2), [str(row) for row in range(1000)])
        next(replies)
        replies.close()
    assert server.calls.total() <= 3


def test_stopping_ends_the_waits() -> None:
    started = time.monotonic()
    with serving(lambda prompt, _: GOOD if prompt == "a" else failure(429, retry_after="60")) as server:
        replies = ask_all(Endpoint("judge", server.url), ["a", "b"])
        next(replies)
        replies.close()
    assert time.monotonic() - started < 10


def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("MINE", "other")
    with serving(lambda *_: GOOD) as server:
        list(ask_all(Endpoint("judge", server.url), ["a"]))
        list(ask_all(Endpoint("judge", server.url, key_variable="MINE"), ["a"]))
    assert [request["authorization"] for request in server.requests] == ["Bearer none", "Bearer other"]
    assert module._key(Endpoint("gpt", OPENAI)) == "secret"
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(EndpointError, match="OPENAI_API_KEY is not set"):
        list(ask_all(Endpoint("gpt"), ["a"]))


def test_preview_by_hand() -> None:
    found = preview(Endpoint("judge", max_tokens=100, price=Price(2.0, 5.0, "today")), ["x" * 30, "y" * 31])
    assert found == (2, 10 + 11, 200, pytest.approx((21 * 2 + 200 * 5) / 1e6), (2.0, 5.0, "today"))
    assert "2 calls" in str(found)
    assert "today" in str(found)
    unknown = preview(Endpoint("judge"), ["x"])
    assert unknown.dollars is None
    assert "price unknown" in str(unknown)
    dated = preview(Endpoint("gpt-4o-mini-2024-07-18"), ["x"])
    assert "2024-07-18" in str(dated)


def test_a_run_that_may_cost_too_much_is_refused() -> None:
    dear = Endpoint("judge", max_tokens=100, price=Price(0.0, 1e4, "today"))  # a dollar a call
    assert check_cost(dear, ["a", "b"], None).dollars == check_cost(dear, ["a", "b"], 2.0).dollars == 2.0
    with pytest.raises(EndpointError, match=r"max_cost is 1\.9 dollars .* 2\.00 dollars at most"):
        check_cost(dear, ["a", "b"], 1.9)
    with pytest.raises(EndpointError, match="price of judge is not known"):
        check_cost(Endpoint("judge"), ["a"], 1.0)
    assert check_cost(Endpoint("judge"), [], 1.0).calls == 0


def test_a_run_that_turns_out_dearer_is_stopped() -> None:
    read: list[int] = []

    def read_all(endpoint: Endpoint) -> None:
        for row, _ in ask_all(endpoint, [str(row) for row in range(200)], max_cost=3.0):
            read.append(row)

    with serving(lambda *_: said("hm", completion_tokens=100)) as server:
        dear = Endpoint("judge", server.url, price=Price(0.0, 1e4, "today"), workers=2)
        with pytest.raises(EndpointError, match=r"max_cost is 3 dollars and 3\.00 are spent"):
            read_all(dear)
    assert len(read) == 3
    assert server.calls.total() <= 5


def test_without_usage_tokens_are_estimated() -> None:
    plain = Answer(GOOD.body.replace('"usage"', '"used"'))
    [reply], _ = ask(lambda *_: plain, ["x" * 12], max_tokens=7)
    assert reply[2:] == (4, 7)
