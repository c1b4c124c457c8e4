"""The error that is the user's to mend; a file of its own so that the command line's help needs no torch."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input of the user: one line that names the file or key and what to do. The CLI exits with code 2 on it."""
