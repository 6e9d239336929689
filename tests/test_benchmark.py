"""The benchmarks run: at sizes that mean nothing, in half a minute."""

import json

import pytest
import torch

from switchbert import SwitchBertConfig, SwitchBertForPretraining
from tests.tools import benchmark


def test_turns_are_taken_and_the_first_one_does_not_count():
    turns = []

    def first(turn):
        turns.append(("first", turn))

    def second(turn):
        turns.append(("second", turn))

    seconds = benchmark.take_turns({"a": first, "b": second}, rounds=1)
    assert turns == [("first", 0), ("second", 0), ("first", 1), ("second", 1)]
    assert seconds["a"] > 0
    assert seconds["b"] > 0


def test_the_median_leaves_out_the_warm_up(monkeypatch):
    """The calls take 9 s, to warm up, then 1, 3 and 2 s."""
    now = [0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    def work(turn):
        now[0] += (9, 1, 3, 2)[turn]

    assert benchmark.take_turns({"work": work}, rounds=3) == {"work": 2}


def test_operations_of_a_step_are_six_per_weight_and_token_and_attentions_products():
    """By hand for 4 layers x 128: two pairs of 3 + 2 and 5 + 1 tokens, padded to 5 and 2."""
    config = SwitchBertConfig.tiny(num_hidden_layers=4, hidden_size=128, num_attention_heads=4)
    model = SwitchBertForPretraining(config)
    text_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    region_mask = torch.tensor([[1, 1], [1, 0]])
    batch = {"text_mask": text_mask, "region_mask": region_mask}

    weights = sum(p.numel() for p in model.bert.layers.parameters())
    tokens = [3 + 1 + 2, 5 + 1 + 1]  # and the global region
    # Forward and twice backward: two products of n x n x 128, each a product and a sum, 4 layers.
    attention = sum(3 * 2 * 2 * 4 * 128 * n * n for n in tokens)
    assert benchmark.flops_of(model, batch) == 6 * weights * sum(tokens) + attention


def test_loading_is_measured_with_a_class_head_and_captions_of_real_lengths(tmp_path):
    make_config, form = benchmark.SIZES["tiny"]
    config = make_config()
    data = benchmark.made_up_pairs(tmp_path / "store", 30, form, config)
    assert data.store.meta["class_head"]
    assert data.store.num_region_classes == config.num_region_classes
    assert len(data[0]["region_boxes"]) == form["regions"]
    lengths = [len(data[i]["input_ids"]) for i in range(30)]
    assert lengths == benchmark.caption_lengths(30, form["pieces"]).tolist()
    assert len(set(lengths)) > 1


@pytest.mark.slow
def test_everything_that_is_measured_on_a_gpu_runs_on_a_cpu_at_small_sizes(tmp_path):
    path = tmp_path / "found.json"
    benchmark.main(["tiny", "--json", str(path)])
    found = json.loads(path.read_text())
    titles = [
        "step, tiny",
        "captions of real lengths",
        "loading",
        "loading for steps of 25 ms per 256 pairs",
        "corpus of 60,000",
        "gpu: pairs per second",
        "gpu: runs of the README",
    ]
    assert found.keys() >= set(titles)
    for title, numbers in found.items():
        assert min(numbers.values()) >= 0, title
