"""The exit codes of `trainonce run`, one a case."""

import enum


class ExitCode(enum.IntEnum):
    """What `trainonce run` returns. docs/launcher.md has the table."""

    OK = 0
    """The script ended normally on every rank."""
    SCRIPT_FAILED = 1
    """The script itself is at fault: it fails in the same way again, or has no restarts left."""
    USAGE = 2
    """Options, script or environment cannot be used; nothing was started."""
    NOT_RECOVERED = 3
    """A failure from outside could not be recovered from, or came too often."""
    NO_CAPACITY = 4
    """`--when-no-spare checkpoint`: a device was lost, and the job ended with a checkpoint."""
    SIGNALLED = 128
    """Plus the number of the signal that ended the job: 130 for Ctrl-C, 143 for SIGTERM."""
