import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hypersteer_jax.evaluation.cache import Cache, CacheError, Key, Rating, make_key


def test_what_is_put_is_there_after_reopening(tmp_path: Path) -> None:
    path, one, other = tmp_path / "new" / "folder" / "c.sqlite", make_key("prompt", "text"), make_key("prompt", "other")
    with Cache(path) as cache:
        cache.put("judge", "concept", one, Rating(1.5, "Rating: 1.5"))
        cache.put("judge", "concept", other, Rating(None, "no idea"))
        cache.put("another judge", "concept", one, Rating(0.0, "Rating: 0"))
    with Cache(path) as cache:
        assert cache.scores("judge") == {one: 1.5, other: None}
        assert cache.scores("another judge") == {one: 0.0}
        assert cache.scores("nobody") == {}
        assert cache.reply("judge", other) == "no idea"
        assert cache.reply("nobody", other) is None


def test_each_judgement_is_a_row_of_its_own_that_others_see_at_once(tmp_path: Path) -> None:
    with Cache(tmp_path / "c.sqlite") as cache, sqlite3.connect(tmp_path / "c.sqlite") as other:
        key = make_key("prompt", "text")
        cache.put("judge", "fluency", key, Rating(None, "?"))
        rows = other.execute("SELECT * FROM judgements").fetchall()
        assert rows == [("judge", "fluency", *key, "?", None, 1)]
    other.close()


def test_a_failure_gives_way_and_a_score_does_not(tmp_path: Path) -> None:
    key = make_key("prompt", "text")
    with Cache(tmp_path / "c.sqlite") as cache:
        for rating in (Rating(None, "bad"), Rating(None, "worse"), Rating(2.0, "good"), Rating(None, "late")):
            cache.put("judge", "concept", key, rating)
        assert cache.scores("judge") == {key: 2.0}
        assert cache.reply("judge", key) == "good"


def test_keys_differ_with_prompt_and_text() -> None:
    keys = {make_key(prompt, text) for prompt in ("a", "b", "") for text in ("a", "b", "", "\ud800")}
    assert len(keys) == 12
    assert all(len(part) == 64 for key in keys for part in key)


def test_threads_and_connections_write_at_the_same_time(tmp_path: Path) -> None:
    def write(cache: Cache, writer: int) -> None:
        for row in range(50):
            cache.put("judge", "concept", Key(f"{writer}", f"{row}"), Rating(1.0, "x"))

    caches = [Cache(tmp_path / "c.sqlite") for _ in range(3)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda writer: write(caches[writer % 3], writer), range(6)))
    assert all(len(cache.scores("judge")) == 300 for cache in caches)
    for cache in caches:
        cache.close()


def test_another_file_is_named_and_left_alone(tmp_path: Path) -> None:
    text, other = tmp_path / "notes.txt", tmp_path / "other.sqlite"
    text.write_text("not a database, " * 100)
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE judgements (name TEXT)")
    connection.close()
    for path in (text, other, tmp_path):
        with pytest.raises(CacheError, match=f"{path.name} is not a cache of judgements"):
            Cache(path)
    assert text.read_text() == "not a database, " * 100
