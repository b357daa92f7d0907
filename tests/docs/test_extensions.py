"""Tables and figures that are made when the pages are built."""

from pathlib import Path

import pytest
import yaml

from tests.docs.pages import DOCS, extension

CONFIGS = DOCS.parent / "configs"


def test_keys_come_with_default_and_comment() -> None:
    config_keys = extension("config_keys")
    keys = {key.path: key for key in config_keys.keys_of(CONFIGS / "run.yaml")}
    assert keys["prune.sparsity"].default == "0.5"
    assert keys["prune.sparsity"].meaning == "fraction of zeros at the end: a number in [0, 1)"
    assert keys["quantize.saturate"].default == "[0.0, 1.0]"
    assert keys["quantize.feature_bits"].default == "${quantize.bits}"
    assert not [path for path in keys if path.startswith("hydra")]
    above = {key.path: key for key in config_keys.keys_of(CONFIGS / "task/cifar.yaml")}["task.sites.prune_features"]
    assert above.meaning.startswith("52. As the authors' code has it, the output of the first layer is pruned. The")
    assert {key.path for key in config_keys.keys_of(CONFIGS / "trainer/default.yaml")} > {"trainer.device"}


@pytest.mark.parametrize(
    "path", [*sorted(CONFIGS.glob("task/*.yaml")), CONFIGS / "run.yaml"], ids=lambda path: path.stem
)
def test_no_key_is_left_out_and_none_unexplained(path: Path) -> None:
    def leaves(value: object, name: str = "") -> set[str]:
        if not isinstance(value, dict):
            return {name}
        return {leaf for k, v in value.items() for leaf in leaves(v, f"{name}.{k}" if name else str(k))}

    keys = extension("config_keys").keys_of(path)
    expected = leaves({k: v for k, v in yaml.safe_load(path.read_text()).items() if k not in ("hydra", "defaults")})
    assert {key.path for key in keys} == {name for name in expected if not name.endswith("_target_")}
    assert not [key.path for key in keys if len(key.meaning) < 2]


def test_every_shipped_group_has_its_place_on_the_page() -> None:
    page = (DOCS / "config.md").read_text(encoding="utf-8")
    for path in [*CONFIGS.glob("task/*.yaml"), *CONFIGS.glob("trainer/*.yaml"), CONFIGS / "run.yaml"]:
        assert f"{{config-keys}} {path.relative_to(CONFIGS)}\n" in page


def test_tables_are_tables() -> None:
    config_keys = extension("config_keys")
    key = config_keys.Key("data.root", "[x]", "w | f: `a*b` of d*, in_range")
    assert config_keys.markdown_table([key]).splitlines()[2] == (
        r"| `data.root` | `[x]` | w \| f: `a*b` of d\*, in\_range *(machine key)* |"
    )
    schedules = config_keys.schedule_table().splitlines()
    assert schedules[0] == "| schedule | `t_qw` | `t_qf` | `t_p` | `dt_p` | `n` |"
    assert "| `espcn/prune_first` | 160 | 170 | 140 | 5 | 4 |" in schedules
    assert "| `espcn/quantize_only` | 140 | 150 | - | - | 4 |" in schedules
    assert "| `prune_first` | Pruning, then quantization: P0.5(w,f)->Q8(w,f) |" in config_keys.choices_table("order")


def test_pictures_are_drawn_and_the_same_each_time(tmp_path: Path) -> None:
    pictures = extension("pictures")
    pictures.draw(tmp_path / "first")
    pictures.draw(tmp_path / "second")
    names = {path.stem for path in (tmp_path / "first").iterdir()}
    assert names == {"order", "mask", "decimal"}
    concepts = (DOCS / "concepts.md").read_text(encoding="utf-8")
    for name in names:
        assert f"(pictures/{name}.svg)" in concepts
        first, second = ((tmp_path / part / f"{name}.svg").read_bytes() for part in ("first", "second"))
        assert first == second
