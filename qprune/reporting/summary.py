"""The report's first lines: for each task the float network and the compressed models to look at first."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from qprune.runs.row import Row
from qprune.runs.row_text import digits, score_text, size_bits

HEADINGS = ("model", "recipe", "score", "size Mb", "times smaller", "density")
LOSS = 0.01  # of the float network's score, that the smallest model may lose


def summaries(rows: Sequence[Row], recipes: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Summarize, for each task, the group of most runs with the same budget and data; those without notes first.

    recipes: the recipe of each run, by signature.
    """
    groups: dict[str, dict[tuple[str, str, str], list[Row]]] = {}
    for row in rows:
        key = (row.budget, row.data_source, row.metric)
        groups.setdefault(row.task, {}).setdefault(key, []).append(row)
    for task, found in groups.items():
        group = min(found.values(), key=lambda rows: (bool(rows[0].marks), -len(rows)))
        heading = f"{task}, {group[0].metric.replace('_', ' ')}, budget {group[0].budget}, {group[0].data_source} data"
        yield {"heading": heading, "headings": HEADINGS, "lines": list(_lines(group, recipes))}


def _lines(group: Sequence[Row], recipes: Mapping[str, str]) -> Iterator[list[str]]:
    cells = [(recipes[row.signature], row.score, size_bits(row) / 1e6, row.density_actual) for row in group]
    models = pd.DataFrame(cells, columns=["recipe", "score", "size", "density"]).groupby("recipe", sort=False)
    models = models.agg(
        score=("score", "mean"),
        sd=("score", "std"),
        n=("score", "count"),
        size=("size", "mean"),
        density=("density", "mean"),
    )
    sign, metric = 1 if group[0].higher_is_better else -1, group[0].metric
    floats, packed = models[models.index == "Baseline"], models[models.index != "Baseline"]
    whole = floats.iloc[0] if len(floats) else None
    chosen = {} if whole is None else {"float network": whole}
    if len(packed):
        chosen |= {
            "best score": packed.loc[(sign * packed["score"]).idxmax()],
            "densest": packed.loc[packed["density"].idxmax()],
        }
    if whole is not None:
        good = packed[sign * (packed["score"] - whole["score"]) >= -LOSS * abs(whole["score"])]
        if len(good):
            chosen[f"smallest that loses at most {LOSS:.0%}"] = good.loc[good["size"].idxmin()]
    for name, model in chosen.items():
        spread = f" ± {model['sd']:.2f}" if model["n"] > 1 else ""
        score = f"{score_text(metric, model['score'], name=False)}{spread} (n = {model['n']:.0f})"
        ratio = "" if whole is None or model is whole else digits(whole["size"] / model["size"], 2)
        yield [name, str(model.name), score, digits(model["size"]), ratio, digits(model["density"])]
