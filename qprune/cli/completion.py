"""Shell completion: scripts that call `qprune completion query LINE`."""

import argparse
import contextlib
import io
import os
from collections.abc import Sequence

from qprune.errors import one_of

# The line is completed as a whole; what a shell takes for the current word is cut in the shell.
_BASH = """\
# qprune's completion for bash: eval "$(qprune completion bash)"
_qprune() {
    local line="${COMP_LINE:0:COMP_POINT}" word done IFS=$'\\n'
    word="${line##*[[:space:]]}"
    COMPREPLY=($(compgen -W "$(qprune completion query "$line" 2>/dev/null)" -- "$word"))
    # readline splits words at '=' and replaces only what stands behind it
    if [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]]; then
        done="${word%=*}="
        COMPREPLY=("${COMPREPLY[@]#"$done"}")
    fi
}
complete -o nospace -o default -F _qprune qprune
"""
_ZSH = """\
# qprune's completion for zsh: eval "$(qprune completion zsh)"
_qprune() {
    local -a words_of_qprune
    words_of_qprune=(${(f)"$(qprune completion query "$LBUFFER" 2>/dev/null)"})
    compadd -Q -S '' -- $words_of_qprune
}
compdef _qprune qprune
"""
_FISH = """\
# qprune's completion for fish: qprune completion fish | source
complete -c qprune -f -a '(qprune completion query (commandline -cp) 2>/dev/null)'
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
COMPOSING_VERBS = ("run", "sweep", "plan", "frontier")
FRONTIER_KEYS = ("bits=", "sparsity=", "max_loss=", "max_size=", "margin=", "stop=early", "stop=never")


def show(arguments: Sequence[str]) -> int:
    """Print the script of a shell, or the completions of a line."""
    parser = argparse.ArgumentParser(
        "qprune completion",
        description="Print the script that completes qprune's verbs, groups, keys and values in a shell.",
        epilog='To use it: eval "$(qprune completion bash)", the same for zsh, or: qprune completion fish | source',
    )
    parser.add_argument("shell", metavar="SHELL", help=" or ".join(SCRIPTS))
    parser.add_argument("line", nargs="?", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.shell == "query":
        _answer(options.line)
        return 0
    one_of("qprune completion: SHELL", options.shell, SCRIPTS)
    print(SCRIPTS[options.shell], end="")
    return 0


def _answer(line: str) -> None:
    """Print the completions of the last word of `line`, one a line."""
    words = line.split()
    word = "" if line[-1:].isspace() else words.pop()
    if len(words) <= 1:
        from qprune.cli.main import VERBS

        print("\n".join(verb for verb in VERBS if verb.startswith(word)))
    elif words[1] == "completion":
        print("\n".join(SCRIPTS))
    elif words[1] == "list":
        from qprune.cli.list import GROUPS, PRESETS

        print("\n".join([*GROUPS, *PRESETS, "runs"]))
    elif words[1] == "tables":
        from qprune.config.compose import TABLE
        from qprune.runs.jobs import presets

        print("\n".join([*presets(TABLE), "order"]))
    elif words[1] in COMPOSING_VERBS:
        from qprune.config.compose import SWEEP
        from qprune.runs.jobs import presets

        sweeps = [f"+{SWEEP}={name}" for name in presets(SWEEP)]
        own = {"frontier": FRONTIER_KEYS, "sweep": sweeps, "plan": sweeps}.get(words[1], ())
        others = [text for text in words[2:] if not any(key.startswith(f"{text.partition('=')[0]}=") for key in own)]
        print("\n".join([key for key in own if key.startswith(word)] + _hydra_completions([*others, word])))


def _hydra_completions(words: Sequence[str]) -> list[str]:
    """List what may stand in place of the last word of a command that composes."""
    from qprune.cli.multirun import start_hydra

    os.environ["COMP_LINE"] = " ".join(["qprune", *words])  # where Hydra's plugin for bash looks
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        start_hydra(["--shell-completion", "query=bash"])
    return printed.getvalue().split()
