"""What a run tells its user by ending; a file of its own so that the command line's help needs no torch."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input of the user: one line that names the file or key and what to do. The CLI exits with code 2 on it."""


class WaitsForVotes(Exception):
    """A round was sampled and people are to judge it: nothing failed, and the same command goes on when they have."""
