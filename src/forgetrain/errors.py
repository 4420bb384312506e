"""The one exception that reaches a user: what is wrong, where, and what to do about it."""

from __future__ import annotations

_COMMANDS = ("forgetrain", "pip")


class UserError(Exception):
    """Bad input, refused before expensive work. The command line prints it as one line and exits with code 2.

    Parts that do not apply are left out: ``UserError("is empty", file=path, remedy="name a folder that holds text")``.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: object = None,
        key: str | None = None,
        value: object = None,
        remedy: str | None = None,
    ):
        self.problem, self.file, self.key, self.value, self.remedy = problem, file, key, value, remedy
        self.told = False  # whether another rank prints it
        super().__init__(str(self))

    def __str__(self) -> str:
        where = ": ".join(str(part) for part in (self.file, self.key) if part is not None)
        line = f"{where}: {self.problem}" if where else self.problem
        if self.value is not None:
            line += f" (got {self.value!r})"
        if self.remedy:
            command = self.remedy.split()[0] in _COMMANDS  # to be copied as it stands
            line += f". {self.remedy if command else self.remedy[0].upper() + self.remedy[1:]}"
        return " ".join(line.split())
