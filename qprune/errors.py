"""The errors that the command line turns into one paragraph and an exit code."""

import difflib
from collections.abc import Iterable

DEBUG_VARIABLE = "QPRUNE_DEBUG"  # set to 1 in the environment, so that other processes see it too: show tracebacks

# packages, separated by commas, of which stored runs may name classes; likewise for other processes to see
TRUST_VARIABLE = "QPRUNE_TRUST"


class UserError(ValueError):
    """The input is wrong (exit code 2); the message says what to type instead."""


class RunFailure(RuntimeError):
    """The run cannot go on (exit code 1): a full disk, a loss that is not finite."""


def most_similar(given: str, legal: Iterable[str]) -> list[str]:
    """Return the most similar legal word in a list; empty when none is similar."""
    return difflib.get_close_matches(given, list(legal), n=1, cutoff=0.5)


def closest(given: str, legal: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the most similar legal word, if any."""
    return "".join(f"; did you mean {word!r}?" for word in most_similar(given, legal))


def one_of(name: str, given: str, legal: Iterable[str]) -> None:
    """Raise UserError unless `given`, the value of `name`, is one of `legal`."""
    words = list(legal)
    if given not in words:
        raise UserError(f"{name}={given!r} is not one of {', '.join(words)}{closest(str(given), words)}")


def visible(text: object) -> str:
    """Write text from outside in one line: what a terminal acts on or cannot show as an escape (`\\x1b`)."""
    given = str(text)
    if given.isprintable():
        return given
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in given)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def counted(number: float, thing: str) -> str:
    """Write a number of things: `1 run`, `2 runs`."""
    return f"{number:,.10g} {thing}{'' if number == 1 else 's'}"


class Interrupted(RuntimeError):
    """A signal stopped the run with everything saved (exit code 75)."""


class StoppedEarly(RuntimeError):
    """The run was stopped early, with everything saved: it goes on from there."""
