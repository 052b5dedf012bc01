"""Everything that pxmerge raises on purpose, with the exit code that the command line gives it.

    PxmergeError                      1
    ├── UsageError                    2   a wrong flag, a bad value
    │   └── RecipeError               2   an invalid recipe; carries file:line:column
    ├── InputError                    3   an input is missing, unreachable or malformed
    │   ├── InputNotFoundError        3
    │   ├── MalformedCheckpointError  3   a file breaks the safetensors format, its index, or its own encoding
    │   ├── AdapterError              3   an adapter that cannot be read or merged
    │   ├── HubError                  3   the Hub said no, or could not be reached
    │   └── ClusterError              3   a cluster that does not answer
    ├── PlanError                     4   the request is understood and refused before any weight is read
    │   ├── TensorMismatchError       4   names, shapes or dtypes of the inputs do not fit one another
    │   ├── MemoryBudgetError         4   a tensor needs more memory than the budget
    │   ├── DiskSpaceError            4
    │   └── OutputError               4   the output path cannot be used
    └── RunError                      5   the run stopped; ``--resume`` continues it
        ├── NonFiniteError            5   a NaN or an infinity in a source or a result
        ├── DivergedError             5   a loss or a weight in training is not finite any more
        ├── WriteError                5   the disk refused
        └── OutputLockedError         5   another run is writing there

``KeyboardInterrupt`` becomes exit code 130.
"""

from __future__ import annotations


class PxmergeError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: what is wrong and why, as one clause without a full stop.
        where: the place: ``file:line:column``, a file name, or ``file: tensor``.
        hint: what the user can do about it.

    ``str(error)`` is always a single line: ``where: what (hint)``.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = where
        self.hint = hint
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        text = f"{text}; {self.hint}" if self.hint else text
        return " ".join(text.split())


class UsageError(PxmergeError):
    exit_code = 2


class RecipeError(UsageError):
    pass


class InputError(PxmergeError):
    exit_code = 3


class InputNotFoundError(InputError):
    pass


class MalformedCheckpointError(InputError):
    pass


class AdapterError(InputError):
    pass


class HubError(InputError):
    pass


class ClusterError(InputError):
    pass


class PlanError(PxmergeError):
    exit_code = 4


class TensorMismatchError(PlanError):
    pass


class MemoryBudgetError(PlanError):
    pass


class DiskSpaceError(PlanError):
    pass


class OutputError(PlanError):
    pass


class RunError(PxmergeError):
    exit_code = 5


class NonFiniteError(RunError):
    pass


class DivergedError(RunError):
    pass


class WriteError(RunError):
    pass


class OutputLockedError(RunError):
    pass
