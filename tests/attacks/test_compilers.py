"""A compiler that is none, and libraries that fail, end or hang their process: the run goes on without, and says so."""

import json
import os
import shutil
import stat
import sys
import warnings
from pathlib import Path
from random import Random
from typing import Any

import pytest

from qprune.atomic_write import write_json
from qprune.compression import native
from qprune.runs.execute import execute
from tests.attacks.conftest import TRIALS, Attacks, SilentDifferenceError
from tests.faults.test_kills import server
from tests.runs.test_execute import config

GCC = shutil.which("gcc")
pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the operator is not compiled"),
    pytest.mark.skipif(GCC is None, reason="the compilers are scripts around gcc"),
]
# What stands at the end of the source, behind `apply`: C that is run when the library is loaded.
_AT_LOAD = "__attribute__((constructor)) static void at_load(void) {{ {} }}\n"
ENDS = {
    "exit": "_exit({number});",
    "signal": "raise({signal});",
    "abort": "abort();",
    "null": "*(volatile int *)0 = {number};",
    "division": "volatile int zero = 0; _exit(1 / zero);",
    "flood": "for (;;) malloc(1 << 20), raise(9);",
    "hang": "for (;;) pause();",
    "closed": "close(1); close(2); _exit(0);",
    "said": 'puts("called"); fflush(stdout); _exit({number});',
}
FLAGS = (
    *"-fsanitize=address -fsanitize=undefined -fsanitize=thread -fsanitize=leak -fsanitize-trap=all -m32 -mx32".split(),
    *"-fno-pic -nostdlib -fno-openmp -c -E -S -static -shared -march=i386 -Dapply=supply -Dapply=static -O0".split(),
    *"-ffast-math -fvisibility=hidden -Wl,-z,defs -Wl,-z,now -pg --coverage -fprofile-generate -DPARALLEL=0".split(),
    *("-Dclamp(a,b,c)=a", "-Drintf=roundf", "-x c++", "-mavx512f -mprefer-vector-width=512", "-include nowhere.h"),
)
SCRIPTS = {
    "g++": 'exec g++ "$@"',
    "c++": 'exec g++ -x c++ "$@"',
    "true": "exit 0",
    "false": "exit {number}",
    "text": 'for last; do :; done; echo {number} > "$last"',
    "empty": 'for last; do :; done; : > "$last"',
    "folder": 'for last; do :; done; mkdir "$last"',
    "random": 'for last; do :; done; head -c {number}0 /dev/urandom > "$last"',
    "noise": "head -c 3000000 /dev/urandom >&2; exit {number}",
    "killed": "kill -{signal} $$",
    "library": 'for last; do :; done; cp {libc} "$last"',
    "torn": 'gcc "$@"; for last; do :; done; truncate -s -{number}00 "$last"',
    "bytes": 'gcc "$@"; for last; do :; done; echo x | dd of="$last" bs=1 seek={number}0 conv=notrunc',
    "unreadable": 'gcc "$@"; for last; do :; done; chmod 0 "$last"',
    "removed": 'gcc "$@"; for last; do :; done; rm -r "$(dirname "$last")"',
    "hang": "exec sleep 60",
    "input": 'read line && exit 1; exec gcc "$@"',
}


def compiler(chance: Random, folder: Path) -> tuple[str, str]:
    """Draw a compiler: what was drawn, and the value of CC."""
    kind = chance.choice(("script", "script", "ends", "ends", "flag", "calls"))
    values = {"number": chance.randint(0, 177), "signal": chance.choice((4, 6, 7, 8, 9, 11, 15, 31)), "libc": _libc()}
    script, drawn = folder / "compiler", ""
    if kind == "flag":
        drawn = " ".join(chance.sample(FLAGS, chance.randint(1, 2)))
        return drawn, f"gcc {' '.join(repr(part) for part in drawn.split())}"
    if kind == "script":
        drawn = chance.choice(sorted(SCRIPTS))
        text = SCRIPTS[drawn].format(**values)
    else:  # the source, with something at its end
        drawn = chance.choice(sorted(ENDS))
        end = ENDS[drawn].format(**values)
        headers = "".join(f"#include <{name}.h>\n" for name in ("stdlib", "stdio", "signal", "unistd"))
        inner = _AT_LOAD.format(end) if kind == "ends" else f"void apply(void) {{ {end} }}\n"
        source = native._SOURCE.read_text().replace("void apply(", "void apply(" if kind == "ends" else "void other(")
        (folder / "source.c").write_text(headers + source + inner)
        text = f'set -- $(printf "%s\\n" "$@" | sed "s|^.*/fake_quantize[.]c$|{folder}/source.c|"); exec gcc "$@"'
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return f"{kind} {drawn} {values['number']} {values['signal']}", str(script)


def _libc() -> str:
    with Path("/proc/self/maps").open() as maps:
        return next((line.split()[-1] for line in maps if "libc.so" in line or "libc-" in line), "/bin/sh")


def train_twice(cc: str, notes: str) -> None:
    """Train two runs with a compiler, and leave their rows and what was said of the operator."""
    folder = Path(notes)
    sys.stdout = sys.stderr = (folder / "output.txt").open("a", buffering=1)
    os.environ["CC"] = cc
    native._SECONDS = 5.0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rows = [execute(config(folder / f"run{number}")) for number in range(2)]
    texts = [str(each.message) for each in said if "native operator" in str(each.message)]
    write_json(folder / "found.json", {"rows": [repr(row) for row in rows], "said": texts, "used": native.in_use()})


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The row of the run without the operator."""
    return repr(execute(config(tmp_path_factory.mktemp("plain"), "trainer.kernels=false")))


def test_a_compiler_that_is_none_stops_no_run(expected: str, tmp_path: Path, attacks: Attacks) -> None:
    def trial(chance: Random) -> None:
        folder = tmp_path / str(chance.random())
        folder.mkdir()
        drawn, cc = compiler(chance, folder)
        process = server.Process(target=train_twice, args=(cc, str(folder)))
        process.start()
        process.join(300)
        output = (folder / "output.txt").read_text() if (folder / "output.txt").exists() else ""
        assert process.exitcode == 0, f"{drawn}: exit code {process.exitcode}: {output}"
        found: dict[str, Any] = json.loads((folder / "found.json").read_text())
        if found["rows"] != [expected] * 2:
            raise SilentDifferenceError(f"{drawn}: other rows, operator used: {found['used']}")
        assert len(found["said"]) == (not found["used"]), f"{drawn}: {found['said']}"
        assert all(len(text) < 400 and "\n" not in text for text in found["said"]), found["said"]

    attacks.run("a compiler that is none", trial, TRIALS)
