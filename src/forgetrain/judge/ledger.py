"""The ledger: every attempt, candidate, verdict, timing sample and election, in one SQLite file.

    with Ledger(Path("runs/ledger")) as ledger:
        target = ledger.add_target(target)
        attempt = ledger.begin_attempt(target, proposer="catalogue")
        candidate = ledger.add_candidate(target, source, parent=champion, attempt=attempt)
        judging = ledger.begin_judging(target, candidate, environment=environment)
        ledger.add_verdicts(judging, verdicts)
        ledger.end_judging(judging, passed=True, sandboxed=True)
        ledger.end_attempt(attempt, "accepted", seconds=4.2)

Each call is one durable transaction, and each row has a key that its caller or its content decides, so that a process
that is killed loses nothing, and one that repeats a call counts nothing twice. Times are wall-clock seconds for
people; order is the order of insertion, because clocks step back. Files are kept beside it by content (files.py).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from forgetrain.errors import UserError
from forgetrain.gates.verdict import Verdict
from forgetrain.judge.files import Files
from forgetrain.judge.schema import ADDED, SCHEMA, SCHEMA_VERSION
from forgetrain.spec.target import Target

_ADD_SAMPLE = "INSERT OR IGNORE INTO samples VALUES (?, ?, ?, ?, ?, ?)"
#: The election of a target's champion.
_STANDING = (
    "SELECT * FROM elections WHERE target = ? AND number NOT IN (SELECT election FROM depositions) "
    "ORDER BY number DESC LIMIT 1"
)


@dataclass(frozen=True)
class Spent:
    """What a target's attempts have cost so far, those that were cut off included."""

    attempts: int
    seconds: float
    tokens: int
    dollars: float


def target_key(target: Target) -> str:
    """The hash of all that a target's engines depend on, so that a larger budget for the search goes on with the same
    attempts."""
    return key_of_plain(target.plain())


def key_of_plain(plain: Mapping[str, Any]) -> str:
    """The same, of a target as a provenance has it."""
    return hashlib.sha256(_described(plain).encode()).hexdigest()


def _described(plain: Mapping[str, Any]) -> str:
    sections = {name: value for name, value in plain.items() if name not in ("search", "train")}
    return json.dumps(sections, sort_keys=True)


def _options(options: Mapping[str, Any] | None) -> str:
    return json.dumps(dict(options or {}), sort_keys=True)


class Ledger:
    """One connection to ``folder/ledger.sqlite``, made when it is not there.

    Args:
        busy: seconds to wait for another process's transaction.

    Raises:
        UserError: the file is locked for longer than that, is no ledger, or was made by a newer version.
        OSError: no space left.
    """

    def __init__(self, folder: Path, *, busy: float = 10.0, create: bool = True):
        self.path = folder / "ledger.sqlite"
        if not create and not self.path.is_file():
            raise UserError("no ledger here", file=folder, remedy="forgetrain judge or forge makes one")
        self.files = Files(folder / "files")
        self._busy = busy
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=busy, isolation_level=None)
        except (NotADirectoryError, FileExistsError, PermissionError, sqlite3.OperationalError) as error:
            raise UserError(f"cannot be opened: {error}", file=self.path, remedy="name another --runs folder") from None
        self._connection.row_factory = sqlite3.Row
        try:
            self._set_modes()
            with self._transaction():
                self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def _set_modes(self) -> None:
        """WAL, so that readers and a writer do not wait for each other; FULL, so that what was told survives a power
        cut. Turning WAL on does not wait for a lock by itself, as everything else does."""
        deadline = time.monotonic() + self._busy
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = FULL")
                self._connection.execute("PRAGMA foreign_keys = ON")
                return
            except sqlite3.DatabaseError as error:
                busy = getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
                if not busy or time.monotonic() >= deadline:
                    self._translate(error)
                time.sleep(0.01)

    def _prepare(self) -> None:
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise UserError(f"was made by a newer version ({version})", file=self.path, remedy="update forgetrain")
        if version == 0:
            if self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise UserError("is an SQLite file of something else", file=self.path, remedy="name another folder")
            for statement in SCHEMA.split(";"):
                self._connection.execute(statement)
            version = 1
        for number in range(version + 1, SCHEMA_VERSION + 1):
            for statement in ADDED[number].split(";"):
                self._connection.execute(statement)
        self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        except sqlite3.DatabaseError as error:
            self._translate(error)

    def _translate(self, error: sqlite3.DatabaseError) -> NoReturn:
        """The errors that a user can do something about, in words; everything else is this program's fault."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise UserError(
                f"is locked by another process for more than {self._busy:g} s",
                file=self.path,
                remedy="wait until it has ended, or end it",
            ) from None
        if code == sqlite3.SQLITE_FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path)) from None
        if code == sqlite3.SQLITE_IOERR:  # a file-size limit, a spent quota, a disk that breaks
            raise UserError(
                f"cannot be read or written: {error}",
                file=self.path,
                remedy="see whether the disk is full or broken, then run the command again; what was told is kept",
            ) from None
        if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            raise UserError(f"is no ledger: {error}", file=self.path, remedy="restore it, or move it away") from None
        if code == sqlite3.SQLITE_READONLY:
            raise UserError("cannot be written", file=self.path, remedy="make it writable, or copy it") from None
        raise error

    # Writing

    def add_target(self, target: Target) -> str:
        """Returns the target's key."""
        key, plain = target_key(target), _described(target.plain())
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO targets VALUES (?, ?, ?, ?)", (key, target.name, plain, time.time()))
        return key

    def add_golden(self, target: str, digest: str, path: Path, environment: Mapping[str, Any]) -> None:
        row = (digest, target, str(path), json.dumps(dict(environment)), time.time())
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO goldens VALUES (?, ?, ?, ?, ?)", row)

    def begin_attempt(self, target: str, *, proposer: str, id: str | None = None) -> str:
        """Counts an attempt before it costs anything; the same ``id`` counts once. Returns the id."""
        key = id or uuid.uuid4().hex
        row = (key, target, proposer, time.time())
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO attempts (id, target, proposer, began) VALUES (?, ?, ?, ?)", row)
        return key

    def spend(self, attempt: str, *, seconds: float = 0.0, tokens: int = 0, dollars: float = 0.0) -> None:
        """Sets what an attempt has cost until now; totals, not increments, so that repeating it adds nothing."""
        with self._transaction() as db:
            db.execute(
                "UPDATE attempts SET seconds = max(seconds, ?), tokens = max(tokens, ?), dollars = max(dollars, ?) "
                "WHERE id = ?",
                (seconds, tokens, dollars, attempt),
            )

    def end_attempt(self, attempt: str, outcome: str, *, reason: str = "", seconds: float = 0.0) -> None:
        """``outcome``: accepted, rejected, failed (no candidate came out), or interrupted. The first ending stays."""
        with self._transaction() as db:
            db.execute(
                "UPDATE attempts SET outcome = ?, reason = ?, seconds = max(seconds, ?), ended = ? "
                "WHERE id = ? AND outcome IS NULL",
                (outcome, reason, seconds, time.time(), attempt),
            )

    def add_candidate(
        self,
        target: str,
        source: bytes,
        *,
        proposer: str = "submit",
        message: str = "",
        parent: str | None = None,
        diff: str = "",
        attempt: str | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> str:
        """Keeps a candidate's source and further files, and returns its content hash, its name from now on.

        The same source for the same target is the same candidate; it keeps its first parent, diff and message."""
        digest = self.files.add(source)
        names = {name: self.files.add(content) for name, content in {"engine.py": source, **(files or {})}.items()}
        row = (target, digest, parent, self.files.add(diff.encode()) if diff else None, proposer, message)
        with self._transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO candidates (target, hash, parent, diff, proposer, message, files, added) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*row, json.dumps(names), time.time()),
            )
            if attempt is not None:
                db.execute("UPDATE attempts SET candidate = ? WHERE id = ?", (digest, attempt))
        return digest

    def begin_judging(
        self,
        target: str,
        candidate: str,
        *,
        environment: Mapping[str, Any],
        purpose: str = "gates",
        options: Mapping[str, Any] | None = None,
        id: str | None = None,
    ) -> str:
        """``purpose``: gates, part (of the gates), confirmation, verification of the champion again, aligned, or hand
        (``forgetrain judge``: no part of the forging). ``options``: what it was asked for, where one that was cut off
        can be gone on with. Returns the judging's id."""
        key = id or uuid.uuid4().hex
        row = (key, target, candidate, purpose, json.dumps(dict(environment)), time.time(), _options(options))
        with self._transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO judgings (id, target, candidate, purpose, environment, began, options) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                row,
            )
        return key

    def unfinished(
        self, target: str, candidate: str, *, environment: Mapping[str, Any], purpose: str, options: Mapping[str, Any]
    ) -> tuple[str, list[Verdict]] | None:
        """The latest such judging, if it was cut off, with the verdicts it had reached; None if there is none, or it
        has ended: what one before it had reached does not count any more."""
        rows = self.query(
            "SELECT id, ended FROM judgings WHERE target = ? AND candidate = ? AND environment = ? AND purpose = ? "
            "AND options = ? ORDER BY number DESC LIMIT 1",
            (target, candidate, json.dumps(dict(environment)), purpose, _options(options)),
        )
        if not rows or rows[0]["ended"] is not None:
            return None
        found = self.query("SELECT * FROM verdicts WHERE judging = ? ORDER BY rowid", (rows[0]["id"],))
        return rows[0]["id"], [Verdict.from_dict({**row, "detail": json.loads(row["detail"])}) for row in found]

    def add_verdicts(
        self, judging: str, verdicts: Iterable[Verdict], samples: Iterable[tuple[str, str, int, int, float]] = ()
    ) -> None:
        """All of them, with the timing ``samples`` that some are of, or none. A gate judges once in a judging: the
        first verdict stays."""
        rows = [
            (
                *(judging, v.gate, v.passed, v.statistic, v.threshold, v.margin, v.first_divergence),
                *(json.dumps(v.detail, default=str), v.explanation, v.sandboxed, time.time()),
            )
            for v in verdicts
        ]
        with self._transaction() as db:
            db.executemany("INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
            db.executemany(_ADD_SAMPLE, [(judging, *row) for row in samples])

    def add_samples(self, judging: str, rows: Iterable[tuple[str, str, int, int, float]]) -> None:
        """Timing samples: (run, engine, block, step, seconds)."""
        with self._transaction() as db:
            db.executemany(_ADD_SAMPLE, [(judging, *row) for row in rows])

    def end_judging(self, judging: str, *, passed: bool, sandboxed: bool) -> None:
        with self._transaction() as db:
            db.execute(
                "UPDATE judgings SET passed = ?, sandboxed = ?, ended = ? WHERE id = ? AND ended IS NULL",
                (passed, sandboxed, time.time(), judging),
            )

    def elect(
        self, judging: str, *, ratio: float | None = None, low: float | None = None, high: float | None = None
    ) -> None:
        """Makes the judged candidate its target's champion; ``ratio`` of speeds is the confirmation run's.

        Raises ValueError when the judging has not ended with every gate passed."""
        with self._transaction() as db:
            row = db.execute("SELECT target, candidate, passed FROM judgings WHERE id = ?", (judging,)).fetchone()
            if row is None or not row["passed"]:
                raise ValueError(f"judging {judging} did not pass")
            db.execute(
                "INSERT OR IGNORE INTO elections (target, candidate, judging, ratio, low, high, added) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (row["target"], row["candidate"], judging, ratio, low, high, time.time()),
            )

    def depose(self, judging: str) -> None:
        """Takes back the election of the judged champion, who failed: the champion before it is champion again.

        Raises ValueError when the judging passed or has not ended, or judged no champion."""
        with self._transaction() as db:
            row = db.execute("SELECT target, candidate, passed FROM judgings WHERE id = ?", (judging,)).fetchone()
            if row is None or row["passed"] is None or row["passed"]:
                raise ValueError(f"judging {judging} did not fail")
            if db.execute("SELECT 1 FROM depositions WHERE judging = ?", (judging,)).fetchone():
                return
            champion = db.execute(_STANDING, (row["target"],)).fetchone()
            if champion is None or champion["candidate"] != row["candidate"]:
                raise ValueError(f"judging {judging} is not the champion's")
            db.execute("INSERT INTO depositions VALUES (?, ?, ?)", (judging, champion["number"], time.time()))

    def add_profile(
        self, target: str, candidate: str, *, environment: Mapping[str, Any], profile: Mapping[str, Any]
    ) -> None:
        """Where a candidate's time went in an environment (forge/profile.py); the first profile stays."""
        row = (target, candidate, json.dumps(dict(environment)), json.dumps(dict(profile)), time.time())
        with self._transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO profiles (target, candidate, environment, profile, added) "
                "VALUES (?, ?, ?, ?, ?)",
                row,
            )

    def end_interrupted(self, target: str) -> list[str]:
        """Ends the attempts and judgings that a kill cut off; to be called by the one loop that owns the target. A
        judging by hand is nobody's but its own.

        Returns the ids of those attempts. They count, with what they had cost."""
        with self._transaction() as db:
            rows = db.execute("SELECT id FROM attempts WHERE target = ? AND outcome IS NULL", (target,)).fetchall()
            db.execute(
                "UPDATE attempts SET outcome = 'interrupted', ended = ? WHERE target = ? AND outcome IS NULL",
                (time.time(), target),
            )
            db.execute(
                "UPDATE judgings SET passed = 0, ended = ? WHERE target = ? AND ended IS NULL AND purpose != 'hand'",
                (time.time(), target),
            )
        return [row["id"] for row in rows]

    # Reading

    def query(self, sql: str, values: Iterable[Any] = ()) -> list[dict[str, Any]]:
        """Rows of a SELECT, as dicts."""
        try:
            return [dict(row) for row in self._connection.execute(sql, tuple(values))]
        except sqlite3.DatabaseError as error:
            self._translate(error)

    def spent(self, target: str) -> Spent:
        row = self.query(
            "SELECT count(*) AS attempts, total(seconds) AS seconds, sum(tokens) AS tokens, total(dollars) AS dollars "
            "FROM attempts WHERE target = ?",
            (target,),
        )[0]
        return Spent(row["attempts"], row["seconds"], row["tokens"] or 0, row["dollars"])

    def champion(self, target: str) -> dict[str, Any] | None:
        """The row (candidate, judging, ratio, low, high) of the latest election that stands, or None."""
        rows = self.query(_STANDING, (target,))
        return rows[0] if rows else None

    def candidate(self, prefix: str, target: str | None = None) -> dict[str, Any]:
        """The candidate whose hash begins so. Raises UserError when there is none, or more than one."""
        rows = self.query(
            "SELECT * FROM candidates WHERE substr(hash, 1, ?) = ? AND (?3 IS NULL OR target = ?3) ORDER BY number",
            (len(prefix), prefix, target),
        )
        if len({row["hash"] for row in rows}) != 1 or not prefix:
            problem = "several candidates begin so" if rows else "no such candidate"
            raise UserError(problem, file=self.path, value=prefix, remedy="see forgetrain ledger list")
        return {**rows[-1], "files": json.loads(rows[-1]["files"])}

    def candidates(self, target: str | None = None) -> list[dict[str, Any]]:
        """Every candidate in order, with its last judging: passed (None before it), and the gates that failed. One by
        hand counts when it has ended."""
        return self.query(
            """
            SELECT c.number, t.name AS target, c.hash, c.parent, c.proposer, c.message,
                j.passed, j.sandboxed, j.purpose,
                (SELECT group_concat(gate, ' ') FROM verdicts WHERE judging = j.id AND NOT pass) AS failed,
                (SELECT max(ratio) FROM elections WHERE target = c.target AND candidate = c.hash) AS elected_ratio,
                EXISTS (SELECT 1 FROM elections WHERE target = c.target AND candidate = c.hash) AS elected, c.added
            FROM candidates c JOIN targets t ON t.hash = c.target
            LEFT JOIN judgings j ON j.number =
                (SELECT max(number) FROM judgings WHERE target = c.target AND candidate = c.hash
                    AND (purpose != 'hand' OR ended IS NOT NULL))
            WHERE ?1 IS NULL OR c.target = ?1 OR t.name = ?1 ORDER BY c.number
            """,
            (target,),
        )

    def verdicts(self, candidate: str, target: str | None = None) -> list[dict[str, Any]]:
        """All verdicts of a candidate, for this target where one is named, oldest judging first."""
        rows = self.query(
            "SELECT v.*, j.purpose FROM verdicts v JOIN judgings j ON j.id = v.judging "
            "WHERE j.candidate = ?1 AND (?2 IS NULL OR j.target = ?2) ORDER BY j.number, v.gate",
            (candidate, target),
        )
        return [{**row, "detail": json.loads(row["detail"])} for row in rows]

    def profile(self, target: str, candidate: str, environment: Mapping[str, Any] | None = None) -> dict | None:
        """The candidate's latest profile, in this environment where one is named; None before there is one."""
        rows = self.query(
            "SELECT profile FROM profiles WHERE target = ?1 AND candidate = ?2 AND (?3 IS NULL OR environment = ?3) "
            "ORDER BY number DESC LIMIT 1",
            (target, candidate, None if environment is None else json.dumps(dict(environment))),
        )
        return json.loads(rows[0]["profile"]) if rows else None

    def lineage(self, candidate: str) -> list[dict[str, Any]]:
        """The candidate and its ancestors, itself first."""
        seen: list[dict[str, Any]] = []
        key: str | None = self.candidate(candidate)["hash"]
        while key is not None and key not in {row["hash"] for row in seen}:
            rows = self.query("SELECT * FROM candidates WHERE hash = ? ORDER BY number LIMIT 1", (key,))
            if not rows:
                break
            seen += rows
            key = rows[0]["parent"]
        return seen

    @contextlib.contextmanager
    def claim(self, name: str, what: str = "") -> Iterator[None]:
        """Held by the one process that works on a target, or judges a file, whatever kills it. Raises UserError when
        another holds it, which calls it ``what``, or by its name."""
        path = self.path.parent / f"{name}.lock"
        with open(path, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(
                    f"another process ({file.read().strip() or 'unknown'}) works on {what or name}",
                    file=path,
                    remedy="wait for it, end it, or use another --runs folder",
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield
