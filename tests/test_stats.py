"""Intervals, distances and tables: defining equations, other ways to the same number."""
import csv
import io
import math

import pytest
import torch

from plumbing.stats import as_csv, as_markdown, bootstrap, frechet, wilson

Z = 1.959964


@pytest.mark.parametrize("right, n", [(0, 1), (1, 1), (0, 20), (20, 20), (1, 20), (7, 20), (777, 2000)])
def test_wilsons_bounds_solve_their_defining_equation(right, n):
    mean, bounds = right / n, wilson(right / n, n)
    for p in bounds:
        assert (mean - p) ** 2 == pytest.approx(Z ** 2 * p * (1 - p) / n, abs=1e-9)
    low, high = bounds
    assert 0 <= low <= mean <= high <= 1 and low < high
    assert wilson(1 - mean, n) == pytest.approx((1 - high, 1 - low))


def test_wilson_leaves_room_at_0_and_at_n_successes():
    assert wilson(0, 20) == pytest.approx((0, Z ** 2 / (20 + Z ** 2)))
    assert wilson(1, 20) == pytest.approx((20 / (20 + Z ** 2), 1))


def test_the_ten_way_count_is_explained_where_it_is_printed():
    rows = [{"counted": "top-1", "Acc_e": [1.0, 0.0, 2.0]}, {"counted": "ten-way", "Acc_e": [1.0, 0.0, 2.0]}]
    assert "plain sky counts as an airplane" in as_markdown(rows) and "sky" not in as_markdown(rows[:1])


def mean_of(m):
    return m[""]


def test_bootstrap_is_near_the_normal_approximation_and_always_the_same():
    x = (torch.arange(400) % 10 < 3).float()
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    low, high = bootstrap([{"": x}], mean_of)
    assert low == pytest.approx(0.3 - half, abs=0.006) and high == pytest.approx(0.3 + half, abs=0.006)
    assert bootstrap([{"": x}], mean_of) == (low, high)
    four = bootstrap([{"": x}] * 4, mean_of)                      # drawn apart: the errors average out
    assert four[1] - four[0] == pytest.approx(half, rel=0.15) and four[0] < 0.3 < four[1]


def test_bootstrap_of_constants_has_no_width():
    assert bootstrap([{"": torch.full((9,), 0.25)}], mean_of) == (0.25, 0.25)


def test_bootstrap_hands_the_means_of_all_groups_to_the_statistic():
    low, high = bootstrap([{"a": torch.full((3,), 0.5), "b": torch.full((7,), 0.125)}],
                          lambda m: m["a"] - m["b"])
    assert low == high == 0.375


def cloud(seed, n=200, width=6):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(n, width, generator=generator, dtype=torch.float64) @ mix + seed


def test_frechet_equals_a_naive_computation_and_is_symmetric():
    a, b = cloud(1), cloud(2, n=150)
    covariances = [(x - x.mean(0)).T @ (x - x.mean(0)) / (len(x) - 1) for x in (a, b)]
    values, vectors = torch.linalg.eig(covariances[0] @ covariances[1])
    root = (vectors @ values.sqrt().diag() @ torch.linalg.inv(vectors)).real
    naive = (a.mean(0) - b.mean(0)).square().sum() + (covariances[0] + covariances[1] - 2 * root).trace()
    assert frechet(a, b) == pytest.approx(naive.item(), rel=1e-8)
    assert frechet(b, a) == pytest.approx(frechet(a, b), rel=1e-8)


def test_frechet_of_diagonal_gaussians_has_a_closed_form():
    a, b = (torch.linalg.qr(x - x.mean(0)).Q * math.sqrt(len(x) - 1) for x in (cloud(1), cloud(2)))
    scale_a, scale_b = torch.tensor([1., 2, 3, 4, 5, 6]), torch.tensor([6., 1, 3, 2, 5, 0])
    shift = torch.tensor([1., 0, -2, 0, 0, 3])
    expected = shift.square().sum() + (scale_a - scale_b).square().sum()
    assert frechet(a * scale_a + shift, b * scale_b) == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_of_a_cloud_and_itself_is_0_even_with_fewer_points_than_dimensions():
    few = cloud(3, n=4)
    assert frechet(cloud(1), cloud(1)) == pytest.approx(0, abs=1e-8)
    assert frechet(few, few) == pytest.approx(0, abs=1e-5)
    assert frechet(few, few + 1) == pytest.approx(6, rel=1e-5)


ROWS = [{"erased": "cat, and dog", "H_o": [50.0, 40.25, 60.5]}, {"erased": "ship", "drift": 0.125},
        {"erased": "bird", "H_o": [7.0, 6.0, 8.0], "drift": 1}]


def test_csv_has_three_columns_for_an_interval_and_empty_missing_cells():
    text = as_csv(ROWS)
    assert text.splitlines()[0] == "erased,H_o,H_o low,H_o high,drift" and "\r" not in text
    back = list(csv.DictReader(io.StringIO(text)))
    assert [row["erased"] for row in back] == ["cat, and dog", "ship", "bird"]
    assert [float(back[0][name]) for name in ("H_o", "H_o low", "H_o high")] == ROWS[0]["H_o"]
    assert back[0]["drift"] == back[1]["H_o"] == back[1]["H_o high"] == "" and back[2]["drift"] == "1"


def test_no_prompt_ends_a_cell_or_a_line():
    assert as_markdown([{"prompt": "a | b\nc"}]).splitlines()[2] == "| a \\| b c |"


def test_markdown_has_one_cell_for_an_interval_and_dashes_for_missing_ones():
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in as_markdown(ROWS).splitlines()]
    assert lines == [["erased", "H_o", "drift"], ["---"] * 3, ["cat, and dog", "50.0 (40.2–60.5)", "–"],
                     ["ship", "–", "0.125"], ["bird", "7.0 (6.0–8.0)", "1"]]
