"""What train.py promises: its loop, schedules, evaluation, data folders and records."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from test_switchbert import bert_weights, write_bert

import train
from data import SPECIALS, BadInput, FeatureStore, PretrainingDataset, collate
from switchbert import SwitchBertConfig, SwitchBertForPretraining, SwitchBertForRetrieval

# --- The loop, on the smallest task there is ------------------------------------------------------


class Plain(torch.utils.data.Dataset):
    """50 numbers x; one weight w, 1 at first; losses w x of all numbers and of the odd ones."""

    name, unit, loss_names = "pretraining", "numbers", ("all", "odd")
    clip, weight_decay, initial_temperature = 1.05, 0.0, 3.0
    gate_rate, evaluates_at_start, headline, labels = 0.1, False, str, None
    score, stop_at, not_a_number, lengths = 0.5, None, None, np.arange(50) % 7

    def __init__(self, store, tokenizer):
        self.store, self.tokenizer, self.examples = store, tokenizer, self
        self.model = torch.nn.Linear(1, 1, bias=False)
        self.model.config = SwitchBertConfig.tiny(num_hidden_layers=1)
        torch.nn.init.ones_(self.model.weight)
        self.keys, self.noise, self.taus = [], [], []

    def __len__(self):
        return 50

    def __getitem__(self, key):
        if len(self.keys) == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        self.keys.append(key)
        return math.nan if key == self.not_a_number else (7 * key[1] % 50) / 50, key[1] % 2 > 0

    def collate(self, examples):
        return dict(zip(("x", "odd"), map(torch.tensor, zip(*examples))))

    def counts(self, batch):
        return torch.tensor([len(batch["x"]), batch["odd"].sum()])

    def sums(self, model, batch, tau):
        self.noise.append(torch.rand(1).item())
        self.taus.append(tau)
        loss, n = model(batch["x"][:, None])[:, 0], len(batch["x"])
        out = SimpleNamespace(modes=torch.full((n, 1, 2, 3), 1 / 3), depths=[torch.ones(n, 2, 1)])
        return torch.stack([loss.sum(), loss[batch["odd"]].sum()]), out

    def evaluate(self, model):
        return {"score": self.score}, {"modes": [], "depths": []}


@pytest.fixture
def plain(store, tokenizer, tmp_path, monkeypatch):
    """plain(name, *flags, **attributes) -> the task after 16 steps of SGD on 12 numbers each."""
    def start(name, *flags, **attributes):
        task = Plain(store, tokenizer)
        vars(task).update(attributes)
        size = ["--batch", 12, "--epochs", 4, "--eval-every", 5, "--out", tmp_path / name]
        args, checkpoint = train.parse_args([*map(str, (*size, *flags))])
        task.result = train.fit(args, task, checkpoint)
        return task

    monkeypatch.setattr(train, "make_optimizer", lambda model, *_: torch.optim.SGD(
        [{"params": list(model.parameters()), "scale": 0.5}], lr=1.0, momentum=0.9))
    monkeypatch.setattr(train, "switches_picture", lambda *_: Image.new("RGB", (800, 9)))
    return start


def metrics(out, kind):
    """The lines of metrics.jsonl that hold this, without times."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines if kind in line]


@pytest.mark.parametrize("accum, flags, tau", [
    (1, ["--anneal", 0.5], lambda step: max(0.2, 3 * (1 / 15) ** (step / 8))),  # 8 of 16 steps
    *((parts, ["--data", "x"], lambda step: 3 * math.exp(-1e-6 * step * 12))  # the paper's
        for parts in (2, 3, 6))])
def test_a_step_is_gradient_descent_on_the_whole_batch_in_any_number_of_parts(
        plain, tmp_path, accum, flags, tau):
    """Parts hold different numbers of odd ones: a mean of their means would differ."""
    task = plain("run", "--accum", accum, "--lr", 1e-3, *flags)
    weight, velocity, losses, rates, clipped = 1.0, 0, [], [], []
    for step in range(16):
        indices = [index for _, index in task.keys[12 * step : 12 * step + 12]]
        mean, odd = (np.mean([7 * i % 50 / 50 for i in part])
            for part in (indices, [i for i in indices if i % 2]))
        losses.append((weight * mean, weight * odd))
        rates.append(1e-3 * min((step + 1) / 2, (16 - step) / 14))  # a tenth of 16 steps is 2
        clipped.append(mean + odd > 1.05)
        velocity = 0.9 * velocity + min(mean + odd, 1.05)
        weight -= 0.5 * rates[-1] * velocity
    assert any(clipped) and not all(clipped) and abs(weight - 1) > 1e-3
    assert task.model.weight.item() == pytest.approx(weight, abs=1e-6)
    assert task.taus[::accum] == pytest.approx([*map(tau, range(16))], rel=1e-9)
    recorded = metrics(tmp_path / "run", "losses")
    assert [line["step"] for line in recorded] == [5, 10, 15, 16]
    for line, (first, last) in zip(recorded, ((0, 5), (5, 10), (10, 15), (15, 16))):
        mean = np.mean(losses[first:last], axis=0).tolist()
        assert list(line["losses"].values()) == pytest.approx(mean, rel=1e-4)
        assert line["lr"] == pytest.approx(rates[last - 1])
        assert line["temperature"] == pytest.approx(tau(last - 1), rel=1e-9)


def test_batches_depend_on_seed_and_epoch_and_noise_on_seed_step_and_part(plain):
    one, parts, same, other = (plain("run", "--accum", accum, "--seed", seed)
        for accum, seed in ((2, 0), (3, 0), (2, 0), (2, 1)))
    assert one.keys == parts.keys == same.keys != other.keys
    epochs = [one.keys[k : k + 48] for k in range(0, 192, 48)]  # 4 whole batches of the 50
    assert [{epoch for epoch, _ in keys} for keys in epochs] == [{0}, {1}, {2}, {3}]
    orders = [tuple(index for _, index in keys) for keys in epochs]
    assert len({*orders}) == 4 and all(len({*order}) == 48 for order in orders)
    assert one.noise == same.noise and len({*one.noise, *other.noise}) == 64  # 16 steps of 2 parts


def test_an_epoch_has_every_example_once_in_batches_of_like_length_in_random_order():
    """5,000 examples of 1 to 40 words: windows of 2,000 hold 50 of each length, batches 20."""
    lengths = np.random.default_rng(0).integers(1, 41, 5000)
    examples = type("Examples", (), {"__len__": lambda self: 5000, "lengths": lengths})()
    one, other, again = (train.epoch_batches(seed, 3, 20, examples) for seed in (0, 1, 0))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert one.shape == (250, 20) and sorted(one.flatten()) == [*range(5000)]
    found = lengths[one]
    assert np.ptp(found, axis=1).max() <= 2 and np.ptp(found, axis=1).mean() < 1
    longest = found.max(axis=1)  # short and long ones come in any order
    assert abs(np.corrcoef(longest[1:], longest[:-1])[0, 1]) < 0.2
    assert abs(np.corrcoef(longest, range(250))[0, 1]) < 0.2


def test_a_run_has_at_most_thirty_frames_evenly_apart(plain, tmp_path):
    plain("run", "--batch", 50, "--epochs", 59, "--eval-every", 60)
    found = metrics(tmp_path / "run", "mixture")
    assert [line["step"] for line in found] == [*range(2, 59, 2)]
    assert found[0]["mixture"]["modes"][0][0] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("stop_at, step", [(0, 1), (12 * 7, 8), (12 * 9, 10), (12 * 16 - 1, None)])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_as_if_it_had_not(
        plain, tmp_path, stop_at, step, capsys):
    """SIGTERM in step 1, 8, 10 (which is evaluated, too) and 16 of 16 (too late)."""
    whole = plain("whole", "--accum", 2)
    first = plain("run", "--accum", 2, stop_at=stop_at)
    said = capsys.readouterr().out
    assert (first.result is None) == (f"stopped after step {step}; --resume" in said) == bool(step)
    saved = train.load_checkpoint(tmp_path / "run" / "checkpoint.pt", "pretraining")["step"]
    assert saved == (step or 16)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:  # a killed run knows later steps
        file.write(f'{{"step": {saved + 1}, "losses": {{}}}}\n{{"step": 99, "lo')
    again = plain("run", "--accum", 2, "--resume")
    assert again.result == {"score": 0.5} and again.model.weight.equal(whole.model.weight)
    assert first.keys + again.keys == whole.keys and first.noise + again.noise == whole.noise
    assert metrics(tmp_path / "run", "step") == metrics(tmp_path / "whole", "step")


@pytest.mark.parametrize("score", [math.nan, 1e30, -1000.0])
def test_what_has_diverged_stops_the_run_and_is_not_saved(plain, tmp_path, score):
    """Scores, if they are a thousand or more; and a loss in any step, if it is not finite."""
    keys, path = plain("clean", score=999.0).keys[12 * 6 : 12 * 7], tmp_path / "run/checkpoint.pt"
    with pytest.raises(BadInput, match="step 5: .*diverged.*lower --lr"):
        plain("run", score=score)
    assert not path.exists()
    with pytest.raises(BadInput, match=r"step 7: .*diverged.*all nan.*lower --lr"):
        plain("run", not_a_number=keys[0])
    saved = train.load_checkpoint(path, "pretraining")
    assert saved["step"] == 5 and saved["model"]["weight"].isfinite()


@pytest.mark.slow
def test_compiled_layers_compute_what_plain_ones_do_and_are_compiled_once(model, data):
    task = train.Pretraining(train.parse_args([])[0], data)
    batches = [task.collate([task.examples[i] for i in range(k, k + 5)]) for k in range(5)]
    plain = [model(**batch, temperature=1.0).losses.detach() for batch in batches]
    torch._dynamo.utils.counters.clear()
    train.compile_layers(model)
    for batch, expected in zip(batches, plain):
        torch.testing.assert_close(model(**batch, temperature=1.0).losses, expected,
            rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # of four layers


def test_gates_learn_at_a_tenth_and_biases_and_norms_do_not_decay(config):
    model = SwitchBertForPretraining(config)
    optimizer = train.make_optimizer(model)
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    assert len(group_of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        spared = name.endswith("bias") or "norm" in name or name.endswith("transform.2.weight")
        scale = 0.1 if "mode_gate" in name or "switch_input" in name else 1
        expected = {"weight_decay": 0 if spared else 0.01, "scale": scale}
        assert expected.items() <= group_of[parameter].items(), name
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.999), 1e-6)


# --- Pretraining ----------------------------------------------------------------------------------

FACTS = dict(feature_size=12, detector="made up", num_region_classes=7, num_regions=5)
CAPTIONS = [(str(i), f"a {word} ring") for i in range(10) for word in ("small", "red", "large")]


@pytest.fixture
def data(store, tokenizer):
    return train.Data(store, CAPTIONS, CAPTIONS[::3], tokenizer)


@pytest.fixture
def model(store, tokenizer, request):
    config = train.model_config("small", store, tokenizer, getattr(request, "param", "learned"))
    return SwitchBertForPretraining(config).eval()


@pytest.fixture
def pretrain(monkeypatch, data, tmp_path):
    """pretrain(name, *flags): a run of 4 steps of 14 pairs, a tiny model on the made-up store."""
    def start(name, *flags):
        size = "--batch 14 --epochs 2 --eval-every 2 --threads 1".split()
        return train.pretrain(*train.parse_args(["--out", str(tmp_path / name), *size, *flags]))

    monkeypatch.setattr(train, "load_data", lambda *_: data)
    monkeypatch.setattr(train, "model_config", lambda *_: SwitchBertConfig.tiny(
        vocab_size=len(data.tokenizer), hidden_dropout_prob=0.0))
    return start


def test_pretraining_leaves_its_record(pretrain, data, tmp_path, capsys):
    scores, out = pretrain("run"), tmp_path / "run"
    names = ["checkpoint.pt", "config.json", "metrics.jsonl", "switches.gif", "switches.png"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert f"{out}: {', '.join(names)}\n" in capsys.readouterr().out
    evaluations, mixtures = metrics(out, "losses"), metrics(out, "mixture")
    assert [e["examples"] for e in evaluations] == [28, 56]
    for found in (*(e["switches"] for e in evaluations), *(m["mixture"] for m in mixtures)):
        shares = np.array(found["modes"])
        assert shares.shape == (2, 2, 3) and np.allclose(shares.sum(axis=-1), 1)
        assert [np.shape(d) for d in found["depths"]] == [(2, 1), (2, 2)]
    config = json.loads((out / "config.json").read_text())
    assert config["model"]["switches"] == "learned" and config["settings"]["batch"] == 14
    saved = train.load_checkpoint(out / "checkpoint.pt", "pretraining")
    assert (saved["vocab"], saved["store"]) == (data.tokenizer.pieces, data.store.meta)
    rebuilt = SwitchBertForPretraining(SwitchBertConfig(**saved["config"]))
    rebuilt.load_state_dict(saved["model"])
    held_out = PretrainingDataset(data.store, data.held_out_captions, data.tokenizer, seed=1)
    assert scores["mlm"] == train.evaluate(rebuilt, held_out)[0]["mlm"]
    assert evaluations[-1]["scores"].items() <= scores.items() and scores["images"] == 10


def test_a_blind_run_sees_no_picture_and_show_draws_ends_and_the_start_of_a_finetuned_run(
        pretrain, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FeatureStore, "__getitem__", lambda *_: pytest.fail("a picture was read"))
    scores = pretrain("blind", "--blind")
    assert scores["mrc"] == 0 and "R@" not in " ".join(scores)
    assert "pretraining without pictures: 30 pairs" in capsys.readouterr().out
    blind, tuned, whole = tmp_path / "blind", tmp_path / "tuned", tmp_path / "all.png"
    tuned.mkdir()
    (tuned / "metrics.jsonl").touch()
    with pytest.raises(BadInput, match="tuned: nothing to draw yet"):
        train.main(["show", str(tuned)])
    lines = [json.dumps(line | {"step": k}) for k, line in enumerate(metrics(blind, "switches"))]
    (tuned / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert Image.open(blind / "switches.gif").n_frames == 4
    (blind / "switches.gif").unlink()
    train.main(["show", str(tuned), str(blind), "-o", str(whole)])
    train.main(["show", str(tuned)])
    one, two, four = (Image.open(path).height for path in (
        blind / "switches.png", tuned / "switches.png", whole))  # cells are as high as the highest
    assert (two, four) == (2 * one, 4 * one) and (blind / "switches.gif").exists()


@pytest.mark.parametrize("flags, classes", [([], 7), ([], 0), (["--blind"], 7), (["--blind"], 0)])
def test_losses_belong_to_counts_and_reach_every_parameter(data, flags, classes, monkeypatch):
    """Several processes wait for the gradient of each."""
    monkeypatch.setattr(data.store, "num_region_classes", classes)
    task = train.Pretraining(train.parse_args(flags)[0], data)
    batch = task.collate([task.examples[i] for i in range(8)])
    task.sums(task.model, batch, 1.0)[0].sum().backward()
    for name, p in task.model.named_parameters():
        assert not p.requires_grad or (p.grad is not None and p.grad.isfinite().all()), name
    sums, whole = task.sums(task.model.eval(), batch, 9.0)[0], task.model(**batch, temperature=9.0)
    assert sums.equal(whole.sums) and task.counts(batch).tolist() == [*whole.counts]


def test_an_evaluation_is_the_mean_over_examples_one_by_one(model, store, tokenizer):
    model.mlm_bias.data[tokenizer.encode("ring", 3)[1]] = 99  # so that some words are right
    pairs = PretrainingDataset(store, CAPTIONS, tokenizer)
    found, switches = train.evaluate(model, pairs, batch_size=7)
    with torch.no_grad():
        outs = [model.eval()(**collate([pairs[k]])) for k in range(30)]
    sums, counts, right = (sum(torch.as_tensor(getattr(o, k)) for o in outs)
        for k in ("sums", "counts", "correct"))
    assert [*found] == ["mlm", "mrc", "itm", "words", "match"] and right.all()
    means = [*(sums / counts).tolist(), *(right / counts[[0, 2]]).tolist()]
    assert [*found.values()] == pytest.approx(means, rel=1e-4)
    assert train.evaluate(model, pairs, batch_size=30)[1] == switches


def test_words_are_scored_on_masked_pairs_matching_on_whole_ones_and_ranks_by_first_captions(
        data, monkeypatch):
    pairs = [("7", "a"), ("99", "no features"), ("3", "c"), ("7", "d")]
    data = data._replace(held_out_captions=pairs)
    task = train.Pretraining(train.parse_args([])[0], data)
    monkeypatch.setattr(train, "evaluate", lambda model, pairs: (
        dict.fromkeys(("words", "match"), pairs[0]["region_hidden"].any()), "switches"))
    assert task.evaluate(None) == ({"words": True, "match": False}, "switches")
    monkeypatch.setattr(train, "match_scores", lambda model, store, tokenizer, texts, ids:
        torch.tensor([[float((i, text) in pairs[:3]) for i in ids] for text in texts]))
    found = train.zero_shot(task)
    assert found.pop("images") == 2 and set(found.values()) == {1.0}


@pytest.mark.parametrize("model", ["learned", "late", "intra"], indirect=True)
def test_match_scores_are_the_log_odds_of_each_pair_alone(model, store, tokenizer, monkeypatch):
    """Of texts of two lengths, and 120 images of one, three and five regions or unknown, in two
    blocks; in two processes, too.
    """
    texts, ids = ["a red ring", "a large blue circle left of the ring", "a blue ring"], [*"407-"]
    ranker = SwitchBertForRetrieval.from_pretraining(model.config, model.state_dict())
    scores = train.match_scores(ranker, store, tokenizer, texts, ids * 30)
    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    halves = [monkeypatch.setattr(train, "RANK", n) or train.match_scores(
        ranker, store, tokenizer, texts, ids * 30) for n in range(2)]
    assert (halves[0] + halves[1]).equal(scores)
    assert (scores.view(3, 30, 4) - scores[:, None, :4]).abs().max() < 1e-4
    for t, i in np.ndindex(3, 4):
        pairs = [(ids[i].replace("-", "9"), texts[t]), ("1", "a")]
        pair = PretrainingDataset(store, pairs, tokenizer, mismatch=0, masking=False,
            blind=ids[i] == "-")[0]
        odds = model.itm_classifier(model(**collate([pair])).encoder.pooled)[0]
        assert scores[t, i].item() == pytest.approx((odds[1] - odds[0]).item(), abs=1e-4)


@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_recall_equals_a_brute_force_ranking_also_with_ties(levels):
    """Seven images with 1 to 3 texts each. Among equal scores the wrong ones come first."""
    image_of_text = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5, 6])
    right, expected = image_of_text[:, None] == torch.arange(7), {}
    for _ in range(20):
        scores = torch.randint(levels, (11, 7)).float()
        for name, s, own in (("image", -scores, right), ("text", -scores.T, right.T)):
            ranked = [sorted(zip(*row)) for row in zip(s.tolist(), own.tolist())]
            for k in (1, 2, 5):
                expected[f"{name} R@{k}"] = np.mean([any(own for _, own in r[:k]) for r in ranked])
        assert train.recall_at(scores, image_of_text, (1, 2, 5)) == pytest.approx(expected)


# --- Data folders ---------------------------------------------------------------------------------


def write_tsv(path, pairs):
    path.write_text("".join(f"{i}\t{text}\n" for i, text in pairs))


@pytest.fixture
def folder(tmp_path):
    """data/ with features of 40 images without class distributions, and two caption files."""
    home = tmp_path / "data"
    writer = FeatureStore.create(home / "features", range(40), 3, 12, detector="made up")
    for row in writer.pending():
        writer.write(row, np.eye(3, 12, row % 9), np.tile([1.0, 1, 9, 9], (3, 1)), (10, 10))
    writer.finish()
    write_tsv(home / "a.tsv", [*((i, f"a small dog number {i}") for i in range(30)), (77, "lost")])
    write_tsv(home / "b.tsv", ((i, "a cat") for i in range(20)))
    return home


def folder_flags(folder, tmp_path, *more):
    size = ["--model", "small", "--epochs", "1", "--batch", "8", "--limit", "16"]
    return train.parse_args(["--data", str(folder), "--out", str(tmp_path / "run"), *size, *more])


def test_a_data_folder_is_trained_on_as_it_lies_and_a_new_run_moves_an_earlier_one_aside(
        folder, tmp_path, capsys):
    scores = train.pretrain(*folder_flags(folder, tmp_path))
    said = capsys.readouterr().out
    assert f"training on {folder}\n" in said and "16 pairs" in said
    assert "no class distributions: training without MRC" in said and scores["mrc"] == 0
    write_tsv(folder / "a.tsv", ((i, f"a purple zebra {i}") for i in range(30)))
    (tmp_path / "run-1").mkdir()  # this name is taken
    train.pretrain(*folder_flags(folder, tmp_path))
    assert f"{tmp_path}/run is now in {tmp_path}/run-2" in capsys.readouterr().out
    dog, zebra = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["vocab"]
        for name in ("run-2", "run"))
    assert dog[:5] == list(SPECIALS) and "dog" in dog and "zebra" in zebra
    assert train.pretrain(*folder_flags(folder, tmp_path, "--resume"))


def test_held_out_images_are_in_no_training_pair(folder):
    write_tsv(folder / "b.tsv", ((i, "a") for i in range(3000)))
    training, held_out = train.split_captions(folder)
    assert not {i for i, _ in training} & {i for i, _ in held_out}
    assert len({i for i, _ in held_out}) == 30 and len(training) + len(held_out) == 3031
    (folder / "c.json").write_text(json.dumps({"images": [
        {"filename": f"{n}.jpg", "split": split, "sentences": [{"raw": split}]}
        for n, split in enumerate(("test", "restval", "train", "val"))]}))
    training, held_out = train.split_captions(folder)
    assert list(held_out) == [("3", "val")]
    assert list(training[-2:]) == [("1", "restval"), ("2", "train")]


def test_a_run_starts_from_the_bert_of_its_folder_and_uses_its_words(folder, tmp_path, monkeypatch):
    words = [*SPECIALS, *(f"word{i}" for i in range(55))]
    write_bert(folder / "bert", bert_weights())
    (folder / "bert" / "vocab.txt").write_text("".join(w + "\n" for w in words))
    args, found = folder_flags(folder, tmp_path)[0], train.load_data(folder)
    assert list(found.tokenizer.pieces) == words
    with pytest.raises(BadInput, match="hidden_size"):
        train.Pretraining(args, found)
    config = SwitchBertConfig.tiny(num_region_classes=0)
    monkeypatch.setattr(train, "model_config", lambda *_: config)
    expected = bert_weights()["bert.encoder.layer.1.intermediate.dense.weight"]
    assert train.Pretraining(args, found).model.bert.layers[1].intermediate.weight.equal(expected)


# --- Flags, checkpoints, pictures, and what is refused --------------------------------------------


@pytest.mark.parametrize("flags, settings, width", [
    ([], ("small", 4, 64, 0.001, 0.9), 128), (["--data", "x"], ("base", 10, 256, 1e-4, None), 768),
    (["--resume", "--out", "run"], ("small", 4, 12, 0.07, 0.9), 128)])
def test_defaults_depend_on_the_data_and_help_shows_those_that_hold(
        plain, data, tmp_path, monkeypatch, capsys, flags, settings, width):
    plain("run", "--lr", 0.07)
    monkeypatch.chdir(tmp_path)
    args, _ = train.parse_args(flags)
    assert (args.model, args.epochs, args.batch, args.lr, args.anneal) == settings
    config = train.model_config(args.model, data.store, data.tokenizer, "II,XX")
    assert (config.hidden_size, config.region_feature_size, config.switches) == (width, 12, "II,XX")
    with pytest.raises(SystemExit):
        train.parse_args([*flags, "-h"])
    assert f"rate (default: {args.lr})" in re.sub(r"\s+", " ", capsys.readouterr().out)


RESUME = ["--resume"]


@pytest.mark.parametrize("flags, change, message", [
    *((RESUME, lambda whole, size=size: whole[:size], "checkpoint.pt: not a whole checkpoint")
        for size in (3000, -100, 0)),
    (RESUME, lambda whole: whole.replace(b"\0\0\x80?", b"\0\0\x81?"), "is damaged"),
    (RESUME, {"vocab": Path()}, "checkpoint.pt: not a whole checkpoint"),  # no class is unpickled
    (RESUME, {"task": "vqa"}, "it is a checkpoint of vqa"),
    (RESUME, {"format": "switchbert-3"}, "format switchbert-3, expected switchbert-4"),
    (["--resume", "--lr", 0.5], {}, "--lr 0.5: the run that is resumed has 1e-12"),
    (["--resume", "--blind"], {}, "--blind True: the run that is resumed has False"),
    (["--batch", 64], {}, "--batch 64: there are only 50 training examples"),
    (["--accum", 5], {}, "--batch 12 cannot be cut into 1 processes x --accum 5 equal parts"),
    (RESUME, None, r"metrics.jsonl: not the metrics.jsonl .*\(near line 20: ")])
def test_a_damaged_run_or_flags_that_cannot_hold_are_refused(
        plain, tmp_path, flags, change, message):
    plain("run", "--lr", 1e-12)  # so that the weight is still 1, and its bytes known
    path = tmp_path / "run/checkpoint.pt"
    if change is None:
        path = path.with_name("metrics.jsonl")
        path.write_bytes(path.read_bytes()[:-5] + b"\n")
    elif callable(change):
        path.write_bytes(change(path.read_bytes()))
    else:
        torch.save({**torch.load(path, weights_only=True), **change}, path)
    with pytest.raises(BadInput, match=message):
        plain("run", *flags)


@pytest.mark.parametrize("flags, change, message", [
    *((["--switches", path], None, f"--switches {path}: not a setting .*4 layers")
        for path in ("both", "II,XX,II,XX,JJ")),
    ([], dict(feature_size=2048), "feature_size is 12, .* trained with 2048"),
    ([], dict(detector="vg"), "detector is 'made up', .* trained with 'vg'"),
    ([], dict(num_region_classes=8), "classes is 7, .* with 8"), ([], {}, "vocabulary is not the")])
def test_unknown_switches_and_a_checkpoint_of_other_regions_or_words_are_refused(
        data, flags, change, message):
    checkpoint = {"store": FACTS | (change or {}), "vocab": data.tokenizer.pieces if change else []}
    with pytest.raises(BadInput, match=message):
        train.Pretraining(train.parse_args(flags)[0], data, checkpoint)


def test_the_picture_shows_each_share_as_a_length_and_as_a_shade():
    """Text chooses 25 % own and 75 % both, vision always the other; text reads depth 0 in 20 %."""
    switches = {"modes": [[[1, 0, 0], [1, 0, 0]], [[0.25, 0, 0.75], [0, 1.0, 0]]],
        "depths": [[[1.0], [1.0]], [[0.2, 0.8], [1.0, 0.0]]]}
    pixels = np.asarray(train.switches_picture(switches, "title"))
    colours = [ImageColor.getrgb(colour) for colour in train.COLOURS]
    bars = np.stack([(pixels == colour).all(axis=2).sum(axis=1) for colour in colours], axis=1)
    starts = np.flatnonzero(np.diff(bars.sum(axis=1)) > 200) + 5  # of the four rows
    expected = np.array([[1, 0, 0], [0.25, 0, 0.75], [1, 0, 0], [0, 1, 0]])
    assert bars[starts] == pytest.approx(expected * train.BAR, abs=2)
    assert {(204, 204, 204), (51, 51, 51)} <= {*map(tuple, pixels.reshape(-1, 3).tolist())}


@pytest.mark.slow
def test_the_moving_picture_of_the_largest_model_stays_under_300_kilobytes(tmp_path):
    """Thirty frames of twelve layers whose switches close."""
    logits = [torch.randn(12, 2, 3), *(torch.randn(2, l + 1) for l in range(12))]
    for step in range(30):
        tau = 5 * 0.04 ** (step / 29)
        modes, *depths = (torch.softmax(x / tau, dim=-1).tolist() for x in logits)
        shares = {"modes": modes, "depths": depths}
        train.record(SimpleNamespace(out=tmp_path), step=step, temperature=tau, mixture=shares,
            switches=shares)
    train.draw_switches(tmp_path)
    path = tmp_path / "switches.gif"
    assert Image.open(path).n_frames == 30 and path.stat().st_size <= 300_000


def test_training_needs_no_torchvision():
    code = "import sys, train, finetune; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
