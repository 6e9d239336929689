"""The ablation's arithmetic by hand, and the README's table as its results give it."""

from pathlib import Path

import ablation
import pytest

ROOT = Path(__file__).parent.parent


def line(setting, seed, **scores):
    return {"setting": setting, "seed": seed, "quick": False, "pairs per second": 100.0,
        "scores": {name.replace("_", " "): score for name, score in scores.items()}}


RESULTS = [line("learned", 0, VQA=0.8, region_KL=2.0), line("learned", 1, VQA=0.6, region_KL=1.8),
    line("single", 0, VQA=0.5, region_KL=1.5), line("single", 1, VQA=0.5, region_KL=1.5),
    line("dual", 0, VQA=0.7, region_KL=1.9), line("dual", 1, VQA=0.3, region_KL=1.9)]


def test_means_errors_and_differences_paired_by_seed():
    assert ablation.mean_and_error([0.8, 0.6]) == pytest.approx((0.7, 0.1))  # .1414 / sqrt 2
    assert ablation.mean_and_error([0.5]) == (0.5, 0)
    one, other = {0: 0.8, 1: 0.6, 2: 0.1}, {1: 0.5, 0: 0.5}
    assert ablation.paired(one, other) == pytest.approx((0.2, 0.1))  # of .3 and .1


def test_ranks_know_which_direction_is_better():
    """VQA .7 .5 .5: ranks 1, 2, 2; KL, lower is better, 1.9 1.5 1.9: ranks 2, 1, 2."""
    scores = ablation.scores_of(RESULTS)
    assert ablation.mean_ranks(scores, ["learned", "single", "dual"]) == pytest.approx(
        {"learned": 1.5, "single": 1.5, "dual": 2.0})


def test_the_table_has_the_best_fixed_structure_and_the_difference_to_it():
    table = ablation.table(RESULTS).splitlines()
    assert table[0] == "| measure | learned | single | dual | learned - best fixed |"
    assert table[2] == "| VQA | **.700±.100** | .500±.000 | .500±.200 | +.200±.100 |"
    assert table[3] == "| region KL | 1.900±.100 | **1.500±.000** | 1.900±.000 | +.400±.100 |"
    assert table[4] == "| mean rank | 1.5 | 1.5 | 2.0 |  |"


def test_a_path_is_a_fixed_structure_and_nothing_is_compared_where_there_is_no_rival():
    path = [line("II,XX", 0, VQA=0.9), line("learned", 0, VQA=0.8), line("chosen", 0, VQA=0.95)]
    table = ablation.table(path).splitlines()
    assert table[0] == "| measure | learned | chosen | II,XX | learned - best fixed |"
    assert table[2] == "| VQA | .800±.000 | **.950±.000** | .900±.000 | -.100±.000 |"
    assert table[3] == "| mean rank | 2.0 |  | 1.0 |  |"
    for alone in (path[1:], path[2:]):
        assert ablation.table(alone).splitlines()[2].endswith("**.950±.000** |  |")


@pytest.mark.parametrize("mean, error, sign, text", [(0.781, 0.012, "", ".781±.012"),
    (-0.02, 0.01, "+", "-.020±.010"), (0.02, 0, "+", "+.020±.000"), (9.5, 1.2, "", "9.500±1.200")])
def test_numbers_are_written_without_zeros_in_front(mean, error, sign, text):
    assert ablation.short(mean, error, sign) == text


def test_the_picture_has_a_panel_per_measure():
    assert ablation.draw(RESULTS, width=200, height=100).size == (400, 100)


def test_the_readme_shows_the_table_of_the_results_that_are_committed():
    table = ablation.table(ablation.read_results())
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")
