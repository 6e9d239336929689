"""What train.py promises: schedules, measurements, the record of a run."""

import argparse
import csv
import json
import math
import subprocess
import sys

import pytest
import torch
from PIL import Image

import train
from data import BadInput, PretrainingDataset
from switchbert import MATCH, SwitchBertForPretraining


@pytest.mark.parametrize(
    "step, share", [(0, 0.01), (49, 0.5), (99, 1.0), (550, 0.5), (775, 0.25), (1000, 0.0)]
)
def test_learning_rate_table_of_a_thousand_steps(step, share):
    assert train.learning_rate(step, 1000, 2e-4) == pytest.approx(2e-4 * share)


def test_decay_spares_biases_and_norms_and_gates_learn_at_a_tenth(config):
    model = SwitchBertForPretraining(config)
    optimizer = train.make_optimizer(model, 1e-3)
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert len(group_of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = group_of[id(parameter)]
        spared = name.endswith("bias") or "norm" in name or name.endswith("transform.2.weight")
        assert group["weight_decay"] == (0 if spared else 0.01), name
        assert group["scale"] == (0.1 if "mode_gate" in name or "switch_input" in name else 1), name
    settings = optimizer.defaults
    assert settings["betas"] == (0.9, 0.999) and settings["eps"] == 1e-6


def brute_force_recall(scores, image_of_text, k):
    """Sort each query's candidates, the wrong ones first among equals, and look at the top k."""
    texts, images = len(scores), len(scores[0])
    image_hits = [
        image_of_text[t]
        in sorted(range(images), key=lambda i: (-scores[t][i], image_of_text[t] == i))[:k]
        for t in range(texts)
    ]
    text_hits = [
        any(
            image_of_text[t] == i
            for t in sorted(range(texts), key=lambda t: (-scores[t][i], image_of_text[t] == i))[:k]
        )
        for i in range(images)
    ]
    return sum(image_hits) / texts, sum(text_hits) / images


@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_recall_equals_a_brute_force_ranking_also_with_ties(levels):
    """Seven images with 1 to 3 texts each; few score levels make many ties."""
    image_of_text = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5, 6])
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randint(levels, (11, 7), generator=generator).float()
        found = train.recall_at(scores, image_of_text, ks=(1, 2, 5))
        for k in (1, 2, 5):
            expected = brute_force_recall(scores.tolist(), image_of_text.tolist(), k)
            assert (found[f"image R@{k}"], found[f"text R@{k}"]) == pytest.approx(expected)


def test_a_perfect_ranking_has_recall_one_and_a_constant_one_zero():
    assert set(train.recall_at(torch.eye(9), torch.arange(9)).values()) == {1.0}
    assert set(train.recall_at(torch.zeros(9, 9), torch.arange(9)).values()) == {0.0}


CAPTIONS = [(str(i), f"a {word} ring") for i in range(10) for word in ("small", "red", "large")]


@pytest.fixture
def dataset(store, tokenizer):
    return PretrainingDataset(store, CAPTIONS, tokenizer)


@pytest.fixture
def model(store, tokenizer):
    return SwitchBertForPretraining(train.toy_config(store, tokenizer, "learned"))


def test_match_scores_are_the_log_odds_of_each_pair_alone(model, store, tokenizer):
    texts, ids = ["a red ring", "a large blue circle left of the ring"], ["4", "0", "7"]
    scores = train.match_scores(model, store, tokenizer, texts, ids, "cpu", batch_size=4)
    for t, text in enumerate(texts):
        for i, image_id in enumerate(ids):
            alone = train.match_scores(model, store, tokenizer, [text], [image_id], "cpu")
            assert scores[t, i].item() == pytest.approx(alone.item(), abs=1e-5)
    pair = PretrainingDataset(
        store, [("4", texts[0]), ("0", "a")], tokenizer, mismatch=0, masking=False
    )
    p = model.eval()(**train.collate([pair[0]])).match_probability
    assert scores[0, 0].item() == pytest.approx(torch.logit(p).item(), abs=1e-4)


def test_an_evaluation_does_not_depend_on_its_batches(model, dataset):
    one, switches = train.evaluate(model, dataset, "cpu", batch_size=7)
    two, same = train.evaluate(model, dataset, "cpu", batch_size=30)
    assert one == pytest.approx(two, rel=1e-4)
    assert switches == same and len(switches["modes"]) == 4
    for shares in [*sum(switches["modes"], []), *sum(switches["depths"], [])]:
        assert sum(shares) == pytest.approx(1)


def test_a_model_without_pictures_sees_none(model, dataset):
    model.eval()
    batch = train.collate([dataset[i] for i in range(4)])
    blank = train.without_pictures(batch)
    other = train.without_pictures({**batch, "region_features": batch["region_features"] + 1})
    assert model(**blank).sums.equal(model(**other).sums)
    assert model(**blank).counts[1] == 0 and (blank["itm_labels"] == MATCH).all()


def settings(tmp_path, **changes):
    args = train.parse_args([])
    changes = {
        "steps": 20,
        "batch": 8,
        "eval_every": 10,
        "threads": 1,
        "out": tmp_path / "run",
        **changes,
    }
    return argparse.Namespace(**{**vars(args), "device": "cpu", **changes})


def test_a_step_sees_every_pair_once_an_epoch_in_a_new_order(dataset):
    def texts(seed):
        dataset.mismatch, dataset.masking = 0.0, False
        return [b["input_ids"] for b in train.batches(dataset, 6, 10, seed)]

    first, again = texts(0), texts(0)
    assert all(a.equal(b) for a, b in zip(first, again))
    epoch = [torch.cat(first[i : i + 3]).sort(dim=0)[0] for i in (0, 3)]
    assert epoch[0].equal(epoch[1]) and not torch.cat(first[:3]).equal(torch.cat(first[3:]))
    assert not torch.cat(texts(1)).equal(torch.cat(first))


def test_the_temperature_reaches_its_floor_at_90_percent(model, dataset, tmp_path):
    seen = []
    train.train(model, dataset, settings(tmp_path), on_step=lambda step, tau, out: seen.append(tau))
    assert seen[0] == 5.0 and len(seen) == 20
    assert seen[17] > 0.2 + 1e-6 and seen[18] == seen[19] == pytest.approx(0.2)
    assert all(b / a == pytest.approx(25 ** (-1 / 18)) for a, b in zip(seen[:18], seen[1:18]))


@pytest.fixture
def toy_run(monkeypatch, store, tokenizer, tmp_path):
    """A whole run, with the made-up store in the place of the toy world."""
    monkeypatch.setattr(train, "toy_world", lambda *_: (store, CAPTIONS, CAPTIONS, tokenizer))
    monkeypatch.setattr(train, "zero_shot", lambda *_: {"image R@1": 0.5})
    return train.run(settings(tmp_path)), tmp_path / "run"


def test_a_run_leaves_its_record(toy_run, model, capsys):
    scores, out = toy_run
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "metrics.csv",
        "switches.png",
    ]
    rows = list(csv.DictReader(open(out / "metrics.csv")))
    assert [r["step"] for r in rows] == ["10", "20"] and [r["pairs"] for r in rows] == ["80", "160"]
    assert all(math.isfinite(float(v)) for r in rows for v in r.values())
    assert json.loads((out / "config.json").read_text())["model"]["switches"] == "learned"
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    assert checkpoint["store"] == {
        "detector": "made up",
        "feature_size": 12,
        "num_region_classes": 7,
    }
    assert checkpoint["step"] == 20 and checkpoint["pairs_seen"] == 160
    model.load_state_dict(checkpoint["model"])
    assert 0 <= scores["text_only_mlm_accuracy"] <= 1


def test_the_same_seed_gives_the_same_weights(monkeypatch, store, tokenizer, tmp_path):
    monkeypatch.setattr(train, "toy_world", lambda *_: (store, CAPTIONS, CAPTIONS, tokenizer))
    monkeypatch.setattr(train, "zero_shot", lambda *_: {})
    monkeypatch.setattr(train, "text_only_accuracy", lambda *_: 0.0)
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.run(settings(tmp_path, steps=3, out=tmp_path / name, seed=seed))
        checkpoint = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]
        weights.append(torch.cat([w.flatten() for w in checkpoint.values()]))
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


def test_the_picture_shows_each_share_as_a_length(tmp_path):
    """Layer 1, text: 25 % own, 75 % both. The bar has a quarter blue and three quarters green."""
    modes = [[[0.25, 0, 0.75], [0, 1.0, 0]], [[1.0, 0, 0], [0, 0, 1.0]]]
    depths = [[[1.0], [1.0]], [[0.5, 0.5], [0, 1.0]]]
    train.draw_switches(tmp_path / "s.png", {"modes": modes, "depths": depths}, "title")
    image = Image.open(tmp_path / "s.png").convert("RGB")
    blue, orange, green = train.MODE_COLOURS.values()
    # the lowest line of the first bar is free of letters
    row = [image.getpixel((x, 120 + 33)) for x in range(image.width)]
    assert row.count(blue) == pytest.approx(0.25 * 260, abs=2)
    assert row.count(orange) == pytest.approx(260, abs=2)
    assert row.count(green) == pytest.approx(0.75 * 260, abs=2)


def test_nothing_but_the_extractor_needs_torchvision():
    code = "import sys, switchbert, data, train; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_bad_input_is_one_sentence_without_a_traceback(monkeypatch, capsys):
    def fail(args):
        raise BadInput("x.tsv: line 3 has no tab")

    monkeypatch.setattr(train, "run", fail)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit, match="^error: x.tsv: line 3 has no tab$"):
        train.main()
