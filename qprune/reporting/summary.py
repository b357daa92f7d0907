"""The report's first lines: for each task the float network and the compressed models to look at first."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from qprune.reporting.plotting import with_unit
from qprune.runs.row import Row
from qprune.runs.row_text import digits, size_bits

HEADINGS = ("model", "recipe", "score", "size Mb", "smaller", "density")
LOSS = 0.01  # of the float network's score, that the smallest model may lose


def summaries(
    rows: Sequence[Row], recipes: Callable[[Sequence[Row]], Mapping[str, str]], names: Mapping[str, str] = {}
) -> Iterator[dict[str, Any]]:
    """Summarize each task: the group of most runs of one budget, data and arithmetic, those without notes first.

    recipes: names the recipe of each run of a group, by signature. names: of scores by metric.
    """
    groups: dict[str, dict[tuple[str, str, str, int], list[Row]]] = {}
    for row in rows:
        key = (row.budget, row.data_source, row.metric, row.arithmetic)
        groups.setdefault(row.task, {}).setdefault(key, []).append(row)
    chosen = [min(found.values(), key=_rank) for found in groups.values()]
    for group in sorted(chosen, key=_rank):
        row = group[0]
        heading = f"{row.task}, budget {row.budget}, {row.data_source} data: score is {with_unit(row.metric, names)}"
        lines, name = list(_lines(group, recipes(group))), f"{row.task}-{row.budget}-{row.data_source}"
        yield {"heading": heading, "headings": HEADINGS, "lines": lines, "name": name}


def _rank(group: Sequence[Row]) -> tuple[bool, int]:
    return bool(group[0].marks), -len(group)


def _lines(group: Sequence[Row], recipes: Mapping[str, str]) -> Iterator[list[str]]:
    cells = [(recipes[row.signature], row.score, size_bits(row) / 1e6, row.density_actual) for row in group]
    runs = pd.DataFrame(cells, columns=["recipe", "score", "size", "density"])
    how = {"score": ["mean", "std", "count"], "size": "mean", "density": "mean"}
    models = runs.groupby("recipe", sort=False).agg(how).set_axis(["score", "sd", "n", "size", "density"], axis=1)
    sign = 1 if group[0].higher_is_better else -1
    floats, packed = models[models.index == "Baseline"], models[models.index != "Baseline"]
    whole = floats.iloc[0] if len(floats) else None
    chosen = {} if whole is None else {"float network": whole}
    if len(packed):
        chosen["best score"] = packed.sort_values("score", ascending=sign < 0).iloc[0]
        chosen["densest"] = packed.sort_values("density").iloc[-1]
    if whole is not None:
        good = packed[sign * (packed["score"] - whole["score"]) >= -LOSS * abs(whole["score"])]
        if len(good):
            chosen[f"smallest that loses at most {LOSS:.0%}"] = good.sort_values("size").iloc[0]
    for name, model in chosen.items():
        spread = f" ± {model['sd']:.2f}" if model["n"] > 1 else ""
        score = f"{model['score']:.2f}{spread}, n = {model['n']:.0f}"
        ratio = "" if whole is None or model is whole else f"{digits(whole['size'] / model['size'], 2)} times"
        yield [name, str(model.name), score, digits(model["size"]), ratio, digits(model["density"])]
