"""The errors of the package, by meaning. The C++ core raises the same classes."""

from __future__ import annotations


class Error(RuntimeError):
    """Base of every error that this package raises on purpose."""


class InvalidArgument(Error, ValueError):
    """The caller passed something that cannot work; the message says what would."""


class CapacityError(Error):
    """It would work with fewer sessions, a shorter context, or later."""


class FormatError(Error):
    """A file, or a tensor in it, is not what it should be."""


class DeviceError(Error):
    """A device is missing, too old, too small, or failed."""
