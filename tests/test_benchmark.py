"""The benchmarks run: at sizes that mean nothing, in half a minute."""

import json

import benchmark
import pytest
import torch

from switchbert import SwitchBertConfig, SwitchBertForPretraining


def test_turns_are_taken_and_the_first_one_does_not_count():
    turns = []
    seconds = benchmark.take_turns({name: lambda turn, name=name: turns.append((name, turn))
        for name in "ab"}, rounds=2)
    assert turns == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert seconds.keys() == {"a", "b"} and all(s > 0 for s in seconds.values())


def test_operations_of_a_step_are_six_per_weight_and_token_and_attentions_products():
    """By hand for 4 layers x 128: two pairs of 3 + 2 and 5 + 1 tokens, padded to 5 and 2."""
    model = SwitchBertForPretraining(SwitchBertConfig.tiny(
        num_hidden_layers=4, hidden_size=128, num_attention_heads=4))
    batch = dict(text_mask=torch.tensor([[1, 1, 1, 0, 0], [1] * 5]),
        region_mask=torch.tensor([[1, 1], [1, 0]]))
    weights = sum(p.numel() for p in model.bert.layers.parameters())
    tokens = [3 + 1 + 2, 5 + 1 + 1]  # and the global region
    attention = sum(3 * 2 * 2 * 4 * 128 * n * n for n in tokens)  # forward, and twice backward
    assert benchmark.flops_of(model, batch) == 6 * weights * sum(tokens) + attention


def test_loading_is_measured_with_a_class_head_and_captions_of_real_lengths(tmp_path):
    make, form = benchmark.SIZES["tiny"]
    data = benchmark.made_up_pairs(tmp_path / "store", 30, form, make())
    assert data.store.meta["class_head"]
    assert data.store.num_region_classes == make().num_region_classes
    lengths = [len(data[i]["input_ids"]) for i in range(30)]
    assert lengths == benchmark.caption_lengths(30, form["pieces"]).tolist()
    assert len(set(lengths)) > 1 and len(data[0]["region_boxes"]) == form["regions"]


@pytest.mark.slow
def test_everything_that_is_measured_on_a_gpu_runs_on_a_cpu_at_small_sizes(tmp_path):
    benchmark.main(["tiny", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"step, tiny", "captions of real lengths", "loading",
        "loading for steps of 25 ms per 256 pairs", "corpus of 60,000",
        "gpu: pairs per second", "gpu: runs of the README"} <= found.keys()
    assert all(value >= 0 for numbers in found.values() for value in numbers.values())
