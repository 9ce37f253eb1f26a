"""The errors that a user can cause: one line each, with the rule, the value and the way out."""

from __future__ import annotations


class CarvError(Exception):
    """Base of every error that carv_attrib raises on purpose; the CLI prints it as one line."""

    exit_code = 1


class ArgumentError(CarvError, ValueError):
    """An argument, flag or config key breaks a rule."""

    exit_code = 2


class DataError(CarvError):
    """A dataset cannot be read as images."""


class BadImageError(DataError):
    """One image cannot be decoded; `--skip-bad` records it and goes on."""


class TeacherError(CarvError):
    """A teacher cannot be loaded, or cannot do what is asked of it."""


class NonFiniteGradientError(CarvError):
    """A gradient holds NaN or infinity; the message names the example."""


class StoreError(CarvError):
    """An index folder cannot be read or written."""


class StoreMismatchError(StoreError):
    """An index was made with other settings; the message lists each field with both values."""


class StoreCorruptError(StoreError):
    """A file of an index is damaged; the message names it."""
