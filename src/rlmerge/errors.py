"""Every error that a user can cause, as one tree. Each message says what was found, why it cannot work, what to write.

RlmergeError                    the user's mistake: one message, no traceback, exit code 2
├── RecipeError                 the recipe: keys, types, values, paths that do not exist
├── CheckpointError             a model folder that cannot be read or trusted
│   ├── DownloadError           a model of the hub that cannot be fetched
│   ├── HeaderError             a safetensors header that is truncated, overlapping, oversized, …
│   ├── AdapterError            a LoRA folder with something that cannot be merged exactly
│   ├── MismatchError           models that do not fit together: tensor sets, shapes, tokenizers, ties, a pack's base
│   └── PackError               a delta pack that is damaged, or that cannot be made or used like this
├── FisherError                 a Fisher folder that is missing, wrong, empty or negative
├── GramError                   Gram matrices that are missing, of another model, or none
├── GeometryError               measures of geometry that cannot be taken as asked
├── ReportError                 a report that cannot be read, or reports that cannot be compared
├── PluginError                 a merge method of the user's own: its file, its definition, an error in its code
├── NonFiniteError              NaN or infinity in an input or in a result
├── ClusterError                    machines that are not there, lack memory or files, or keep dying
├── OutputError                 the output folder: exists, locked, another plan's, disk full
├── EvaluationError, TaskError, VerifierError, WorkerError, ResultsError    what `evaluate` cannot do (defined there)
├── SandboxError                model-written code cannot be isolated here (`evaluate.sandbox`)
└── MissingExtraError           an optional dependency, with the pip command that brings it
"""

from __future__ import annotations

from collections.abc import Iterable

INSTALL = "pip install -e '.[{}]'"
"""What brings an extra: rlmerge is on no package index yet, so it runs in a clone of the repository."""


class RlmergeError(Exception):
    """What a user can get wrong; the command line prints it without a traceback and exits with 2.

    What a file says of itself ends up in messages: whatever would steer a terminal, or cannot be written, is escaped.
    """

    def __str__(self) -> str:
        return plain(super().__str__())


def plain(text: str) -> str:
    """The text with every character but line breaks and printable ones escaped."""
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class RecipeError(RlmergeError):
    """The recipe cannot be read or cannot mean anything.

    place    where in the recipe, as in ('exclude', 0), when whoever raised it does not know file and line;
             `Recipe.located` adds them
    """

    def __init__(self, message: str, place: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.place = place


class CheckpointError(RlmergeError):
    """A model folder that cannot be read or trusted."""


class DownloadError(CheckpointError):
    """A model of the hub that cannot be fetched."""


class HeaderError(CheckpointError):
    """A safetensors file whose header does not describe its bytes."""


class AdapterError(CheckpointError):
    """A LoRA folder with something that cannot be merged exactly."""


class MismatchError(CheckpointError):
    """Models that do not fit together."""


class PackError(CheckpointError):
    """A delta pack that is damaged, or that cannot be made or used like this."""


class FisherError(RlmergeError):
    """A Fisher folder that is missing, wrong, empty or negative."""


class GramError(RlmergeError):
    """Gram matrices that are missing, of another model, or that are no Gram matrices."""


class GeometryError(RlmergeError):
    """A measure of what training did that cannot be taken as asked."""


class ReportError(RlmergeError):
    """A report that cannot be read, or reports that cannot be compared."""


class PluginError(RlmergeError):
    """A merge method of the user's own that cannot be loaded, or whose code failed."""


class NonFiniteError(RlmergeError):
    """NaN or infinity in an input or in a result."""


class OutputError(RlmergeError):
    """The output folder cannot be written, or belongs to another run."""


class ClusterError(RlmergeError):
    """A cluster that cannot be reached, or whose machines cannot do the work."""


class MissingExtraError(RlmergeError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs {package}, which is not installed. Run, in the clone: {INSTALL.format(extra)}")
        self._arguments = what, package, extra

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str, str]]:
        return type(self), self._arguments  # so that it can leave a process


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean 'x'?' for the closest known word, or nothing."""
    import difflib  # only a mistake needs it

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
