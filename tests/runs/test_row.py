"""Signatures, run folders, notation, and rows that are stored, checked and printed."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from qprune.atomic_write import json_bytes
from qprune.config.signature import notation, run_folder, signature
from qprune.errors import RunFailure, UserError
from qprune.runs.folder import ROW_FILE, RunFolder, read_rows
from qprune.runs.row import Row, make_row, parse_row
from qprune.runs.row_text import digits, format_row, score_text
from tests.reporting import rows
from tests.runs.test_execute import config as toy_config

FIELDS = rows.FIELDS | {"score": 31.03, "marks": ["checksum of set5 differs"], "metrics": {"test_loss": 0.001}}
FIELDS |= {"feature_sparsity": 0.25, "feature_bits_actual": 2e7, "weight_bits_paper": 90916.0}
ROW = Row(**FIELDS)
# The sizes of a float network of 127.1 Mb
ALL = {"weight_bits_actual": 7.1e6, "feature_bits_actual": 1e8, "input_bits_actual": 2e7}


def config(**changes: Any) -> DictConfig:
    """The config of a toy run of 200 epochs; `a__b=c` changes the key a.b."""
    own = ("seed=3", "epochs=200", "quantize.feature_bits=${quantize.bits}", "task.name=espcn")
    cfg = toy_config("results/runs", *own)
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return cfg


def test_rows_without_a_version_of_the_arithmetic_have_the_first() -> None:
    assert parse_row(json_bytes(FIELDS)).arithmetic == 1
    assert parse_row(json_bytes(FIELDS | {"arithmetic": 2})).arithmetic == 2


def stored(folder: Path, **changes: Any) -> Path:
    path = folder / ROW_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(FIELDS | changes), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"results_dir": "/elsewhere"},
        {"force": True},
        {"data__root": "/elsewhere"},
        {"logger__name": "tensorboard"},
        {"trainer__device": "cuda"},
        {"trainer__threads": 8},
        {"trainer__checkpoint_minutes": 1},
        {"trainer__evaluate_every": 10},
        {"epochs": 200.0},  # spelled otherwise
        {"quantize__feature_bits": 8},  # written out instead of interpolated
    ],
)
def test_signature_ignores_what_the_run_is_not(change: dict[str, Any]) -> None:
    assert signature(config(**change)) == signature(config())


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"epochs": 201},
        {"prune__sparsity": 0.25},
        {"quantize__bits": 4},
        {"order__steps": ["quantize", "prune"]},
        {"data__source": "real"},
        {"trainer__ranks": 2},
        {"schedule__t_p": 140.5},
    ],
)
def test_signature_tells_runs_apart(change: dict[str, Any]) -> None:
    assert signature(config(**change)) != signature(config())


def test_signature_is_the_sha256_of_the_sorted_config() -> None:
    order = {"steps": ["prune", "quantize"]}
    one = OmegaConf.create({"b": 200, "a": {"c": [1, 2.5]}, "order": order, "force": True})
    other = OmegaConf.create({"order": order, "a": {"c": [1.0, 2.5]}, "b": 200.0, "force": False})
    text = '{"a": {"c": [1, 2.5]}, "b": 200, "order": {"steps": ["prune", "quantize"]}}'
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert signature(one) == signature(other) == expected


def test_keys_of_operators_that_the_order_lacks_are_no_part_of_the_identity() -> None:
    baseline = {"order": {"name": "baseline", "steps": []}}
    changes = {"prune": {"sparsity": 0.9}, "quantize": {"bits": 3}, "schedule": {"t_p": 1, "t_qw": 2}}
    assert signature(config(**baseline)) == signature(config(**baseline, **changes))
    quantized = {"order": {"name": "quantize_only", "steps": ["quantize"]}}
    assert signature(config(**quantized)) == signature(config(**quantized, prune={"sparsity": 0.9, "targets": "w"}))
    assert signature(config(**quantized)) != signature(config(**quantized, prune__window=3))


def test_run_folders_are_named_for_people_and_by_the_signature() -> None:
    name = f"prune_first-P0.5wf-Q8wf-seed3-{signature(config())[:10]}"
    assert run_folder(config()) == Path("results/runs/espcn") / name
    mixed = config(results_dir="/r", quantize__feature_bits=12, order__steps=["quantize"], order__name="quantize_only")
    assert run_folder(mixed) == Path(f"/r/espcn/quantize_only-Q8wQ12f-seed3-{signature(mixed)[:10]}")
    bare = config(order__steps=[], order__name="baseline")
    assert run_folder(bare).name == f"baseline-seed3-{signature(bare)[:10]}"


@pytest.mark.parametrize(
    ("order", "prune", "quantize", "expected"),
    [
        ([], {}, {}, "Baseline"),
        (["prune", "quantize"], {}, {}, "P0.5(w,f)->Q8(w,f)"),
        (["quantize", "prune"], {"targets": "w"}, {}, "Q8(w,f)->P0.5(w)"),
        (["quantize", "prune"], {"targets": "w"}, {"feature_bits": 12}, "Q8(w),Q12(f)->P0.5(w)"),
        (["quantize"], {}, {"targets": "f", "feature_bits": 12}, "Q12(f)"),
        (["prune"], {"sparsity": 0.875, "targets": "f"}, {}, "P0.875(f)"),
        (["quantize"], {}, {"feature_bits": None, "bits": 4}, "Q4(w,f)"),
    ],
)
def test_notation(order: list[str], prune: dict[str, Any], quantize: dict[str, Any], expected: str) -> None:
    defaults = {"bits": 8, "feature_bits": 8, "targets": "wf"}
    pruned = {"sparsity": 0.5, "targets": "wf"} | prune
    assert notation({"order": {"steps": order}, "prune": pruned, "quantize": defaults | quantize}) == expected


def test_a_row_comes_back_as_it_was_and_its_bytes_repeat() -> None:
    other = Row(**dict(reversed(FIELDS.items())) | {"feature_bits_actual": 20_000_000})
    content = json_bytes(dataclasses.asdict(ROW))
    assert content == json_bytes(dataclasses.asdict(other))
    assert parse_row(content) == ROW


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_scores_keep_every_bit(score: float) -> None:
    text = json.dumps(dataclasses.asdict(Row(**FIELDS | {"score": score})))
    assert json.loads(text)["score"].hex() == score.hex()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"score": "31"}, "score is '31': input should be a valid number"),
        ({"score": True}, "score is True: input should be a valid number"),
        ({"seed": 1.0}, "seed is 1.0: input should be a valid integer"),
        ({"higher_is_better": 1}, "higher_is_better is 1: input should be a valid boolean"),
        ({"marks": "none"}, "marks is 'none': input should be a valid array"),
        ({"marks": [1]}, "marks.0 is 1: input should be a valid string"),
        ({"metrics": {"a": None}}, "metrics.a is None: input should be a valid number"),
        ({"density_actual": float("inf")}, "density_actual is inf: input should be a finite number"),
        ({"weight_sparsity": 1.5}, "weight_sparsity is 1.5: input should be less than or equal to 1"),
        ({"steps": 0}, "steps is 0: input should be greater than or equal to 1"),
        ({"feature_bits_paper": -1.0}, "feature_bits_paper is -1.0: input should be greater than or equal to 0"),
        ({"signature": "short"}, "signature is 'short': string should match pattern '^[0-9a-f]{64}$'"),
        ({"schema_version": 7}, "schema_version is 7, and this version of qprune reads 1"),
        ({"schema_version": 7, "score": None}, "schema_version is 7, and this version of qprune reads 1"),
        ({"colour": 1}, "'colour' is not a field of a result row"),
    ],
)
def test_loading_names_the_file_and_the_field(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = stored(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path).row()
    assert str(caught.value) == f"{path}: {said}; delete the file, or run its command again with force=true"


def test_loading_names_a_missing_field(tmp_path: Path) -> None:
    for name in FIELDS:
        (tmp_path / ROW_FILE).write_text(json.dumps({k: v for k, v in FIELDS.items() if k != name}), encoding="utf-8")
        with pytest.raises(UserError, match=f"the field {name} is missing"):
            RunFolder(tmp_path).row()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b'{"score": NaN}', b"[" * 100_000, b"[]", b"null"], ids=lambda c: repr(c[:12])
)
def test_broken_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ROW_FILE).write_bytes(content)
    with pytest.raises(UserError, match=ROW_FILE):
        RunFolder(tmp_path).row()


def test_reading_a_folder_survives_bad_files_and_counts_a_run_once(tmp_path: Path) -> None:
    stored(tmp_path / "a")
    stored(tmp_path / "b", signature="f" * 64, seed=1)
    stored(tmp_path / "copy of a")
    stored(tmp_path / "d", score=None)
    (tmp_path / "d" / "other.json").write_text("{", encoding="utf-8")
    rows, problems = read_rows(tmp_path)
    assert [row.seed for row in rows] == [0, 1]
    assert problems == [
        (
            f"{tmp_path}/copy of a/result.json has the signature of {tmp_path}/a/result.json and is left out; "
            "delete one of them"
        ),
        (
            f"{tmp_path}/d/result.json: score is None: input should be a valid number; delete the file, or run its "
            "command again with force=true"
        ),
    ]


def test_a_run_that_ends_without_a_number_fails_and_stores_nothing() -> None:
    with pytest.raises(RunFailure, match="cannot be stored: score is nan: input should be a finite number"):
        make_row(**FIELDS | {"score": float("nan")})


COSTS = {"macs": 2e6, "effective_macs": 5e5, "bops": 1.28e8, "effective_bops": 3.2e7, "accumulator_bits": 20}
COSTS |= {"weight_bytes": 4e5, "feature_bytes": 6e5, "energy_pj": 2.5e6}


def test_costs_and_masks_are_printed_where_a_row_has_them() -> None:
    fields = {"mask_bits_actual": 5e5, "density_with_masks": 8.5, "costs": COSTS, "density_effective_bops": None}
    row = parse_row(json_bytes(FIELDS | fields))
    assert row.costs == COSTS
    text = str(format_row(row)).splitlines()
    assert text[5:8] == [
        "  with masks stored: 0.500 Mb more, density 8.50",
        "  cost: 2.00 M products, 0.500 M effective; 0.128 GBOPs, 0.0320 effective",
        "  accumulators of 20 bits; 1.00 MB moved; 2.50 uJ by Horowitz's table; density per effective BOP -",
    ]


def test_a_row_is_printed_with_what_was_gained() -> None:
    assert str(format_row(ROW)) == "\n".join(
        [
            "espcn  P0.5(w,f)->Q8(w,f)  seed 0",
            "  psnr 31.03 dB, 22.0 Mb (2.75 MB)",
            "  weights 1.00 Mb, features 20.0 Mb, input 1.00 Mb (Mb: 10^6 bits)",
            "  density 9.00; as the paper counts, 8.00 at 2.09 Mb",
            "  zeros: weights 50 %, features 25 %; 200 epochs, 64 steps",
            "  not comparable with the paper: checksum of set5 differs",
        ]
    )
    whole = {"float_bits_actual": 127.1e6, "density_unit": "dB/ln(Mb)"}
    text = str(
        format_row(Row(**FIELDS | whole | {"signature": "f" * 64}), Row(**FIELDS | {"score": 32.84} | whole | ALL))
    )
    assert "\n  psnr 31.03 dB (float 32.84 dB), 5.8 times smaller: 22.0 of 127 Mb (2.75 of 15.9 MB)\n" in text
    assert "\n  density 9.00 dB/ln(Mb); as the paper counts, 8.00 dB/ln(Mb) at 2.09 Mb\n" in text


@pytest.mark.parametrize(
    ("value", "count", "text"),
    [
        (7.3, 3, "7.30"),
        (127.1, 3, "127"),
        (0.090916, 3, "0.0909"),
        (1271.0, 3, "1,271"),
        (5.78, 2, "5.8"),
        (0.0, 3, "0.00"),
    ],
)
def test_numbers_keep_their_digits(value: float, count: int, text: str) -> None:
    assert digits(value, count) == text


@pytest.mark.parametrize(
    ("metric", "score", "text"),
    [
        ("psnr_db", 31.4, "psnr 31.40 dB"),
        ("top1_percent", 92.6, "top1 92.60 %"),
        ("fid", 119.9, "fid 119.90"),
        ("map_percent", 0.0019, "map 0.00190 %"),
    ],
)
def test_scores_have_their_unit(metric: str, score: float, text: str) -> None:
    assert score_text(metric, score) == text
