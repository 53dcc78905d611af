"""Judgements on disk, each written as it comes, so that a killed evaluation goes on where it stopped.

One SQLite file in WAL mode: a judgement is there or it is not, whatever is killed when. Several threads and processes
may use one file at the same time. (After a power cut the last few may be missing; none is ever half there.)
"""

import hashlib
import sqlite3
import threading
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from hypersteer_jax.config import ConfigError

PATIENCE = 60.0  # seconds to wait for another writer
SCHEMA = """
CREATE TABLE IF NOT EXISTS judgements (
    judge TEXT NOT NULL,
    question TEXT NOT NULL,
    prompt_hash TEXT NOT NULL,
    text_hash TEXT NOT NULL,
    reply TEXT NOT NULL,
    score REAL,
    failed INTEGER NOT NULL,
    PRIMARY KEY (judge, prompt_hash, text_hash)
) STRICT, WITHOUT ROWID
"""
# A failure may be replaced, a score never: another process may have had more luck.
PUT = """
INSERT INTO judgements VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET reply = excluded.reply, score = excluded.score, failed = excluded.failed WHERE failed
"""


class CacheError(ConfigError):
    """The file is not a cache of judgements; the message names it."""


class Key(NamedTuple):
    """What was asked about which text."""

    prompt_hash: str
    text_hash: str


class Rating(NamedTuple):
    """One answer of a judge to one question about one text."""

    score: float | None  # 0 to 2; None: the judge failed
    reply: str  # as it came, or what went wrong


def make_key(prompt: str, text: str) -> Key:
    """Key of a prompt about a text: the SHA-256 of each."""
    digests = (hashlib.sha256(part.encode("utf-8", "surrogatepass")).hexdigest() for part in (prompt, text))
    return Key(*digests)


class Cache:
    """The judgements of one file, which is made if it is not there."""

    def __init__(self, path: Path):
        """Opens the file.

        Raises:
            CacheError: it holds something else, or cannot be written.
        """
        self.path, self._lock = path, threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, PATIENCE, isolation_level=None, check_same_thread=False)
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = NORMAL")
                self._connection.execute(SCHEMA)
                self._connection.execute("SELECT judge, question, score, failed FROM judgements LIMIT 0")
            except sqlite3.Error:
                self._connection.close()
                raise
        except (sqlite3.Error, OSError) as error:
            raise CacheError(f"{path} is not a cache of judgements: {error}; name another file") from error

    def scores(self, judge: str) -> dict[Key, float | None]:
        """All scores of a judge; None is a failure."""
        with self._lock:
            query = "SELECT prompt_hash, text_hash, score FROM judgements WHERE judge = ?"
            return {Key(*row[:2]): row[2] for row in self._connection.execute(query, (judge,))}

    def reply(self, judge: str, key: Key) -> str | None:
        """The raw reply; None if there is none."""
        with self._lock:
            query = "SELECT reply FROM judgements WHERE judge = ? AND prompt_hash = ? AND text_hash = ?"
            row = self._connection.execute(query, (judge, *key)).fetchone()
        return None if row is None else row[0]

    def put(self, judge: str, question: str, key: Key, rating: Rating) -> None:
        """Writes one judgement; it is on disk when this returns."""
        with self._lock:
            row = (judge, question, *key, rating.reply, rating.score, rating.score is None)
            self._connection.execute(PUT, row)

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
