"""The metrics' arithmetic: rows that the paper prints, defining equations, other ways to the same number."""
import csv
import io
import math

import pytest
import torch

from eval_clip import h_o, harmonic, summary
from plumbing.stats import as_csv, as_markdown, bootstrap, frechet, wilson

Z = 1.959964


@pytest.mark.parametrize("who, e, s, g, printed", [
    ("MACE automobile", 6.97, 95.18, 14.22, 91.15), ("UCE airplane", 40.32, 98.79, 49.83, 64.09),
    ("UCE cat", 2.35, 98.02, 2.58, 97.70), ("MACE airplane", 9.06, 95.39, 10.03, 92.03),
    ("RealEra airplane", 3.38, 96.18, 8.87, 94.58), ("RealEra bird", 9.03, 94.08, 9.33, 91.88),
    ("ESD-u deer", 18.14, 73.81, 6.93, 82.17), ("MACE frog", 11.45, 97.75, 13.08, 90.83)])
def test_harmonic_mean_is_the_one_the_paper_prints(who, e, s, g, printed):
    assert 100 * harmonic(e / 100, s / 100, g / 100) == pytest.approx(printed, abs=0.011)  # they rounded, too


def test_harmonic_mean_is_0_where_one_part_fails_and_1_where_all_are_perfect():
    assert harmonic(1, 0.9, 0.1) == harmonic(0.1, 0, 0.1) == harmonic(0.1, 0.9, 1) == 0
    assert harmonic(0, 1, 0) == 1
    assert h_o({"e": 0.1, "s": 0.8, "g": 0.3, "a": 0.9}) == harmonic(0.1, 0.8, 0.3)


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


def made_up(seed, sizes=(20, 90, 60, 40), share=(0.2, 0.8, 0.3, 0.4)):
    generator = torch.Generator().manual_seed(seed)
    return {group: (torch.rand(n, generator=generator) < p).float()
            for group, n, p in zip("esga", sizes, share)}


def test_average_h_o_is_the_mean_of_rows_not_of_their_accuracies():
    rows = [made_up(0), made_up(1, sizes=(10, 45, 30, 20), share=(0.7, 0.5, 0.8, 0.9)), made_up(2)]
    found, single = summary(rows), [summary([row]) for row in rows]
    assert list(found) == ["Acc_e", "Acc_s", "Acc_g", "Acc_a", "H_o"]
    for name, (value, low, high) in found.items():
        assert value == pytest.approx(sum(row[name][0] for row in single) / 3, abs=0.011)
        assert low < value < high
    of_means = 100 * harmonic(*(found[f"Acc_{g}"][0] / 100 for g in "esg"))
    assert abs(found["H_o"][0] - of_means) > 1


def test_counts_of_equally_many_pictures_a_row_have_wilsons_interval_of_all():
    zeros = [{"e": torch.zeros(20), "s": torch.ones(9), "g": torch.zeros(6)} for _ in range(5)]
    found = summary(zeros)
    assert found["Acc_e"] == [0, 0, round(100 * wilson(0, 100)[1], 2)]
    assert found["Acc_s"] == [100, round(100 * wilson(1, 45)[0], 2), 100]
    found = summary([*zeros, zeros[0] | {"e": torch.ones(60)}])   # an average of rows, not of pictures
    assert found["Acc_e"][0] == pytest.approx(100 / 6, abs=0.01) and found["Acc_g"][2] > 0


def test_one_rows_counts_have_wilsons_interval_and_probabilities_a_bootstrapped_one():
    row = made_up(0) | {"a": torch.full((40,), 0.5)}
    found = summary([row])
    e = row["e"].mean().item()
    assert found["Acc_e"] == [round(100 * x, 2) for x in (e, *wilson(e, 20))]
    assert found["Acc_a"] == [50, 50, 50]
    assert found["H_o"][0] == pytest.approx(100 * h_o({g: x.mean().item() for g, x in row.items()}), abs=0.01)


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


def test_markdown_has_one_cell_for_an_interval_and_dashes_for_missing_ones():
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in as_markdown(ROWS).splitlines()]
    assert lines == [["erased", "H_o", "drift"], ["---"] * 3, ["cat, and dog", "50.0 (40.2–60.5)", "–"],
                     ["ship", "–", "0.125"], ["bird", "7.0 (6.0–8.0)", "1"]]
