"""`qprune export` and `qprune verify` as they are typed: a real run, real files, and every way to be told no."""

import json
import re
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
import onnx

from qprune.cli import export as exporting
from qprune.cli import main as cli
from qprune.compression.convert import with_plain_weights
from qprune.runs.load import FinishedRun
from tests.cli.errors import error_of
from tests.docs.pages import blocks

KEYS = ("task=espcn", "data=synthetic", "budget=smoke", "trainer.threads=1", "budget.batch_size=4")
KEYS = (*KEYS, "budget.test_samples=1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two smoke runs of espcn on synthetic data: compressed (rounding to nearest), and the float baseline."""
    folder = tmp_path_factory.mktemp("exported") / "runs"
    nearest = ["order=prune_first", "quantize.rounding=nearest", "quantize.weight_axis=output"]
    for words in (nearest, ["order=baseline"]):
        assert cli.main(["run", *KEYS, *words, f"results_dir={folder}"]) == 0
    return folder


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """A copy of the compressed run to write into."""
    [folder] = runs.glob("espcn/prune_first-*")
    return Path(shutil.copytree(folder, tmp_path / "runs" / "espcn" / folder.name))


@pytest.fixture(scope="module")
def with_file(runs: Path) -> Path:
    """The compressed run with its file of integers."""
    [folder] = runs.glob("espcn/prune_first-*")
    copy = Path(shutil.copytree(folder, runs.parent / "exported" / "espcn" / folder.name))
    assert cli.main(["export", str(copy)]) == 0
    return copy


@pytest.fixture
def exported(with_file: Path, tmp_path: Path) -> Path:
    """A copy of it to write into."""
    return Path(shutil.copytree(with_file, tmp_path / "exported" / "espcn" / with_file.name))


def converted(run: Path) -> nn.Module:
    return with_plain_weights(FinishedRun.load(str(run), run.parent).task.network).eval()


REFERENCES = {
    "integer": "the integer network in PyTorch",
    "float": "the trained network",
    "qonnx": "the network in PyTorch with biases and norms behind sums",
}


@pytest.mark.parametrize("form", REFERENCES)
def test_an_exported_run_is_verified_and_the_figures_are_kept(
    form: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if form == "qonnx":
        pytest.importorskip("qonnx", reason="the extra `qonnx` is not installed")
    if form == "integer":  # the file is missing
        assert cli.main(["verify", str(run)]) == 0
        first, second, third, *_ = capsys.readouterr().out.splitlines()
        assert f"exported: {run / 'export' / 'integer.onnx'}" in (second, third)
    else:
        assert cli.main(["export", str(run), "--form", form]) == 0
        promise = {
            "float": "equality with PyTorch is not promised: a runtime fuses",
            "qonnx": "equal to PyTorch in every",
        }
        assert re.match(rf"{run / 'export' / form}.onnx: 0\.\d+ MB; {promise[form]}", capsys.readouterr().out)
        assert cli.main(["verify", str(run), "--form", form]) == 0
        first, second, *_ = capsys.readouterr().out.splitlines()
    found = json.loads((run / "export" / f"verified-{form}.json").read_text(encoding="utf-8"))
    elements = found["to_reference"]["elements"]
    assert elements > 1000
    score = re.escape(f"psnr_db {found['score_onnx']:.6g}")
    speed = r"(0\.\d\d of the float model's latency|\d+\.\d times slower than the float model); "
    speed = "" if form == "qonnx" else speed  # its executor computes node by node
    if form == "float":
        assert re.match(rf"not equal to {REFERENCES[form]}: [\d,]+ of {elements:,} outputs differ, by at most", first)
        assert re.match("equality is not promised: a runtime fuses .*; the bound of 1 LSB on the mean .* holds", second)
    else:
        expected = f"equal to {REFERENCES[form]}: 0 of {elements:,} outputs differ; "
        assert re.fullmatch(f"{expected}{speed}{score}(, [0-9.]+)? as trained", first)
        assert second == "equality is promised"
        assert found["to_reference"]["differing"] == 0
    assert (found["rounds"] == "", found["kept"]) == (form != "float", True)
    assert found["to_reference"]["mean_lsb"] < 0.1
    assert found["score_onnx"] == pytest.approx(found["score_trained"], abs=0.01)
    assert found["score_trained"] == pytest.approx(found["score_of_row"], abs=1e-4)
    assert (found["integer_layers"], found["float_layers"]) == (0, 3)  # ESPCN's grids stand behind tanh, not at sums
    assert all(min(times.values()) > 0 for times in found["latency_ms"].values())
    model = onnx.load(run / "export" / f"{form}.onnx")
    told = {p.key: p.value for p in model.metadata_props}
    assert told["qprune.recipe"] == "P0.5(w,f)->Q8(w,f)"
    assert told["qprune.signature"] == found["signature"]
    assert told["qprune.form"] == form


def test_a_file_that_answers_otherwise_breaks_the_promise(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = exported / "export" / "integer.onnx"
    model = onnx.load(path)
    integers = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    weight = max(integers, key=lambda tensor: len(tensor.raw_data))
    weight.raw_data = bytes(255 - byte for byte in weight.raw_data)
    onnx.save(model, path)
    capsys.readouterr()
    assert cli.main(["verify", str(exported), "--no-timing"]) == 1
    printed = capsys.readouterr().out
    assert "latency" not in printed
    assert re.match(
        "not equal to the integer network in PyTorch: [0-9,]+ of [0-9,]+ outputs differ, by at most .*\n"
        "equality is promised, and broken: write the file again with qprune export\n",
        printed,
    )
    found = json.loads((exported / "export" / "verified-integer.json").read_text(encoding="utf-8"))
    assert found["kept"] is False
    assert found["to_reference"]["differing"] > 0


def test_a_file_of_another_network_or_none_at_all_is_refused(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported / "export" / "integer.onnx"
    model = onnx.load(path)
    next(p for p in model.metadata_props if p.key == "qprune.network").value = "0" * 64
    onnx.save(model, path)
    capsys.readouterr()
    assert error_of(capsys, "verify", str(exported)) == (
        f"{path} was exported from another network than the run now has; write it again with qprune export"
    )
    path.write_bytes(b"nothing")
    error = error_of(capsys, "verify", str(exported))
    assert error.startswith(f"{path} cannot be loaded (")
    assert error.endswith("; write it again with qprune export")


def test_the_code_of_the_page_loads_what_was_exported(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(exported), "--form", "sparse"]) == 0
    for file in exported.glob("export/*"):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    library, in_onnx, sparse = (block.text for block in blocks("export", "python"))
    x = torch.rand(1, 1, 20, 20)
    names: dict[str, Any] = {
        "example": x,
        "pictures": x,
        "network": FinishedRun.load(str(exported), exported.parent).task.network,
    }
    # g++ takes a quarter of an hour and 5 GB for this network; tests/export/test_hls.py compiles smaller ones
    library = library.replace("export_hls4ml(network", "# export_hls4ml(network")
    exec(library, names)
    assert capsys.readouterr().out.startswith("Difference(elements=")
    names |= {"pictures": x.numpy(), "network": converted(exported)}
    exec(in_onnx, names)
    assert capsys.readouterr().out == "P0.5(w,f)->Q8(w,f)\n"
    with torch.no_grad():
        for parameter in names["network"].parameters():
            parameter.zero_()
        exec(sparse, names)
        torch.testing.assert_close(names["network"](x), torch.from_numpy(names["outputs"]), rtol=0, atol=0.02)


def test_a_signature_names_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    signature = run.name.rpartition("-")[2]
    runs = run.parent.parent
    where = f"results_dir={runs}"
    assert cli.main(["export", signature[:6], where, "--form", "sparse"]) == 0
    capsys.readouterr()
    assert error_of(capsys, "export", "0123456789", where) == (
        f"no finished run below {runs} has a signature that begins with 0123456789"
    )
    assert error_of(capsys, "verify", "nonsense", where).startswith("'nonsense' is neither a folder nor the beginning")
    assert "is no run folder" in error_of(capsys, "verify", str(runs))


def test_what_is_typed_wrong_is_told_with_what_is_legal(
    runs: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error_of(capsys, "export", str(run), "--form", "flaot") == (
        "--form='flaot' is not one of float, qdq, qonnx, integer, integers, sparse, hls4ml; did you mean 'float'?"
    )
    assert (
        error_of(capsys, "verify", str(run), "--form", "sparse")
        == "--form='sparse' is not one of float, qdq, qonnx, integer"
    )
    assert "--weights='x' is not one of auto, safe, signed" in error_of(capsys, "export", str(run), "--weights", "x")
    assert "'data.rot=1' is not KEY=VALUE with one of" in error_of(capsys, "export", str(run), "data.rot=1")
    assert not list(run.glob("export/*"))
    [baseline] = runs.glob("espcn/baseline-*")
    assert error_of(capsys, "export", str(baseline)) == (
        f"{baseline} is a run without operators: there is nothing compressed to export"
    )


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_names_the_extra(
    package: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find_spec(name: str) -> ModuleSpec | None:
        return None if name == package else ModuleSpec(name, None)

    monkeypatch.setattr(exporting, "find_spec", find_spec)
    for verb in ("export", "verify"):
        assert error_of(capsys, verb, str(run)) == f"{package} is not installed; type: pip install 'qprune[export]'"


def test_a_network_of_several_arguments_has_its_sparse_form_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["task=faster_rcnn", "data=synthetic", "budget=smoke", "order=quantize_only", "trainer.threads=1"]
    smaller = ["budget.epochs=1", "budget.steps_per_epoch=3", "budget.batch_size=1", "budget.test_samples=1"]
    assert cli.main(["run", *words, *smaller, f"results_dir={tmp_path}"]) == 0
    [folder] = tmp_path.glob("faster_rcnn/*")
    capsys.readouterr()
    for verb in ("export", "verify"):
        assert error_of(capsys, verb, str(folder)) == (
            "the network of the task faster_rcnn takes 3 arguments, and an ONNX file of qprune is a network from one "
            "tensor to one; qprune export --form sparse writes its weights and masks"
        )
    assert cli.main(["export", str(folder), "--form", "sparse"]) == 0
    assert (folder / "export" / "network.sparse.safetensors").stat().st_size > 0


def test_a_task_of_one_s_own_is_exported_with_the_flags_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("QPRUNE_TRUST", "two_rings")
    assert cli.main(["new", "task", "two_rings", "--folder", str(tmp_path)]) == 0
    flags, results = ["--config-dir", str(tmp_path / "configs")], tmp_path / "runs"
    words = ["task=two_rings", "budget=smoke", "trainer.threads=1", f"results_dir={results}"]
    assert cli.main(["run", *flags, *words, "quantize.rounding=floor"]) == 0
    [run] = results.glob("two_rings/*")
    capsys.readouterr()
    assert cli.main(["export", str(run), *flags, "--form", "qdq"]) == 0
    assert cli.main(["verify", str(run), *flags, "--form", "qdq", "--no-timing"]) == 0
    assert f"{run / 'export' / 'qdq.onnx'}: 0.0" in capsys.readouterr().out
