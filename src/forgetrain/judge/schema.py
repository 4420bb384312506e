"""The ledger's tables, and how an older ledger gets those that came later."""

from __future__ import annotations

SCHEMA_VERSION = 4
SCHEMA = """
CREATE TABLE targets (
    hash TEXT PRIMARY KEY, name TEXT NOT NULL, plain TEXT NOT NULL, added REAL NOT NULL
);
CREATE TABLE goldens (
    hash TEXT PRIMARY KEY, target TEXT NOT NULL REFERENCES targets, path TEXT NOT NULL,
    environment TEXT NOT NULL, added REAL NOT NULL
);
CREATE TABLE candidates (
    number INTEGER PRIMARY KEY, target TEXT NOT NULL REFERENCES targets, hash TEXT NOT NULL,
    parent TEXT, diff TEXT, proposer TEXT NOT NULL, message TEXT NOT NULL, files TEXT NOT NULL, added REAL NOT NULL,
    UNIQUE (target, hash)
);
CREATE TABLE attempts (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, target TEXT NOT NULL REFERENCES targets,
    candidate TEXT, proposer TEXT NOT NULL, outcome TEXT, reason TEXT NOT NULL DEFAULT '',
    seconds REAL NOT NULL DEFAULT 0, tokens INTEGER NOT NULL DEFAULT 0, dollars REAL NOT NULL DEFAULT 0,
    began REAL NOT NULL, ended REAL
);
CREATE TABLE judgings (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, target TEXT NOT NULL REFERENCES targets,
    candidate TEXT NOT NULL, purpose TEXT NOT NULL, environment TEXT NOT NULL, sandboxed INTEGER,
    passed INTEGER, began REAL NOT NULL, ended REAL
);
CREATE TABLE verdicts (
    judging TEXT NOT NULL REFERENCES judgings (id), gate TEXT NOT NULL, pass INTEGER NOT NULL, statistic REAL,
    threshold REAL, margin REAL, first_divergence TEXT, detail TEXT NOT NULL, explanation TEXT NOT NULL,
    sandboxed INTEGER NOT NULL, added REAL NOT NULL,
    PRIMARY KEY (judging, gate)
);
CREATE TABLE samples (
    judging TEXT NOT NULL REFERENCES judgings (id), run TEXT NOT NULL, engine TEXT NOT NULL, block INTEGER NOT NULL,
    step INTEGER NOT NULL, seconds REAL NOT NULL,
    PRIMARY KEY (judging, run, engine, block, step)
) WITHOUT ROWID;
CREATE TABLE elections (
    number INTEGER PRIMARY KEY, target TEXT NOT NULL REFERENCES targets, candidate TEXT NOT NULL,
    judging TEXT NOT NULL UNIQUE REFERENCES judgings (id), ratio REAL, low REAL, high REAL, added REAL NOT NULL
);
CREATE INDEX attempts_of_target ON attempts (target);
CREATE INDEX judgings_of_candidate ON judgings (target, candidate);
"""
#: What each later version added, so that an older ledger goes on.
ADDED = {
    2: """
CREATE TABLE depositions (
    judging TEXT PRIMARY KEY REFERENCES judgings (id), election INTEGER NOT NULL UNIQUE REFERENCES elections (number),
    added REAL NOT NULL
);
""",
    3: """
CREATE TABLE profiles (
    number INTEGER PRIMARY KEY, target TEXT NOT NULL REFERENCES targets, candidate TEXT NOT NULL,
    environment TEXT NOT NULL, profile TEXT NOT NULL, added REAL NOT NULL,
    UNIQUE (target, candidate, environment)
);
""",
    4: """
ALTER TABLE judgings ADD COLUMN options TEXT NOT NULL DEFAULT '{}';
""",
}
TABLES = (
    *("targets", "goldens", "candidates", "attempts", "judgings", "verdicts", "samples", "elections", "depositions"),
    "profiles",
)
