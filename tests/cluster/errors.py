"""What can go wrong while a cluster starts. Every message names the thing, what was seen and what to do."""

from __future__ import annotations


class ClusterError(Exception):
    """The harness could not do what was asked."""


class CommandFailed(ClusterError):
    """A command ended with an error, or a process ended that should run."""


class TimedOut(ClusterError):
    """A condition was not met in time."""


class Unavailable(ClusterError):
    """This machine cannot give what was asked; the message is the one-line reason."""
