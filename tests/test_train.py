"""What train.py promises: schedules, measurements, the record of a run."""

import contextlib
import csv
import json
import math
import subprocess
import sys

import pytest
import torch

import train
from data import BadInput, PretrainingDataset, collate
from switchbert import MATCH, SwitchBertForPretraining, SwitchBertForRetrieval, temperature


@pytest.mark.parametrize(
    "step, share", [(0, 0.01), (49, 0.5), (99, 1.0), (550, 0.5), (775, 0.25), (1000, 0.0)])
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
    image_hits = [image_of_text[t]
        in sorted(range(images), key=lambda i: (-scores[t][i], image_of_text[t] == i))[:k]
        for t in range(texts)]
    text_hits = [
        any(image_of_text[t] == i
            for t in sorted(range(texts), key=lambda t: (-scores[t][i], image_of_text[t] == i))[:k])
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
    return SwitchBertForPretraining(train.model_config("small", store, tokenizer, "learned"))


def test_match_scores_are_the_log_odds_of_each_pair_alone(model, store, tokenizer):
    texts, ids = ["a red ring", "a large blue circle left of the ring"], ["4", "0", "7"]
    ranker = SwitchBertForRetrieval.from_pretraining(model.config, model.state_dict())
    scores = train.match_scores(ranker, store, tokenizer, texts, ids)
    for t, text in enumerate(texts):
        for i, image_id in enumerate(ids):
            alone = train.match_scores(ranker, store, tokenizer, [text], [image_id])
            assert scores[t, i].item() == pytest.approx(alone.item(), abs=1e-5)
    pair = PretrainingDataset(
        store, [("4", texts[0]), ("0", "a")], tokenizer, mismatch=0, masking=False)
    p = model.eval()(**train.collate([pair[0]])).match_probability
    assert scores[0, 0].item() == pytest.approx(torch.logit(p).item(), abs=1e-4)


def test_an_evaluation_does_not_depend_on_its_batches(model, dataset):
    one, switches = train.evaluate(model, dataset, batch_size=7)
    two, same = train.evaluate(model, dataset, batch_size=30)
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


def test_a_step_is_the_same_pairs_for_any_number_of_processes_and_parts(monkeypatch):
    def batch(step, processes, accum):
        keys = []
        for number in range(processes):
            monkeypatch.setattr(train, "rank", lambda number=number: number)
            monkeypatch.setattr(train, "world_size", lambda: processes)
            parts = train.Parts(50, 12, 2, seed=3, accum=accum)
            keys += [k for part in parts.keys(step) for k in part]
        return keys

    for step in (0, 3, 4, 7):
        assert batch(step, 1, 1) == batch(step, 2, 1) == batch(step, 1, 3) == batch(step, 2, 3)
    steps = range(4), range(4, 8)
    first, second = ([k for s in epoch for k in batch(s, 1, 1)] for epoch in steps)
    assert {e for e, _ in first} == {0} and {e for e, _ in second} == {1}
    assert len({i for _, i in first}) == 48 and first != [(0, i) for _, i in second]


def test_a_resumed_run_goes_on_with_the_next_pairs():
    whole, rest = train.Parts(50, 12, 2, 3), train.Parts(50, 12, 2, 3, first_step=5)
    assert list(whole)[5:] == list(rest) and len(rest) == 3


def test_batches_that_cannot_be_made_are_refused():
    with pytest.raises(BadInput, match="--batch 64: there are only 50 pairs"):
        train.Parts(50, 64, 1, 0)
    with pytest.raises(BadInput, match="--batch 10 cannot be cut into 1 processes x --accum 3"):
        train.Parts(50, 10, 1, 0, accum=3)


def test_a_step_in_parts_has_the_gradients_of_the_whole_batch(model, dataset):
    """Against autograd on the joint batch; the parts hold different numbers of masked places."""
    examples = [dataset[i] for i in range(12)]
    model.eval()  # no noise: every way of computing must give the same
    losses = model(**collate(examples)).losses
    expected = torch.autograd.grad(losses.sum(), list(model.parameters()), allow_unused=True)
    parts = [collate(examples[i : i + 3]) for i in (0, 3, 6, 9)]
    assert len({tuple(train.Pretraining.counts(p).tolist()) for p in parts}) > 1
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    no_autocast = contextlib.nullcontext()
    found = train.train_step(
        train.Pretraining, model, optimizer, parts, range(4), 0, 0, None, no_autocast)
    torch.testing.assert_close(found, losses.detach(), rtol=1e-4, atol=1e-5)
    norm = torch.stack([g.norm() for g in expected if g is not None]).norm()
    for old, new, gradient in zip(before, model.parameters(), expected):
        step = 0 if gradient is None else gradient * min(1, 5.0 / norm)
        torch.testing.assert_close(old - new, torch.zeros_like(old) + step, rtol=1e-3, atol=1e-5)


def test_the_temperature_of_a_toy_run_reaches_its_floor_at_90_percent():
    args = train.parse_args([])
    args.anneal, args.batch = 0.9, 8
    rate = train.temperature_rate(args, steps=20)
    taus = [temperature(step * 8, rate=rate) for step in range(20)]
    assert taus[0] == 5.0 and taus[17] > 0.2 + 1e-6 and taus[18] == pytest.approx(0.2)
    args.anneal = None
    assert train.temperature_rate(args, steps=20) == 1e-6


@pytest.fixture
def run(monkeypatch, store, tokenizer, tmp_path):
    """run(*flags): a whole run of 6 steps with the made-up store in the place of the toy world."""
    made_up = train.Data(store, CAPTIONS, CAPTIONS, tokenizer, True)
    monkeypatch.setattr(train, "load_data", lambda *_: made_up)

    def start(*flags):
        size = ["--batch", "10", "--epochs", "2", "--eval-every", "3"]
        standard = ["--out", str(tmp_path / "run"), *size]
        return train.pretrain(train.parse_args([*standard, *flags]))

    return start


def test_a_run_leaves_its_record(run, model, tmp_path, capsys):
    scores, out = run(), tmp_path / "run"
    names = ["checkpoint.previous.pt", "checkpoint.pt", "config.json", "metrics.csv"]
    names.append("switches.png")
    assert sorted(p.name for p in out.iterdir()) == names
    rows = list(csv.DictReader(open(out / "metrics.csv")))
    assert [r["step"] for r in rows] == ["3", "6"] and [r["pairs"] for r in rows] == ["30", "60"]
    assert all(math.isfinite(float(v)) for r in rows for v in r.values())
    for layer in range(1, 5):
        for modality in ("text", "vision"):
            name = f"layer{layer} {modality}"
            mine = [float(v) for k, v in rows[0].items() if k.startswith(name)]
            assert len(mine) == 3 + layer and sum(mine) == pytest.approx(2)
    config = json.loads((out / "config.json").read_text())
    assert config["model"]["switches"] == "learned" and config["settings"]["batch"] == 10
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    kind = {"detector": "made up", "feature_size": 12, "num_region_classes": 7, "class_names": []}
    assert checkpoint["store"] == kind
    assert checkpoint["step"] == 6 and checkpoint["pairs_seen"] == 60
    model.load_state_dict(checkpoint["model"])
    assert 0 <= scores["text_only_mlm_accuracy"] <= 1


def flat(path):
    return torch.cat([w.flatten() for w in torch.load(path, weights_only=True)["model"].values()])


def test_the_same_seed_gives_the_same_weights(run, tmp_path):
    weights = []
    for seed in ("0", "0", "1"):
        run("--seed", seed)
        weights.append(flat(tmp_path / "run" / "checkpoint.pt"))
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


def test_a_new_run_moves_an_earlier_one_aside(run, tmp_path, capsys):
    run()
    first = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    run("--seed", "1")
    run("--seed", "2")
    assert f"{tmp_path}/run is now in {tmp_path}/run-2" in capsys.readouterr().out
    assert (tmp_path / "run-1" / "checkpoint.pt").read_bytes() == first
    assert (tmp_path / "run-2" / "metrics.csv").exists()


def test_a_checkpoint_that_is_cut_off_is_recognised_and_the_one_before_used(run, tmp_path, capsys):
    run()
    path = tmp_path / "run" / "checkpoint.pt"
    whole, expected = path.read_bytes(), flat(path)
    path.write_bytes(whole[: len(whole) // 2])
    run("--resume")
    assert f"{path}: not a whole checkpoint" in (said := capsys.readouterr().out)
    assert "resuming after step 3" in said
    assert flat(path).equal(expected)
    for problem in (b"", b"hello", whole[:-1000]):
        path.write_bytes(problem)
        path.with_suffix(".previous.pt").unlink(missing_ok=True)
        with pytest.raises(BadInput, match="not a whole checkpoint.*previous.pt: there is no"):
            run("--resume")


def test_a_checkpoint_is_only_values_and_tensors_and_pickles_are_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("owned").touch, ())

    torch.save({"format": train.CHECKPOINT_FORMAT, "model": Evil()}, tmp_path / "c.pt")
    with pytest.raises(BadInput, match="not a whole checkpoint"):
        train.load_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "owned").exists()


def test_what_makes_a_run_cannot_change_when_it_is_resumed(run, tmp_path):
    run()
    for flags, message in ((("--lr", "0.5"), "--lr 0.5: the run that is resumed has 0.001"),
            (("--epochs", "3"), "--epochs 3: the run that is resumed has 2")):
        with pytest.raises(BadInput, match=message):
            run("--resume", *flags)


def test_a_store_of_other_regions_is_refused_and_both_sides_named(store, tokenizer, monkeypatch):
    ours = {"feature_size": 2048, "num_region_classes": 1601, "detector": "vg", "class_names": []}
    with pytest.raises(BadInput, match="feature_size is 12, but .* trained with 2048"):
        train.check_fits({"store": ours, "vocab": []}, store, tokenizer)
    ours = {k: store.meta[k] for k in ours}
    train.check_fits({"store": ours, "vocab": tokenizer.pieces}, store, tokenizer)
    monkeypatch.setitem(store.meta, "class_names", ["background", "cat"])
    renamed = ours | {"class_names": ["background", "dog"]}
    with pytest.raises(BadInput, match="class 1 is 'cat', but .* trained with 'dog'"):
        train.check_fits({"store": renamed, "vocab": tokenizer.pieces}, store, tokenizer)
    ours["class_names"] = ["background", "cat"]
    with pytest.raises(BadInput, match="is not the checkpoint's, of 1"):
        train.check_fits({"store": ours, "vocab": ["x"]}, store, tokenizer)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_pairs(run, tmp_path, monkeypatch):
    step, calls = train.train_step, []

    def poisoned(task, model, optimizer, batches, *rest):
        calls.append(1)
        if len(calls) == 5:
            batches[0]["region_features"][0] = float("nan")
        return step(task, model, optimizer, batches, *rest)

    monkeypatch.setattr(train, "train_step", poisoned)
    with pytest.raises(BadInput, match=r"step 5: .* not finite \(mlm .*, itm nan\).*images"):
        run()
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 3
    assert all(w.isfinite().all() for w in checkpoint["model"].values())


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    train.save_checkpoint(path, {"format": train.CHECKPOINT_FORMAT, "step": 1})

    def no_space(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        train.save_checkpoint(path, {"format": train.CHECKPOINT_FORMAT, "step": 2})
    assert train.load_checkpoint(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    path = tmp_path / "c.pt"
    train.save_checkpoint(path, {"format": train.CHECKPOINT_FORMAT, "step": 1})
    path.rename(path.with_suffix(".previous.pt"))
    assert train.load_checkpoint(path)["step"] == 1


def test_the_picture_shows_each_share_as_a_length():
    """Layer 1, text: 25 % own, 75 % both. The bar has a quarter blue and three quarters green."""
    modes = [[[0.25, 0, 0.75], [0, 1.0, 0]], [[1.0, 0, 0], [0, 0, 1.0]]]
    depths = [[[1.0], [1.0]], [[0.5, 0.5], [0, 1.0]]]
    image = train.switches_picture({"modes": modes, "depths": depths}, "title")
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

    monkeypatch.setattr(train, "pretrain", fail)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit, match="^error: x.tsv: line 3 has no tab$"):
        train.main()
