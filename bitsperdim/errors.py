"""The four ways a run can end early, each with the exit code of the scripts.

The scripts print these as one message without a traceback; anything else is a defect of ours and keeps its traceback.
"""


class RunError(Exception):
    """Base of the errors that the scripts turn into a message and an exit code."""

    exit_code = 1
    is_of_all = False  # do all processes of the run end with it?


class InputError(RunError):
    """Something that the user gave (a config, a file, a folder, a flag) is wrong. Names it, and the remedy."""

    exit_code = 2


class Interrupted(RunError):
    """A signal asked the run to stop; its state was saved and the same command goes on from there."""

    exit_code = 3


class NonFiniteError(RunError):
    """The loss or its gradients stayed non-finite; the last finite state is in the checkpoints."""

    exit_code = 4
    is_of_all = True  # all of them see the same loss


class LostError(RunError):
    """Another process of the run has ended, and this one cannot go on alone; the last checkpoint is whole."""

    exit_code = 5
