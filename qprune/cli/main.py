"""The `qprune` command: finds the verb, runs it, and explains every error."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from qprune.cli import exit_codes as failures
from qprune.errors import DEBUG_VARIABLE, TRUST_VARIABLE, UserError, closest


@dataclass(frozen=True)
class Verb:
    """A verb: its line in the help, and `module:function`, imported when it is given.

    The function takes the arguments behind the verb and returns the exit code.
    """

    summary: str
    function: str

    def __call__(self, arguments: Sequence[str]) -> int:
        module, _, name = self.function.partition(":")
        function: Callable[[Sequence[str]], int] = getattr(import_module(module), name)
        return function(arguments)


VERBS = {
    "run": Verb("train one recipe; print and store its result row", "qprune.cli.run:run"),
    "sweep": Verb("train one recipe per combination of values", "qprune.cli.run:sweep"),
    "plan": Verb("print which tensor gets which operator, and when", "qprune.cli.run:plan"),
    "frontier": Verb("find the smallest model for a score", "qprune.cli.frontier:show"),
    "list": Verb("print what there is to choose from, or the finished runs", "qprune.cli.list:show"),
    "tables": Verb("print the paper's tables from the finished runs", "qprune.cli.tables:show"),
    "report": Verb("write one HTML page about the finished runs", "qprune.cli.report:make"),
    "data": Verb("fetch a published data set, check it and unpack it", "qprune.cli.data:main"),
    "export": Verb("write a finished run's network as ONNX or in sparse form", "qprune.cli.export:export"),
    "verify": Verb("run an exported network beside PyTorch and compare", "qprune.cli.verify:verify"),
    "completion": Verb("print the completion script of a shell", "qprune.cli.completion:show"),
}

_HELP = """\
usage: qprune VERB [ARGUMENTS] [--debug] [--trust PACKAGE]

Train networks whose weights and features are pruned and quantized, in either order, and measure what it gains.

verbs:
{verbs}

options:
  --help     this text; behind a verb, the verb's own
  --version  the version of qprune
  --debug    anywhere: show the traceback of an error
  --trust PACKAGE  anywhere: let configs name tasks of this package, as QPRUNE_TRUST=PACKAGE in the environment does

examples:
  qprune run task=espcn order=prune_first data=synthetic budget=smoke
  qprune sweep task=espcn order=prune_first,quantize_first "seed=range(5)"
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: that of this process).

    Returns the exit code: 0, 1 when the run failed, 2 when the input is wrong, 75 when a signal stopped the run with
    everything saved, 130 when one stopped anything else.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        # Before torch is imported: threads of OpenMP that wait spin for long, and beside another busy process a step
        # of MobileNetV2 then takes 7 s instead of 1.4 s. The library reads this when it is loaded.
        os.environ["GOMP_SPINCOUNT"] = "10000"
    if "--debug" in words:
        words = [word for word in words if word != "--debug"]
        os.environ[DEBUG_VARIABLE] = "1"
    try:
        words = _without_trust(words)
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse's and Hydra's way out, and that of a failed run
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return failures.report(error)[0]


def _without_trust(words: list[str]) -> list[str]:
    """Take `--trust PACKAGE` out of what was typed, and trust these packages."""
    left: list[str] = []
    rest = iter(words)
    for word in rest:
        if word != "--trust" and not word.startswith("--trust="):
            left.append(word)
            continue
        packages = word.removeprefix("--trust=") if "=" in word else next(rest, "")
        if not re.fullmatch(r"[\w.]+(,[\w.]+)*", packages):
            raise UserError(f"--trust {packages!r} is not a package; type for example --trust my_tasks")
        os.environ[TRUST_VARIABLE] = ",".join(filter(None, (os.environ.get(TRUST_VARIABLE), packages)))
    return left


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        width = max(map(len, VERBS))
        verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
        print(_HELP.format(verbs=verbs), end="")
        return 0 if words else failures.USER
    name, *arguments = words
    if name == "--version":
        from qprune import __version__

        print(f"qprune {__version__}")
        return 0
    if name not in VERBS:
        advice = f"; type: qprune run {' '.join(words)}" if "=" in name else closest(name, VERBS)
        raise UserError(f"{name!r} is not a verb of qprune{advice}; the verbs are {', '.join(VERBS)}")
    return VERBS[name](arguments)


if __name__ == "__main__":
    sys.exit(main())
