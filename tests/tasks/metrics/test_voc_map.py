"""Average precision against cases worked by hand and against a library's precisions and recalls."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.classification import binary_precision_recall_curve

from qprune.tasks.metrics.voc_map import Found, Truth, eleven_points, voc07_average_precisions

BOX, ELSEWHERE = [10.0, 10.0, 20.0, 20.0], [50.0, 50.0, 60.0, 60.0]


def truth(*boxes: list[float], label: int = 1, difficult: tuple[int, ...] = ()) -> Truth:
    flags = torch.zeros(len(boxes), dtype=torch.bool)
    flags[list(difficult)] = True
    return Truth(torch.tensor(boxes).reshape(-1, 4), torch.full((len(boxes),), label), flags)


def found(*scored: tuple[list[float], float], label: int = 1) -> Found:
    boxes = torch.tensor([box for box, _ in scored]).reshape(-1, 4)
    return Found(boxes, torch.full((len(scored),), label), torch.tensor([score for _, score in scored]))


def test_right_wrong_right_of_two_objects() -> None:
    """Recall 0.5 at precision 1, recall 1 at precision 2/3: six points of 1 and five of 2/3."""
    detections = [found((BOX, 0.9), (ELSEWHERE, 0.8)), found((BOX, 0.7))]
    expected = (6 * 1 + 5 * 2 / 3) / 11
    assert voc07_average_precisions(detections, [truth(BOX), truth(BOX)]) == {1: pytest.approx(expected)}


def test_one_of_three_objects_reaches_recalls_up_to_a_third() -> None:
    detections = [found((BOX, 0.9)), found(), found()]
    assert voc07_average_precisions(detections, [truth(BOX)] * 3) == {1: pytest.approx(4 / 11)}


def test_three_of_ten_is_a_recall_of_three_tenths() -> None:
    assert eleven_points(torch.tensor([True, True, True]), objects=10) == pytest.approx(4 / 11)


def test_a_better_precision_at_a_higher_recall_counts_for_the_lower_ones() -> None:
    """Wrong, right, right, right of three: precisions 0, 1/2, 2/3, 3/4, the best at full recall."""
    assert eleven_points(torch.tensor([False, True, True, True]), objects=3) == pytest.approx(0.75)


def test_a_second_detection_of_an_object_is_wrong_even_when_it_fits_better() -> None:
    shifted = [11.0, 10.0, 21.0, 20.0]  # overlap 9/11
    detections = [found((shifted, 0.9), (BOX, 0.8)), found((BOX, 0.7))]
    expected = (6 * 1 + 5 * 2 / 3) / 11
    assert voc07_average_precisions(detections, [truth(BOX), truth(BOX)]) == {1: pytest.approx(expected)}


def test_a_detection_goes_for_the_object_it_overlaps_most_and_for_no_other() -> None:
    """Both detections overlap both objects by more than half; the second goes for an object that is taken."""
    left, right = [0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0]
    detections = [found((left, 0.9), ([0.2, 0.0, 10.2, 10.0], 0.8))]
    assert voc07_average_precisions(detections, [truth(left, right)]) == {1: pytest.approx(6 / 11)}


@pytest.mark.parametrize(("width", "right"), [(5.0, False), (5.1, True)])
def test_the_overlap_must_exceed_a_half(width: float, right: bool) -> None:
    detections = [found(([10.0, 10.0, 10.0 + width, 20.0], 0.9))]
    assert voc07_average_precisions(detections, [truth(BOX)]) == {1: float(right)}


def test_pixels_three_to_five_overlap_as_the_published_code_has_it() -> None:
    """Pixels 1..4 against 3..6 in one dimension of height 1: (4 - 3 + 1) / (4 + 4 - 2) with 1 added throughout."""
    boxes = torch.tensor([[0.0, 0.0, 4.0, 1.0]]), torch.tensor([[2.0, 0.0, 6.0, 1.0]])
    at = {o: voc07_average_precisions([Found(boxes[0], torch.tensor([1]), torch.ones(1))], [truth([2.0, 0, 6, 1])], o)
          for o in (0.33, 0.34)}  # fmt: skip
    assert at == {0.33: {1: 1.0}, 0.34: {1: 0.0}}


def test_difficult_objects_count_neither_way() -> None:
    detections = [found((ELSEWHERE, 0.9), (ELSEWHERE, 0.85), (BOX, 0.8))]
    assert voc07_average_precisions(detections, [truth(BOX, ELSEWHERE, difficult=(1,))]) == {1: 1.0}
    assert voc07_average_precisions([found()], [truth(BOX, ELSEWHERE, difficult=(1,))]) == {1: 0.0}


def test_labels_are_kept_apart_and_those_without_an_object_have_no_precision() -> None:
    detections = [found((BOX, 0.9), label=2), found((BOX, 0.8), label=1)]
    targets = [truth(BOX, label=2), truth(BOX, label=3)]
    assert voc07_average_precisions(detections, targets) == {2: 1.0, 3: 0.0}
    only_difficult = [truth(BOX, label=4, difficult=(0,))]
    assert voc07_average_precisions([found((BOX, 0.9), label=4)], only_difficult) == {}


def test_an_object_without_any_detection_and_detections_without_any_object() -> None:
    assert voc07_average_precisions([found()], [truth(BOX)]) == {1: 0.0}
    assert voc07_average_precisions([found((BOX, 0.9))], [truth()]) == {}


def test_one_entry_per_image_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"zip\(\)"):
        voc07_average_precisions([found()], [truth(BOX), truth(BOX)])


def eleven_points_of_library(scores: Tensor, right: Tensor) -> float:
    """From the library's curve, on which all that is right is all there is to find, less the point it adds at 0."""
    precision, recall = (curve[:-1] for curve in binary_precision_recall_curve(scores, right.long())[:2])
    return sum(float(precision[recall >= step / 10 - 1e-6].max()) for step in range(11)) / 11


@given(st.lists(st.booleans(), min_size=1, max_size=40).filter(any), st.integers(0, 10_000))
def test_where_every_object_is_found_the_curve_is_the_library_s(right: list[bool], seed: int) -> None:
    """One image per detection, in any order; an image with a wrong detection shows nothing."""
    scores = torch.randperm(len(right), generator=torch.Generator().manual_seed(seed)) / 100 + 0.1
    detections = [found((BOX, float(score))) for score in scores]
    targets = [truth(BOX) if hit else truth() for hit in right]
    expected = eleven_points_of_library(scores, torch.tensor(right))
    assert voc07_average_precisions(detections, targets) == {1: pytest.approx(expected)}
