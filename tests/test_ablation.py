"""The ablation: its arithmetic by hand, its tables, and what it runs.

GROUP below is the example of most tests: three settings, two seeds of each, two measures. VQA's
accuracy of `learned` is .8 and .6. Both deviate from the mean, .7, by .1. Their standard deviation,
with n - 1 in the denominator, is .1414, and the standard error of the mean, the same divided by the
root of 2, is .1. Against `single`, .5 and .5, the differences are .3 and .1: .2 ± .1.
"""

import doctest
import json
import threading
from pathlib import Path

import pytest

import train
from data import BadInput
from tests.tools import ablation

ROOT = Path(__file__).parent.parent
CURVE = {
    "step": [225, 450],
    "words": [0.5, 0.6],
    "mrc": [2.5, 2.0],
    "match": [0.7, 0.8],
}
RECALLS = {"image R@1": 0.6, "text R@1": 0.5}
PRETRAINED = RECALLS | {"masked words": 0.7, "region KL": 2.0, "matching": 0.9}


def line(setting, seed=0, epochs=4, scores=RECALLS, path="JJ,JJ,JJ,JJ"):
    """A line of the results file."""
    found = {"path": path, "scores": scores, "curve": CURVE, "detector": 7}
    key = {"setting": setting, "seed": seed, "epochs": epochs}
    return key | found


def group(**scores):
    """Lines with VQA's accuracy and the region KL of these settings, one for each seed."""
    lines = []
    for setting, values in scores.items():
        for seed, (accuracy, divergence) in enumerate(values):
            measured = {"VQA": accuracy, "region KL": divergence}
            lines.append(line(setting, seed, scores=measured))
    return lines


def rows_of(lines):
    """The rows of these lines' table."""
    table = ablation.table(lines)
    return table.splitlines()


LEARNED = [(0.8, 2.0), (0.6, 1.8)]
SINGLE = [(0.5, 1.5), (0.5, 1.5)]
DUAL = [(0.7, 1.9), (0.3, 1.9)]
GROUP = group(learned=LEARNED, single=SINGLE, dual=DUAL)


def test_the_examples_in_its_docstrings_are_true():
    failed, tried = doctest.testmod(ablation)
    assert tried > 0
    assert failed == 0


# --- The arithmetic -------------------------------------------------------------------------------


def test_the_error_is_that_of_the_mean_and_unknown_for_one_value():
    assert ablation.mean_and_error([0.8, 0.6]) == pytest.approx((0.7, 0.1))
    assert ablation.mean_and_error([0.5]) == (0.5, None)


def test_a_difference_is_paired_by_seed():
    """The differences are .3 and .1; seed 2 has no partner."""
    one = {0: 0.8, 1: 0.6, 2: 0.1}
    other = {1: 0.5, 0: 0.5}  # in another order
    assert ablation.paired(one, other) == pytest.approx((0.2, 0.1))


def test_places_know_which_direction_is_better():
    """VQA .7 .5 .5: places 1, 2, 2; KL, lower is better, 1.9 1.5 1.9: places 2, 1, 2."""
    scores = ablation.scores_of(GROUP)
    places = ablation.mean_places(scores, ["learned", "single", "dual"])
    assert places == pytest.approx({"learned": 1.5, "single": 1.5, "dual": 2.0})


def test_places_are_over_the_measures_that_all_settings_have():
    """Were VQA counted, which `dual` has no score of, `learned` would have place 1.5."""
    scores = ablation.scores_of(GROUP)
    del scores["VQA"]["dual"]
    places = ablation.mean_places(scores, ["learned", "single", "dual"])
    assert places == {"learned": 2, "single": 1, "dual": 2}


@pytest.mark.parametrize("mean, error, sign, text", [
    (0.781, 0.012, "", ".781±.012"),
    (-0.02, 0.01, "+", "-.020±.010"),
    (0.02, 0, "+", "+.020±.000"),
    (0.02, None, "+", "+.020"),
    (9.5, 1.2, "", "9.500±1.200"),
    (0.9999, 0, "", "1.000±.000"),
])
def test_numbers_are_written_without_zeros_in_front(mean, error, sign, text):
    assert ablation.with_error((mean, error), sign) == text


# --- The tables and the figure --------------------------------------------------------------------


def test_the_table_has_the_best_fixed_structure_and_the_difference_to_it():
    table = rows_of(GROUP)
    assert table[0] == "| measure | learned | single | dual | learned - best fixed |"
    assert table[2] == "| region KL | 1.900±.100 | **1.500±.000** | 1.900±.000 | +.400±.100 |"
    assert table[3] == "| VQA | **.700±.100** | .500±.000 | .500±.200 | +.200±.100 |"
    assert table[4] == "| mean place | 1.5 | 1.5 | 2.0 |  |"


def test_a_path_is_a_fixed_structure_but_neither_the_chosen_one_nor_a_control_is():
    lines = []
    for setting, accuracy in (("II,XX", 0.9), ("learned", 0.8), ("chosen", 0.95),
            ("single+dropout", 0.97)):
        lines.append(line(setting, scores={"VQA": accuracy}))
    head, _, vqa, place = rows_of(lines)
    assert head == (
        "| measure | learned | chosen | single+dropout | II,XX | learned - best fixed |")
    assert vqa == "| VQA | .800 | .950 | **.970** | .900 | -.100 |"
    assert place == "| mean place | 2.0 |  |  | 1.0 |  |"


@pytest.mark.parametrize("setting", ["learned", "single", "chosen"])
def test_nothing_is_compared_where_there_is_no_rival(setting):
    table = rows_of([line(setting, scores={"VQA": 0.9})])
    assert table[2] == "| VQA | **.900** |  |"


def test_a_setting_without_a_score_leaves_its_cell_empty():
    lines = [line("learned", scores={"VQA": 0.8} | RECALLS), line("single")]
    table = rows_of(lines)
    assert table[4] == "| VQA | **.800** |  |  |"


def test_each_length_of_training_and_each_number_of_layers_has_a_table():
    results = [
        line("learned@12"),
        line("learned", epochs=16),
        line("single"),
        line("single@12"),
    ]
    heads = {}
    for title, table in ablation.tables(results).items():
        heads[title] = table.splitlines()[0]
    assert heads == {
        "4 layers, 900 steps": "| measure | single | learned - best fixed |",
        "4 layers, 3,600 steps": "| measure | learned | learned - best fixed |",
        "12 layers, 900 steps": "| measure | learned | single | learned - best fixed |",
    }


def test_a_table_whose_seeds_mix_detectors_says_so():
    """Seeds may have different detectors, but the settings of a seed may not."""
    other = {"detector": 8}
    apart = [line("learned"), line("dual"), line("learned", 1) | other, line("dual", 1) | other]
    assert list(ablation.tables(apart)) == ["4 layers, 900 steps"]
    title = "4 layers, 900 steps; not comparable, since detectors differ within seeds [1]"
    assert list(ablation.tables(apart + [line("single", 1)])) == [title]


def test_the_figure_has_curves_of_the_longest_runs_and_recalls_at_each_length():
    """Curves are means over seeds, from a quarter of the longest runs on: 225 of 900 steps."""
    other = line("learned", seed=1)
    other["curve"] = CURVE | {"words": [0.7, 0.9]}
    results = [line("learned"), other, line("dual", epochs=1)]
    points = ablation.points_of(results)
    first, second = points["masked words"]["learned"]
    assert first == pytest.approx((225, 0.6, 0))
    assert second == pytest.approx((450, 0.75, 0))
    recalls = points["text R@1"]
    assert recalls["learned"] == [(900, 0.5, 0)]
    assert recalls["dual"] == [(225, 0.5, 0)]
    assert ablation.draw(results).size == (828, 440)  # five panels and a legend


def test_the_figure_shows_neither_controls_nor_deeper_models_nor_the_first_quarter():
    results = [line("dual", epochs=16), line("dual+dropout", epochs=16), line("dual@12")]
    points = ablation.points_of(results)
    assert points["image R@1"] == {"dual": [(3600, 0.6, 0)]}
    assert points.keys() == RECALLS.keys()  # the curves end at step 450 of 3,600


def test_the_committed_results_are_those_that_are_shown():
    """All in the diary; in the README those of 3,600 steps and three structures."""
    results = ablation.read_results()
    diary = (ROOT / "tests" / "ABLATION.md").read_text(encoding="utf-8")
    for table in ablation.tables(results).values():
        assert table in diary
    three = [line for line in results if line["setting"] in ("learned", "single", "dual")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert ablation.tables(three)["4 layers, 3,600 steps"] in readme


# --- The runs -------------------------------------------------------------------------------------


DROPOUT = "hidden_dropout_prob=0.1 attention_probs_dropout_prob=0.1"


@pytest.mark.parametrize("setting, flags", [
    ("learned", "--switches learned"),
    ("II,XX,JJ,JJ", "--switches II,XX,JJ,JJ"),
    ("learned@12", "--switches learned --set num_hidden_layers=12"),
    ("dual+dropout", f"--switches dual --set {DROPOUT}"),
    ("dual+dropout@12", f"--switches dual --set {DROPOUT} num_hidden_layers=12"),
])
def test_a_setting_becomes_flags_of_train_py(setting, flags):
    switches = ablation.find_switches(setting, 0, 4, results=[])
    assert " ".join(ablation.train_flags(setting, switches)) == flags


def test_the_chosen_path_is_that_of_the_same_seed_length_and_number_of_layers():
    results = [
        line("learned", path="II"),
        line("learned", seed=1, path="XX"),
        line("learned", epochs=16, path="JJ"),
        line("learned@12", path="IX"),
    ]
    assert ablation.find_switches("chosen", 1, 4, results) == "XX"
    assert ablation.find_switches("chosen", 0, 16, results) == "JJ"
    assert ablation.find_switches("chosen@12", 0, 4, results) == "IX"
    missing = "path of learned with seed 2 and 4 epochs"
    with pytest.raises(BadInput, match=missing):
        ablation.find_switches("chosen", 2, 4, results)


def test_a_line_is_replaced_by_one_of_the_same_setting_seed_and_epochs_only(tmp_path):
    path = tmp_path / "results.jsonl"
    old = line("learned")
    others = [line("learned", seed=1), line("learned", epochs=16), line("dual")]
    for each in [old] + others:
        ablation.keep_line(each, path)
    assert ablation.read_results(path) == [old] + others
    new = line("learned", scores=PRETRAINED)
    ablation.keep_line(new, path)
    assert ablation.read_results(path) == [new] + others
    assert list(tmp_path.iterdir()) == [path]  # no temporary file


ALL_TASKS = ["vqa", "retrieval", "refer-25", "refer"]


@pytest.mark.parametrize("scores, tasks, missing", [
    ({}, False, ["pretrain"]),
    ({}, True, ["pretrain"] + ALL_TASKS),
    (PRETRAINED, False, []),
    (PRETRAINED, True, ALL_TASKS),
    (PRETRAINED | {"VQA": 0.8, "refer": 0.9}, True, ["retrieval", "refer-25"]),
])
def test_only_what_a_line_lacks_is_run(scores, tasks, missing):
    assert ablation.missing_parts(line("learned", scores=scores), tasks) == missing


@pytest.fixture
def commands(monkeypatch):
    """The commands that were called; in place of measuring, VQA has a score of .8."""
    called = []

    def call(work, words):
        called.append(words)
        if "measure" in words:
            return json.dumps({"scores": {"VQA": 0.8}})
        words[words.index("--out") + 1].mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(ablation, "call", call)
    return called


def test_a_finished_part_is_not_made_again_and_an_interrupted_one_is_resumed(tmp_path, commands):
    out = tmp_path / "refer"
    ablation.train_part(tmp_path, tmp_path, "refer", 3, ["--flag"])
    script, *words = commands[0]
    assert script == ROOT / "finetune.py"
    assert words == ["refer", "--flag", "--seed", 3, "--threads", 1, "--out", out]
    ablation.train_part(tmp_path, tmp_path, "refer", 3, ["--flag"])
    assert len(commands) == 1
    (out / "finished").unlink()
    (out / "checkpoint.pt").touch()
    ablation.train_part(tmp_path, tmp_path, "refer", 3, ["--flag"])
    assert commands[1] == commands[0] + ["--resume"]


def test_the_tasks_of_a_pretrained_run_are_added_to_its_line(tmp_path, monkeypatch, commands):
    """Only the tasks are measured; the scores of pretraining and the rest of the line stay."""
    old = line("single", seed=1, epochs=16, scores=PRETRAINED) | {"switches": "single"}
    kept = []
    monkeypatch.setattr(ablation, "read_results", lambda: [line("single"), old])
    monkeypatch.setattr(ablation, "keep_line", kept.append)
    args = ablation.parse_args(["--epochs", "16", "--tasks", "--work", str(tmp_path)])
    ablation.make_run("single", 1, args, threading.Lock())
    assert kept == [old | {"scores": PRETRAINED | {"VQA": 0.8}}]
    folder = tmp_path / "single-1-16"
    finished = sorted(path.parent.name for path in folder.glob("*/finished"))
    assert finished == ["pretrain", "refer", "refer-25", "retrieval", "vqa"]
    assert commands[-1][2:] == [folder] + ALL_TASKS


def test_a_run_whose_line_is_complete_is_not_made_again(monkeypatch, commands):
    monkeypatch.setattr(ablation, "read_results", lambda: [line("dual", scores=PRETRAINED)])
    ablation.make_run("dual", 0, ablation.parse_args([]), threading.Lock())
    assert commands == []


def test_the_curve_is_that_of_the_evaluations_in_a_metrics_file(tmp_path):
    """Lines of soft switches alone have no scores."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 30, "losses": {"mlm": 3.0}, "soft_switches": {}}\n'
        '{"step": 225, "scores": {"mlm": 1, "mrc": 2.5, "words": 0.5, "match": 0.7}}\n'
        '{"step": 450, "scores": {"mlm": 1, "mrc": 2.0, "words": 0.6, "match": 0.8}}\n')
    assert ablation.curve_of(train.read_metrics(tmp_path)) == CURVE
