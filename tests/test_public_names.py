"""What `import qprune` offers, and what it does not load."""

import subprocess
import sys

import pytest

import qprune


def test_every_public_name_resolves_and_is_documented() -> None:
    for name in qprune.__all__:
        found = getattr(qprune, name)
        assert found.__name__ == name
        assert found.__doc__, name
    assert set(qprune.__all__) <= set(dir(qprune))
    with pytest.raises(AttributeError, match="module 'qprune' has no attribute 'quantise'"):
        _ = qprune.quantise


def test_names_of_version_0_1_stay() -> None:
    for old, new in qprune._ALIASES.items():
        assert getattr(qprune, old) is getattr(qprune, new)
        assert old in dir(qprune)


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, qprune; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
