"""Errors that a user can act on. This module does not import JAX, so that reading data does not wait for it."""

from __future__ import annotations

import os


class UserError(Exception):
  """A mistake that the user can fix: shown as one message without a traceback; the process exits with `exit_code`."""

  exit_code = 1


class ConfigError(UserError):
  """A config that cannot be run, or that does not fit the checkpoint to resume from."""

  exit_code = os.EX_CONFIG  # 78


class DataError(UserError):
  """Data that is missing, empty, damaged, or not what its description says."""

  exit_code = os.EX_DATAERR  # 65


class StorageError(UserError):
  """A folder or checkpoint that cannot be written or read."""

  exit_code = os.EX_IOERR  # 74


class UnreachableError(StorageError):
  """Storage that does not answer now; what is there may be intact."""


class Interrupted(UserError):
  """A run that was asked to stop and has saved a checkpoint: the same command resumes it."""

  exit_code = os.EX_TEMPFAIL  # 75


class DivergedError(UserError):
  """A run whose gradients remain non-finite."""

  exit_code = os.EX_SOFTWARE  # 70


class LostError(UserError):
  """A process of a run that is stuck, stopped or lost: the watchdog ends all of them, and the same command resumes."""

  exit_code = 76
