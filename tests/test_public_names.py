"""What `import qprune` offers, and what it does not load."""

import subprocess
import sys

import pytest

import qprune


@pytest.mark.parametrize("name", qprune.__all__)
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    found = getattr(qprune, name)
    assert found.__name__ == name
    assert found.__doc__


def test_names_of_the_lazy_module_are_complete() -> None:
    assert set(qprune.__all__) <= set(dir(qprune))
    with pytest.raises(AttributeError, match="module 'qprune' has no attribute 'quantise'"):
        _ = qprune.quantise


@pytest.mark.parametrize(("old", "new"), qprune._ALIASES.items())
def test_names_of_version_0_1_stay(old: str, new: str) -> None:
    assert getattr(qprune, old) is getattr(qprune, new)
    assert old in dir(qprune)


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, qprune; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
