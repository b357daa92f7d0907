"""The `qprune` command: finds the verb, runs it, and explains every error."""

import argparse
import os
import pkgutil
import re
import sys
from collections.abc import Sequence

from qprune.cli import failures, signals, streams
from qprune.errors import DEBUG_VARIABLE, TRUST_VARIABLE, UserError, closest

# Verb -> its line in the help, and the function that takes the arguments behind it and returns the exit code
VERBS = {
    "run": ("train one recipe; print and store its result row", "qprune.cli.run:run"),
    "sweep": ("train one recipe per combination of values", "qprune.cli.run:sweep"),
    "plan": ("print which tensor gets which operator, and when", "qprune.cli.run:plan"),
    "frontier": ("find the smallest model for a score", "qprune.cli.frontier:show"),
    "list": ("print what there is to choose from, or the finished runs", "qprune.cli.list:show"),
    "tables": ("print the paper's tables from the finished runs", "qprune.cli.tables:show"),
    "report": ("write one HTML page about the finished runs", "qprune.cli.report:make"),
    "new": ("write a task of your own to begin with", "qprune.cli.new:make"),
    "data": ("fetch a published data set, check it and unpack it", "qprune.cli.data:main"),
    "explain": ("say why two finished runs differ, per tensor and event", "qprune.cli.explain:explain"),
    "evaluate": ("score a finished run's network, also on other data", "qprune.cli.evaluate:evaluate"),
    "export": ("write a finished run's network as ONNX or in sparse form", "qprune.cli.export:export"),
    "verify": ("run an exported network beside PyTorch and compare", "qprune.cli.verify:verify"),
    "completion": ("print the completion script of a shell", "qprune.cli.completion:show"),
}

_HELP = """\
usage: qprune VERB [ARGUMENTS] [--debug] [--trust PACKAGE]

Prune and quantize weights and features, in either order; measure what it gains.

verbs:
{verbs}

options:
  --help     this text; behind a verb, the verb's own
  --version  the version of qprune
  --debug    anywhere: show the traceback of an error
  --trust PACKAGE  anywhere: import its tasks for stored runs (as QPRUNE_TRUST)

examples:
  qprune run task=espcn order=prune_first data=synthetic budget=smoke
  qprune sweep task=espcn order=prune_first,quantize_first "seed=range(5)"
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: that of this process), and return the exit code.

    0, 1 when a run failed, 2 when the input is wrong, 75 when a signal stopped runs, which the same command resumes,
    130 or 143 when SIGINT or SIGTERM stopped anything else, and 130 when a second SIGINT did not wait for a step.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    streams.open_streams()
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        # Before torch is imported: threads of OpenMP that wait spin for long, and beside another busy process a step
        # of MobileNetV2 then takes 7 s instead of 1.4 s. The library reads this when it is loaded.
        os.environ["GOMP_SPINCOUNT"] = "10000"
    verb = next((word for word in words if word in VERBS), "")
    try:
        with signals.stopping():
            code = _dispatch(_without_own_flags(words))
            sys.stdout.flush()
            return code
    except SystemExit as stop:  # argparse's and Hydra's way out, and that of a failed run
        if isinstance(stop.__context__, BrokenPipeError):  # rich's, when the reader of our output has left
            return failures.output_lost(stop.__context__, verb)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt as error:
        code, text = failures.stopped_text(error, verb)
        streams.print_error(text)
        return code
    except Exception as error:
        unnamed = isinstance(error, OSError) and error.filename is None and not isinstance(error, FileNotFoundError)
        if unnamed and (lost := streams.flush(sys.stdout, "\n")) is not None:
            return failures.output_lost(lost, verb)
        return failures.report(error)[0]
    finally:
        streams.flush(sys.stdout)
        streams.flush(sys.stderr)


def _without_own_flags(words: list[str]) -> list[str]:
    """Take --debug and --trust PACKAGE out of the words, into the environment."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--trust", action="append", nargs="?", const="", default=[])
    options, others = parser.parse_known_args(words)
    if options.debug:
        os.environ[DEBUG_VARIABLE] = "1"
    for packages in options.trust:
        if not re.fullmatch(r"[\w.]+(,[\w.]+)*", packages):
            raise UserError(f"--trust {packages!r} is not a package; type for example --trust my_tasks")
        os.environ[TRUST_VARIABLE] = ",".join(filter(None, (os.environ.get(TRUST_VARIABLE), packages)))
    return others


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        width = max(map(len, VERBS))
        verbs = "\n".join(f"  {name:<{width}}  {summary}" for name, (summary, _) in VERBS.items())
        print(_HELP.format(verbs=verbs), end="")
        return 0 if words else failures.USER
    name, *arguments = words
    if "--version" in words:
        from qprune import __version__

        print(f"qprune {__version__}")
        return 0
    if name not in VERBS:
        advice = f"; type: qprune run {' '.join(words)}" if "=" in name else closest(name, VERBS)
        raise UserError(f"{name!r} is not a verb of qprune{advice}; the verbs are {', '.join(VERBS)}")
    code: int = pkgutil.resolve_name(VERBS[name][1])(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
