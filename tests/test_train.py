"""What train.py promises: the loop, its schedules, evaluation, data folders, the record of a run.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_switchbert import bert_weights, write_bert

import train
from data import SPECIALS, BadInput, FeatureStore, PretrainingDataset, collate
from switchbert import SwitchBertConfig, SwitchBertForPretraining, SwitchBertForRetrieval

# --- The loop, on the smallest task there is ------------------------------------------------------


class Weight(torch.nn.Module):
    """A model of a single weight, 1 at first."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1))
        self.config = SwitchBertConfig.tiny(num_hidden_layers=1)


class Plain(torch.utils.data.Dataset):
    """50 numbers x; two losses: w x of all numbers, and of the odd-numbered ones alone."""

    name, unit, loss_names = "pretraining", "numbers", ("all", "odd")
    clip, weight_decay, initial_temperature = 1.05, 0.0, 3.0
    gate_rate, evaluates_at_start = 0.1, False

    def __init__(self, store, tokenizer):
        self.store, self.tokenizer, self.model, self.examples = store, tokenizer, Weight(), self
        self.keys, self.noise, self.score, self.stop_at = [], [], 0.5, None
        self.image_of, self.about = "image-{}".format, lambda: {"extra": 5}
        self.headline = lambda scores: f"score {scores['score']}"

    def __len__(self):
        return 50

    def __getitem__(self, key):
        if len(self.keys) == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        self.keys.append(key)
        return key

    @staticmethod
    def x(key):
        return (7 * key[1] % 50) / 50

    def collate(self, keys):
        return {"x": torch.tensor([*map(self.x, keys)]), "odd": torch.tensor(keys)[:, 1] % 2 > 0}

    @staticmethod
    def counts(batch):
        return torch.tensor([float(len(batch["x"])), float(batch["odd"].sum())])

    def sums(self, model, batch, tau):
        self.noise.append(torch.rand(1).item())
        loss, n = model.w * batch["x"], len(batch["x"])
        out = SimpleNamespace(pooled=torch.zeros(n, 1), modes=torch.full((n, 1, 2, 3), 1 / 3),
            depths=[torch.ones(n, 2, 1)])
        return torch.stack([loss.sum(), loss[batch["odd"]].sum()]), out

    def evaluate(self, model):
        switches = {"modes": [[[1.0, 0, 0], [0, 0, 1.0]]], "depths": [[[1.0], [1.0]]]}
        return {"score": self.score}, switches


@pytest.fixture
def plain(store, tokenizer, tmp_path, monkeypatch):
    """plain(name, *flags, **attributes) -> the task after 16 steps of SGD on 12 numbers each."""
    def sgd(model, *_):
        groups = [{"params": list(model.parameters()), "scale": 0.5}]
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9)

    def start(name, *flags, **attributes):
        task = Plain(store, tokenizer)
        vars(task).update(attributes)
        size = ["--batch", 12, "--epochs", 4, "--eval-every", 5, "--out", tmp_path / name]
        args, checkpoint = train.parse_args([*map(str, (*size, *flags))])
        task.result = train.fit(args, task, checkpoint)
        return task

    monkeypatch.setattr(train, "make_optimizer", sgd)
    return start


def metrics(out, kind):
    """The lines of metrics.jsonl that hold this."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if kind in line]


def by_hand(keys, lr=1e-3, clip=1.05):
    """(weights, losses of each step, was it clipped): half the rate, momentum .9, in arithmetic."""
    weights, losses, clipped, velocity = [1.0], [], [], 0
    for step in range(16):
        batch = keys[12 * step : 12 * step + 12]
        mean, odd = (np.mean([Plain.x(k) for k in b])
            for b in (batch, [k for k in batch if k[1] % 2]))
        losses.append((weights[-1] * mean, weights[-1] * odd))
        rise = min((step + 1) / 2, (16 - step) / 14)  # a tenth of 16 steps is 2
        clipped.append(mean + odd > clip)
        velocity = 0.9 * velocity + min(mean + odd, clip)
        weights.append(weights[-1] - 0.5 * lr * rise * velocity)
    return weights, losses, clipped


@pytest.mark.parametrize("accum", [1, 2, 3, 6])
def test_a_step_is_gradient_descent_on_the_whole_batch_in_any_number_of_parts(
        plain, tmp_path, accum):
    """Parts hold different numbers of odd ones: a mean of their means would differ."""
    task = plain("run", "--accum", accum)
    weights, losses, clipped = by_hand(task.keys)
    assert any(clipped) and not all(clipped)
    assert task.model.w.item() == pytest.approx(weights[-1], abs=1e-6)
    assert abs(weights[-1] - 1) > 1e-3
    recorded = metrics(tmp_path / "run", "losses")
    assert [line["step"] for line in recorded] == [5, 10, 15, 16]
    for line, steps in zip(recorded, ((0, 5), (5, 10), (10, 15), (15, 16))):
        expected = np.mean(losses[slice(*steps)], axis=0)
        assert list(line["losses"].values()) == pytest.approx(list(expected), rel=1e-4)


def test_batches_depend_on_seed_and_epoch_and_noise_on_seed_step_and_part(plain):
    one, parts, same, other = (plain(name, "--accum", accum, "--seed", seed)
        for name, accum, seed in (("a", 2, 0), ("b", 3, 0), ("c", 2, 0), ("d", 2, 1)))
    assert one.keys == parts.keys == same.keys != other.keys
    epochs = [one.keys[k : k + 48] for k in range(0, 192, 48)]
    for number, keys in enumerate(epochs):
        assert {epoch for epoch, _ in keys} == {number}
        assert len({index for _, index in keys}) == 48  # 4 whole batches of the 50
    assert len({tuple(index for _, index in keys) for keys in epochs}) == 4
    assert one.noise == same.noise and len(set(one.noise)) == 32  # 16 steps of 2 parts
    assert not set(one.noise) & set(other.noise)


@pytest.mark.parametrize("flags, tau", [
    (["--anneal", 0.5], lambda step: max(0.2, 3 * (1 / 15) ** (step / 8))),  # 8 of 16 steps
    (["--data", "x"], lambda step: 3 * math.exp(-1e-6 * step * 12))])  # the paper's
def test_learning_rate_and_temperature_are_functions_of_the_step(plain, tmp_path, flags, tau):
    plain("run", "--eval-every", 1, "--lr", 0.5, *flags)
    for line in metrics(tmp_path / "run", "losses"):
        step = line["step"] - 1
        assert line["temperature"] == pytest.approx(tau(step), rel=1e-9)
        assert line["lr"] == pytest.approx(0.5 * min((step + 1) / 2, (16 - step) / 14))


@pytest.mark.parametrize("steps", [300, 59, 16])
def test_a_run_has_at_most_thirty_frames_whatever_its_length(plain, tmp_path, steps):
    plain("run", "--batch", 50, "--epochs", steps, "--eval-every", 10**6)
    found = metrics(tmp_path / "run", "mixture")
    assert min(steps, 15) <= len(found) <= 31
    assert steps - found[-1]["step"] <= steps / 30
    assert found[0]["mixture"]["modes"][0][0] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("stop_at, step", [(0, 1), (12 * 7, 8), (12 * 9, 11), (12 * 16 - 1, None)])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_as_if_it_had_not(
        plain, tmp_path, stop_at, step, capsys):
    """SIGTERM in step 1, 8, 10 (whose evaluation saves by itself) and 16 of 16 (too late). The
    losses of the interval in which it stopped are the same, too."""
    whole = plain("whole", "--accum", 2)
    first = plain("run", "--accum", 2, stop_at=stop_at)
    said = capsys.readouterr().out
    assert (first.result is None) == (f"stopped after step {step}; --resume" in said) == bool(step)
    saved = train.load_checkpoint(tmp_path / "run" / "checkpoint.pt", "pretraining")
    assert saved["step"] == (step or 16)
    again = plain("run", "--accum", 2, "--resume")
    assert again.result == {"score": 0.5}
    assert first.keys + again.keys == whole.keys and first.noise + again.noise == whole.noise
    assert again.model.w.equal(whole.model.w)
    one, two = (metrics(tmp_path / name, "step") for name in ("whole", "run"))
    for line in (*one, *two):
        line.pop("seconds", None), line.pop("per_second", None)
    assert one == two


def test_a_resumed_run_rewrites_what_came_after_its_checkpoint(plain, tmp_path):
    """A killed run has lines of steps that its checkpoint does not know."""
    plain("run", stop_at=12 * 7)  # in step 8
    path = tmp_path / "run" / "metrics.jsonl"
    before = path.read_text() + '{"step": 9, "mixture": {}, "temperature": 1}\n'
    path.write_text(before + '{"step": 10, "losses"')
    with pytest.raises(BadInput, match=r"metrics.jsonl: not .* \(near .*11: "):  # half a line
        plain("run", "--resume")
    path.write_text(before)
    plain("run", "--resume")
    lines = metrics(tmp_path / "run", "step")
    assert [line["step"] for line in lines if "mixture" in line] == list(range(1, 17))
    assert [line["step"] for line in lines if "losses" in line] == [5, 10, 15, 16]


def test_a_run_without_a_step_to_do_is_an_evaluation(plain, tmp_path):
    assert plain("none", "--epochs", 0, "--batch", 64).result == {"score": 0.5}
    assert [line["step"] for line in metrics(tmp_path / "none", "scores")] == [0]
    plain("run")
    before = metrics(tmp_path / "run", "step")
    again = plain("run", "--resume")
    assert again.keys == [] and again.result == {"score": 0.5}
    assert metrics(tmp_path / "run", "step") == before


def test_a_new_run_moves_an_earlier_one_aside(plain, tmp_path, capsys):
    for _ in range(3):
        plain("run", "--seed", len(list(tmp_path.iterdir())))
    assert f"{tmp_path}/run is now in {tmp_path}/run-2" in capsys.readouterr().out
    seeds = [json.loads((tmp_path / name / "config.json").read_text())["settings"]["seed"]
        for name in ("run-1", "run-2", "run")]
    assert seeds == [0, 1, 2]
    assert (tmp_path / "run-1" / "checkpoint.pt").exists()


def test_what_is_not_finite_stops_the_run_and_is_not_saved(plain, tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="step 5: .*not finite.*lower --lr"):
        plain("run", score=math.nan)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    order, x = plain("clean").keys[12 * 6 : 12 * 7], Plain.x
    monkeypatch.setattr(
        Plain, "x", staticmethod(lambda key: math.nan if key == order[0] else x(key)))
    with pytest.raises(BadInput, match=r"step 7: .*not finite.*all nan.*lower --lr") as error:
        plain("run")
    assert set(re.findall(r"image-(\d+)", str(error.value))) == {str(i) for _, i in order}
    saved = train.load_checkpoint(tmp_path / "run" / "checkpoint.pt", "pretraining")
    assert saved["step"] == 5 and saved["model"]["w"].isfinite()


def test_gates_learn_at_a_tenth_and_biases_and_norms_do_not_decay(config):
    model = SwitchBertForPretraining(config)
    optimizer = train.make_optimizer(model, 1e-3)
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert len(group_of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = group_of[id(parameter)]
        spared = name.endswith("bias") or "norm" in name or name.endswith("transform.2.weight")
        assert group["weight_decay"] == (0 if spared else 0.01), name
        assert group["scale"] == (0.1 if "mode_gate" in name or "switch_input" in name else 1), name
    assert {k: optimizer.defaults[k] for k in ("betas", "eps")} == dict(
        betas=(0.9, 0.999), eps=1e-6)


# --- Pretraining ----------------------------------------------------------------------------------

FACTS = dict(feature_size=12, detector="made up", num_region_classes=7, num_regions=5)
CAPTIONS = [(str(i), f"a {word} ring") for i in range(10) for word in ("small", "red", "large")]


@pytest.fixture
def model(store, tokenizer):
    config = train.model_config("small", store, tokenizer, "learned")
    return SwitchBertForPretraining(config).eval()


@pytest.fixture
def pretrain(monkeypatch, store, tokenizer, tmp_path):
    """pretrain(name, *flags): a run of 4 steps of 14 pairs, a tiny model on the made-up store."""
    sizes = dict(vocab_size=len(tokenizer), hidden_dropout_prob=0.0)
    monkeypatch.setattr(
        train, "model_config", lambda *a: SwitchBertConfig.tiny(**sizes, switches=a[-1]))
    monkeypatch.setattr(
        train, "load_data", lambda *_: train.Data(store, CAPTIONS, CAPTIONS[::3], tokenizer))

    def start(name, *flags):
        size = ["--batch", "14", "--epochs", "2", "--eval-every", "2", "--threads", "1"]
        return train.pretrain(*train.parse_args(["--out", str(tmp_path / name), *size, *flags]))

    return start


def test_pretraining_leaves_its_record(pretrain, store, tokenizer, tmp_path):
    scores, out = pretrain("run"), tmp_path / "run"
    assert sorted(p.name for p in out.iterdir()) == sorted([*train.RECORD, "blind"])
    evaluations, mixtures = metrics(out, "losses"), metrics(out, "mixture")
    assert [(e["step"], e["examples"]) for e in evaluations] == [(2, 28), (4, 56)]
    for found in (*(e["switches"] for e in evaluations), *(m["mixture"] for m in mixtures)):
        shares = np.array(found["modes"])
        assert shares.shape == (2, 2, 3) and np.allclose(shares.sum(axis=-1), 1)
        assert [np.shape(d) for d in found["depths"]] == [(2, 1), (2, 2)]
    config = json.loads((out / "config.json").read_text())
    assert config["model"]["switches"] == "learned" and config["settings"]["batch"] == 14
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert (saved["format"], saved["task"], saved["step"]) == ("switchbert-3", "pretraining", 4)
    assert saved["store"] == FACTS and saved["vocab"] == tokenizer.pieces
    rebuilt = SwitchBertForPretraining(SwitchBertConfig(**saved["config"]))
    rebuilt.load_state_dict(saved["model"])
    assert evaluations[-1]["scores"].items() <= scores.items() and scores["images"] == 10
    held_out = PretrainingDataset(store, CAPTIONS[::3], tokenizer, seed=1)
    assert scores["mlm"] == train.evaluate(rebuilt, held_out)[0]["mlm"]
    with Image.open(out / "switches.gif") as gif:
        assert gif.n_frames == 4
    train.main(["show", str(out), str(out / "blind"), "-o", str(tmp_path / "two.png")])
    one, two = (Image.open(p).height for p in (out / "switches.png", tmp_path / "two.png"))
    assert two == 2 * one and (tmp_path / "two.gif").exists()


def test_a_step_of_pretraining_has_the_gradient_of_the_joint_loss(
        pretrain, store, tokenizer, tmp_path, monkeypatch):
    """Against autograd on all 30 pairs at once; a model without gates has no noise."""
    model = SwitchBertForPretraining(SwitchBertConfig.tiny(vocab_size=len(tokenizer),
        switches="single", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))

    def sgd(trained, *_):
        trained.load_state_dict(model.state_dict())
        return torch.optim.SGD([{"params": list(trained.parameters()), "scale": 1.0}], lr=1.0)

    monkeypatch.setattr(train, "make_optimizer", sgd)
    monkeypatch.setattr(train.Pretraining, "clip", 0.5)
    monkeypatch.setattr(train, "model_config", lambda *_: model.config)
    pretrain("run", "--batch", "30", "--epochs", "1", "--accum", "5", "--lr", "0.5",
        "--data", str(store.folder))
    pairs = PretrainingDataset(store, CAPTIONS, tokenizer)
    model(**collate([pairs[i] for i in range(30)])).loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    after = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    assert norm > 0.6
    for name, parameter in model.named_parameters():
        expected = parameter - 0.5 * parameter.grad * 0.5 / norm
        torch.testing.assert_close(after[name], expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("classes", [7, 0])
def test_every_parameter_gets_a_gradient(store, tokenizer, blind, classes, monkeypatch):
    """Several processes wait for each of them."""
    monkeypatch.setattr(store, "num_region_classes", classes)
    args, _ = train.parse_args(["--blind"] if blind else [])
    task = train.Pretraining(args, train.Data(store, CAPTIONS, CAPTIONS, tokenizer))
    batch = task.collate([task.examples[i] for i in range(8)])
    task.sums(task.model, batch, 1.0)[0].sum().backward()
    trained = [(n, p) for n, p in task.model.named_parameters() if p.requires_grad]
    assert [n for n, p in trained if p.grad is None or not p.grad.isfinite().all()] == []


def test_a_blind_run_never_looks_at_a_picture(pretrain, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(FeatureStore, "__getitem__", lambda *_: pytest.fail("a picture was read"))
    scores = pretrain("run", "--blind")
    assert scores["mrc"] == 0 and "R@" not in " ".join(scores)
    assert "pretraining without pictures: 30 pairs" in capsys.readouterr().out


def test_an_evaluation_is_the_mean_over_examples_one_by_one(model, store, tokenizer):
    dataset = PretrainingDataset(store, CAPTIONS, tokenizer)
    found, switches = train.evaluate(model, dataset, batch_size=7)
    model.eval()
    sums, counts, correct, matched = np.zeros(3), np.zeros(3), 0, 0
    for k in range(len(dataset)):
        example = dataset[k]
        with torch.no_grad():
            out = model(**collate([example]))
        sums, counts = sums + out.sums.numpy(), counts + out.counts.numpy()
        labels = torch.from_numpy(example["mlm_labels"])
        predicted = model.mlm_logits(out.encoder.text_states[0]).argmax(dim=-1)
        correct += int((predicted == labels).sum())
        matched += int((out.match_probability[0] > 0.5) == example["itm_labels"])
    assert [found[k] for k in ("mlm", "mrc", "itm")] == pytest.approx(sums / counts, rel=1e-4)
    assert found["words"] == pytest.approx(correct / counts[0])
    assert found["match"] == pytest.approx(matched / 30)
    again, same = train.evaluate(model, dataset, batch_size=30)
    assert again == pytest.approx(found, rel=1e-4) and same == switches
    for shares in [*sum(switches["modes"], []), *sum(switches["depths"], [])]:
        assert sum(shares) == pytest.approx(1)


def test_words_are_scored_on_masked_pairs_and_matching_on_whole_ones(
        store, tokenizer, monkeypatch):
    task = train.Pretraining(
        train.parse_args([])[0], train.Data(store, CAPTIONS, CAPTIONS, tokenizer))
    monkeypatch.setattr(train, "evaluate", lambda model, pairs: (
        dict.fromkeys(("words", "match"), pairs[0]["region_hidden"].any()), "switches"))
    assert task.evaluate(None) == ({"words": True, "match": False}, "switches")


def test_zero_shot_retrieval_asks_for_the_first_caption_of_each_image(
        model, store, tokenizer, monkeypatch):
    held_out = [("7", "a"), ("99", "without features"), ("3", "c"), ("7", "d")]
    monkeypatch.setattr(train, "match_scores", lambda model, store, tokenizer, texts, ids:
        torch.tensor([[float((i, text) in held_out[:3]) for i in ids] for text in texts]))
    found = train.zero_shot(model, train.Data(store, [], held_out, tokenizer))
    assert found.pop("images") == 2 and set(found.values()) == {1.0}


def test_match_scores_are_the_log_odds_of_each_pair_alone(model, store, tokenizer):
    texts, ids = ["a red ring", "a large blue circle left of the ring"], ["4", "0", "7"]
    ranker = SwitchBertForRetrieval.from_pretraining(model.config, model.state_dict())
    scores = train.match_scores(ranker, store, tokenizer, texts, ids)
    for t, text in enumerate(texts):
        for i, image_id in enumerate(ids):
            pair = PretrainingDataset(store, [(image_id, text), ("1" + image_id[1:], "a")],
                tokenizer, mismatch=0, masking=False)[0]
            p = model(**collate([pair])).match_probability
            assert scores[t, i].item() == pytest.approx(torch.logit(p).item(), abs=1e-4)


def brute_force_recall(scores, right, k):
    """Sort each row's candidates, the wrong ones first among equals, and look at the top k."""
    return np.mean([any(right[row][c] for c in sorted(
        range(len(s)), key=lambda c, row=row: (-scores[row][c], right[row][c]))[:k])
        for row, s in enumerate(scores)])


@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_recall_equals_a_brute_force_ranking_also_with_ties(levels):
    """Seven images with 1 to 3 texts each; few score levels make many ties."""
    image_of_text = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5, 6])
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randint(levels, (11, 7), generator=generator).float()
        found = train.recall_at(scores, image_of_text, ks=(1, 2, 5))
        right = image_of_text[:, None] == torch.arange(7)
        for k in (1, 2, 5):
            assert found[f"image R@{k}"] == pytest.approx(
                brute_force_recall(scores.tolist(), right.tolist(), k))
            assert found[f"text R@{k}"] == pytest.approx(
                brute_force_recall(scores.T.tolist(), right.T.tolist(), k))


# --- Data folders ---------------------------------------------------------------------------------


def write(path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """data/ with features of 40 images without class distributions, and two caption files."""
    home = tmp_path / "data"
    writer = FeatureStore.create(home / "features", range(40), 3, 12, detector="made up")
    rng = np.random.default_rng(0)
    for row in writer.pending():
        writer.write(row, rng.normal(size=(3, 12)), np.tile([1.0, 1, 9, 9], (3, 1)), (10, 10))
    writer.finish()
    lines = [f"{i}\ta small dog number {i}\n" for i in range(30)]
    write(home / "a.tsv", "".join(lines) + "77\tno features\n")
    write(home / "b.json", {"annotations": [{"image_id": i, "caption": "a cat"}
        for i in range(20)]})
    return home


def folder_flags(folder, tmp_path, *more):
    size = ["--model", "small", "--epochs", "1", "--batch", "8", "--limit", "16"]
    return train.parse_args(["--data", str(folder), "--out", str(tmp_path / "run"), *size, *more])


def test_a_data_folder_is_trained_on_as_it_lies_with_its_own_words(folder, tmp_path, capsys):
    scores = train.pretrain(*folder_flags(folder, tmp_path))
    said = capsys.readouterr().out
    assert said.startswith(f"training on {folder}\n")
    assert "no class distributions: training without MRC" in said and scores["mrc"] == 0
    assert "16 pairs" in said and "words_blind" not in scores
    write(folder / "a.tsv", "".join(f"{i}\ta purple zebra {i}\n" for i in range(30)))
    train.pretrain(*folder_flags(folder, tmp_path))  # a new run, and other captions
    vocab = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["vocab"]
        for name in ("run-1", "run")]
    assert vocab[0][:5] == list(SPECIALS) and "dog" in vocab[0] and "zebra" in vocab[1]
    assert train.pretrain(*folder_flags(folder, tmp_path, "--resume"))


def test_held_out_images_are_in_no_training_pair(folder):
    write(folder / "b.json", {"annotations": [
        {"image_id": i, "caption": "a"} for i in range(3000)]})
    training, held_out = train.split_captions(folder)
    assert not {i for i, _ in training} & {i for i, _ in held_out}
    assert len({i for i, _ in held_out}) == 30 and len(training) + len(held_out) == 3031
    images = [{"filename": f"{n}.jpg", "split": split, "sentences": [{"raw": f"{split} {n}"}]}
        for n, split in enumerate(("test", "restval", "train", "val"))]
    write(folder / "b.json", {"images": images})
    training, held_out = train.split_captions(folder)
    assert held_out == [("3", "val 3")] and training[-2:] == [("1", "restval 1"), ("2", "train 2")]


def test_a_data_folder_means_the_base_model_and_the_papers_settings(folder, tmp_path):
    args, _ = train.parse_args(["--data", str(folder)])
    assert (args.model, args.epochs, args.batch, args.lr, args.anneal) == (
        "base", 10, 256, 1e-4, None)
    found = train.load_data(folder, tmp_path)
    config = train.model_config("base", found.store, found.tokenizer, "dual")
    assert (config.hidden_size, config.num_hidden_layers, config.region_feature_size,
        config.num_region_classes, config.switches) == (768, 12, 12, 0, "dual")


def test_a_run_starts_from_the_bert_of_its_folder_and_uses_its_words(folder, tmp_path, monkeypatch):
    words = (*SPECIALS, *(chr(c) for c in range(97, 123)), *(f"##{i}" for i in range(29)))
    write_bert(folder / "bert", bert_weights())
    write(folder / "bert" / "vocab.txt", "".join(p + "\n" for p in words))
    args, found = folder_flags(folder, tmp_path)[0], train.load_data(folder, tmp_path)
    assert tuple(found.tokenizer.pieces) == words
    with pytest.raises(BadInput, match="hidden_size"):
        train.Pretraining(args, found)
    tiny = SwitchBertConfig.tiny(num_region_classes=0)
    monkeypatch.setattr(train, "model_config", lambda *_: tiny)
    expected = bert_weights()["bert.encoder.layer.1.intermediate.dense.weight"]
    assert train.Pretraining(args, found).model.bert.layers[1].intermediate.weight.equal(expected)


# --- Flags, checkpoints, pictures, and what is refused --------------------------------------------


@pytest.mark.parametrize("flags, lr", [
    ([], 0.001), (["--data", "x"], 0.0001), (["--resume", "--out", "run"], 0.07)])
def test_help_shows_the_defaults_that_hold(plain, tmp_path, monkeypatch, capsys, flags, lr):
    plain("run", "--lr", 0.07)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        train.parse_args([*flags, "-h"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert f"highest learning rate (default: {lr})" in text


class Evil:
    """A pickle of it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


def damaged(path, how):
    """A checkpoint changed in one way."""
    whole = path.read_bytes()
    if isinstance(how, dict):
        torch.save({**torch.load(path, weights_only=True), **how}, path)
    elif how == "one bit of a weight":
        with zipfile.ZipFile(path) as file:
            place = max(file.infolist(), key=lambda e: e.file_size).header_offset + 200
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    else:
        path.write_bytes(whole[:how])


@pytest.mark.parametrize("how, message", [
    ("one bit of a weight", "not a whole checkpoint of pretraining .*is damaged"),
    (3000, "not a whole checkpoint"), (-100, "not a whole checkpoint"),
    (0, "not a whole checkpoint"), ({"task": "vqa"}, "it is a checkpoint of vqa"),
    ({"vocab": Evil()}, "not a whole checkpoint"),
    ({"format": "switchbert-2"}, "its format is switchbert-2, expected switchbert-3")])
def test_a_checkpoint_that_cannot_be_resumed_is_refused(
        plain, tmp_path, monkeypatch, how, message):
    monkeypatch.chdir(tmp_path)
    plain("run")
    damaged(tmp_path / "run" / "checkpoint.pt", how)
    with pytest.raises(BadInput, match=f"checkpoint.pt: .*{message}"):
        plain("run", "--resume")
    assert not (tmp_path / "owned").exists()  # what a pickle asks for is not run


@pytest.mark.parametrize("flags, message", [
    (["--resume", "--lr", 0.5], "--lr 0.5: the run that is resumed has 0.001"),
    (["--resume", "--eval-every", 6], "--eval-every 6: the run that is resumed has 5"),
    (["--resume", "--blind"], "--blind True: the run that is resumed has False"),
    (["--batch", 64], "--batch 64: there are only 50 training examples"),
    (["--accum", 5], "--batch 12 cannot be cut into 1 processes x --accum 5 equal parts")])
def test_flags_that_cannot_hold_are_refused(plain, flags, message):
    plain("run")
    with pytest.raises(BadInput, match=message):
        plain("run", *flags)


@pytest.mark.parametrize("change, vocab, more, message", [
    (dict(feature_size=2048), None, (), "feature_size is 12, .* trained with 2048"),
    (dict(detector="vg"), None, (), "detector is 'made up', .* trained with 'vg'"),
    (dict(num_region_classes=8), None, ("num_region_classes",), "classes is 7, .* with 8"),
    ({}, ["x"], (), "is not the checkpoint's, of 1"),
    (dict(num_region_classes=8, num_regions=100), None, (), None)])
def test_a_checkpoint_of_other_regions_or_words_is_refused_where_they_are_used(
        store, tokenizer, change, vocab, more, message):
    checkpoint = {"store": FACTS | change, "vocab": vocab or tokenizer.pieces}
    if message is None:
        return train.check_fits(checkpoint, store, tokenizer, more)
    with pytest.raises(BadInput, match=message):
        train.check_fits(checkpoint, store, tokenizer, more)


def test_the_picture_shows_each_share_as_a_length():
    """A line of pixels through layer 1: text 25 % own and 75 % both, vision all the other."""
    modes = [[[0.25, 0, 0.75], [0, 1.0, 0]], [[1.0, 0, 0], [0, 0, 1.0]]]
    depths = [[[1.0], [1.0]], [[0.5, 0.5], [0, 1.0]]]
    image = train.switches_picture({"modes": modes, "depths": depths}, "title")
    pixels = np.asarray(image).tolist()
    counts = [[row.count([*c]) for c in train.MODE_COLOURS.values()] for row in pixels]
    own, other, both = max((row for row in counts if row[1] > 100), key=sum)
    assert other > 200
    assert (own / other, both / other) == pytest.approx((0.25, 0.75), abs=0.02)


@pytest.mark.slow
def test_the_moving_picture_of_the_largest_model_stays_under_300_kilobytes(tmp_path):
    """Thirty frames of twelve layers whose switches close."""
    rng, lines = torch.Generator().manual_seed(0), []
    logits = [torch.randn(12, 2, 3, generator=rng),
        *(torch.randn(2, l + 1, generator=rng) for l in range(12))]
    for step in range(30):
        tau = 5 * 0.04 ** (step / 29)
        modes, *depths = (torch.softmax(x / tau, dim=-1).tolist() for x in logits)
        line = {"step": step, "temperature": tau, "mixture": {"modes": modes, "depths": depths}}
        lines.append(json.dumps(line) + "\n")
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    train.write_gif(tmp_path / "a.gif", [tmp_path])
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 30
    assert (tmp_path / "a.gif").stat().st_size <= 300_000


def test_training_needs_no_torchvision():
    code = "import sys, train, finetune; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
