"""The command line in this process: what it printed, how it ended, and whether an error says its three things."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be exactly one JSON object on one line."""
        assert self.out.count("\n") == 1 and self.out.endswith("\n"), self.out
        content = json.loads(self.out)
        assert isinstance(content, dict)
        return content

    def ok(self) -> Outcome:
        assert self.code == 0, self.err
        assert "Traceback" not in self.err
        return self

    def refused(self, *words: str, code: int = 2) -> str:
        """The message of an error that says what was given, what is allowed and what to do, in that order."""
        assert self.code == code, f"exit {self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err + self.out
        assert self.out == "", "a failure prints nothing on standard output"
        start = max(self.err.rfind("error: "), self.err.rfind("stopped: "))
        message = self.err[start:]
        assert start >= 0 and message.endswith("\n"), self.err
        lines = message.splitlines()
        allowed = [number for number, line in enumerate(lines) if line.startswith("  allowed: ")]
        do = [number for number, line in enumerate(lines) if line.startswith("  do: ")]
        assert allowed and do and 0 < allowed[0] < do[0] and lines[do[0]] != "  do: ", message
        for word in words:
            assert word in message, message
        return message


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`run(*words)` is `thriftune *words`."""
    from thriftune import cli

    def run(*words: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["thriftune", *(str(word) for word in words)])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return Outcome(0 if code is None else code, printed.out, printed.err)

    return run
