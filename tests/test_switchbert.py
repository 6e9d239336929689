"""What switchbert.py promises, each claim against an independent computation."""

import json
import math
import struct

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from switchbert import (INTER, INTRA, JOINT, MATCH, MISMATCH, TEXT, VISION, Gate,
    SwitchAttention, SwitchBert, SwitchBertConfig, SwitchBertForPretraining,
    SwitchBertForReferring, SwitchBertForRetrieval, SwitchBertForVQA, SwitchBertLayer, SwitchInput,
    attention_weights, layout_of, load_bert, switch, switch_attention, switch_bias,
    temperature)

B, H, T, SIZE = 2, 3, 4, 6
VISUAL = 5  # vision tokens
SOFT = ([0.2, 0.5, 0.3], [0.6, 0.1, 0.3])  # modes of text, of vision
HARD = ([1.0, 0, 0], [0, 1.0, 0])  # text attends to text, vision to text
close = torch.testing.assert_close


def definition(q, k, mask, modes):
    """The weights (B, H, L, L) of one softmax in which a key counts as much as it is open."""
    text = torch.arange(T + VISUAL) < T
    own = (text[:, None] == text).double()  # (query, key)
    intra, inter, joint = torch.where(text[:, None], modes[:, :1], modes[:, 1:]).unbind(-1)
    opened = own * (intra + joint)[..., None] + (1 - own) * (inter + joint)[..., None]  # (B, L, L)
    e = (q @ k.transpose(2, 3) / math.sqrt(SIZE)).exp() * (opened * mask[:, None])[:, None]
    return e / e.sum(-1, keepdim=True)


@pytest.mark.parametrize("modes", [SOFT, HARD, [[0, 0, 1.0]] * 2, [[1 / 3] * 3] * 2],
    ids=["soft", "hard", "joint", "even"])
@pytest.mark.parametrize("words, regions", [(4, 5), (1, 5), (4, 1), (1, 1)])
def test_a_key_counts_as_much_as_it_is_open_to_its_query(modes, words, regions):
    """In float64: the explicit weights, the fused output and the gradients of the latter; those of
    a switch too unless it is hard: log(0) has none.
    """
    q, k, v, wanted = torch.randn(4, B, H, T + VISUAL, SIZE).double().requires_grad_()
    mask = torch.ones(B, T + VISUAL).long()
    mask[0, 2:4] = 0
    mask[1, words:T] = 0
    mask[1, T + regions :] = 0
    modes = torch.tensor(modes, dtype=torch.float64).repeat(B, 1, 1).requires_grad_()
    layout = layout_of(mask, T)
    layout = layout._replace(modality=layout.modality.double(), group=layout.group.double())
    weights = definition(q, k, mask, modes)
    close(attention_weights(q, k, modes, layout), weights)
    found = switch_attention(q, k, v, modes, layout)
    expected = weights @ v
    close(found, expected)
    inputs = [q, k, v] + [modes] * (0 not in modes)
    for x, y in zip(torch.autograd.grad((found * wanted).sum(), inputs),
            torch.autograd.grad((expected * wanted).sum(), inputs)):
        close(x, y)


@pytest.mark.parametrize("modes", [SOFT, HARD], ids=["soft", "hard"])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
def test_the_fused_operation_equals_the_definition(modes, dtype, error):
    q, k, v = torch.randn(3, B, H, T + VISUAL, SIZE).to(dtype)
    mask = torch.ones(B, T + VISUAL).long()
    mask[1, 2:T] = 0
    mask[1, T + 1 :] = 0
    modes = torch.tensor(modes).repeat(B, 1, 1)
    layout = layout_of(mask, T)
    found = switch_attention(q, k, v, modes, layout)
    weights = attention_weights(q.float(), k.float(), modes, layout)
    assert found.dtype == dtype
    close(found.float(), weights @ v.float(), rtol=error, atol=error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apart", [0, 30, 50, 80, 1e4])
@pytest.mark.parametrize("best", [TEXT, VISION])
def test_a_hard_switch_finds_its_keys_however_far_their_scores_lie_below_the_others(
        best, apart, dtype):
    """A word and a region that attend to each other: each gets the value of the other, exactly.
    The third token is padding, and scores highest.
    """
    q = torch.ones(1, 1, 3, 1, dtype=dtype, requires_grad=True)
    v = torch.tensor([1.0, 2.0, 4.0], dtype=dtype).view(1, 1, 3, 1).requires_grad_()
    k = [0.0, -apart, apart] if best == TEXT else [-apart, 0.0, apart]
    k = torch.tensor(k, dtype=dtype).view(1, 1, 3, 1).requires_grad_()
    inter = torch.tensor([[[0.0, 1.0, 0.0]] * 2], requires_grad=True)
    layout = layout_of(torch.tensor([[1, 1, 0]]), 1)
    out = switch_attention(q, k, v, inter, layout)
    assert out.flatten()[:2].tolist() == [2.0, 1.0]
    assert switch_bias(inter, layout).to(dtype).isfinite().all()
    for gradient in torch.autograd.grad(out[:, :, :2].sum(), [q, k, v, inter]):
        assert gradient.isfinite().all() and gradient.abs().max() < 1e3
    weights = attention_weights(q, k, inter, layout)[0, 0, :2]
    assert weights.tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("share", [1e-10, 1e-17, 1e-19, 1e-30])
@pytest.mark.parametrize("ahead", [0, 30, 80, 1e4])
def test_a_soft_switch_that_is_all_but_hard_has_bounded_gradients(share, ahead):
    """Of log(open) it is 1 / open, and `open` counts as 1e-18 at least. However far the key that
    is all but closed is ahead of the other one.
    """
    query = torch.ones(1, 1, 2, 1, requires_grad=True)
    key = torch.tensor([0.0, -ahead]).view(1, 1, 2, 1)
    value = torch.tensor([1.0, 2.0]).view(1, 1, 2, 1)
    modes = torch.tensor([[[share, 1.0, share]] * 2], requires_grad=True)
    out = switch_attention(query, key, value, modes, layout_of(torch.ones(1, 2), 1))
    for gradient in torch.autograd.grad(out.sum(), [query, modes]):
        assert gradient.isfinite().all() and gradient.abs().max() < 1e18


@pytest.mark.parametrize("switches", ["learned", "IX"])
def test_kept_weights_are_those_with_which_a_layer_averages_values(inputs, switches):
    """Padding has none, nor what a mode does not see: in IX text no vision, vision no vision. They
    are kept in layers that are asked for.
    """
    model = SwitchBert(SwitchBertConfig.tiny(switches=switches)).eval()
    attention = model.layers[1].attention
    attention.keep_weights = True
    seen = {}
    attention.value.register_forward_hook(lambda *call: seen.update(value=call[2]))
    attention.dense.register_forward_hook(lambda *call: seen.update(context=call[1][0]))
    model(**inputs)
    weights = attention.weights  # (B, H, L, L)
    averages = weights @ attention.heads(seen["value"])
    close(averages.transpose(1, 2).flatten(2), seen["context"])
    close(weights.sum(-1), torch.ones(3, 2, 10))
    assert not weights[1, :, :, 3:5].any() and not weights[1, :, :, 8:].any()
    assert weights[..., 5:].any() == (switches == "learned")
    assert not hasattr(model.layers[0].attention, "weights")


def test_dropout_reaches_attention_weights_and_both_residual_branches():
    """At rate 1 nothing is left of what is dropped."""
    states, modes = torch.randn(2, 6, 16), torch.ones(2, 2, 3) / 3
    layout = layout_of(torch.ones(2, 6).long(), 3)
    attention = SwitchAttention(SwitchBertConfig.tiny(attention_probs_dropout_prob=1.0)).train()
    close(attention(states, modes, layout), attention.dense.bias.expand(2, 6, 16))
    assert not attention.eval()(states, modes, layout).equal(attention.dense.bias.expand(2, 6, 16))
    layer = SwitchBertLayer(SwitchBertConfig.tiny(hidden_dropout_prob=1.0), 0).train()
    close(layer([states], layout, 1.0)[0], layer.output_norm(layer.attention_norm(states)))


# --- switches ---


def test_low_temperatures_give_one_hot_switches_that_still_have_gradients():
    logits = torch.randn(1000, 3, requires_grad=True)
    weights = switch(logits, 0.2, training=True)
    assert (weights.amax(-1) > 0.9).float().mean() > 0.6
    gradient = torch.autograd.grad(weights[:, 0].sum(), logits)[0]
    assert gradient.isfinite().all() and (gradient[:, 0] > 1e-3).float().mean() > 0.3


def test_a_start_is_log_odds_that_no_temperature_changes_and_the_final_one_decides():
    start, even = torch.tensor([0.0, 3.0]), torch.zeros(2)
    for tau in (5.0, 1.0, 0.2):
        odds = switch(even, tau, training=False, start=start)
        assert (odds[1] / odds[0]).log().item() == pytest.approx(3, rel=1e-5)
        noisy = switch(even.expand(9999, 2), tau, training=True, start=start)
        assert (noisy[:, 1] / noisy[:, 0]).log().median().item() == pytest.approx(3, abs=0.3 / tau)
    for ahead, best in ((0.59, 1), (0.61, 0)):  # of a logit: 0.6 / 0.2 = 3
        logits = torch.tensor([ahead, 0.0])
        assert switch(logits, None, training=False, start=start).argmax() == best


def test_noisy_choices_come_as_often_as_softmax_says():
    logits, n = torch.tensor([1.0, 0.0, -1.5, 2.0]), 40_000
    chosen = switch(logits.expand(n, 4), 0.2, training=True).argmax(-1)
    found, expected = torch.bincount(chosen, minlength=4) / n, logits.softmax(-1)
    # four standard deviations of a share that is counted n times
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / n).sqrt()).all()


def test_noise_is_finite_even_where_a_draw_is_0(monkeypatch):
    """As exponential_ can draw on Apple's GPUs."""
    monkeypatch.setattr(torch.Tensor, "exponential_", torch.Tensor.zero_)
    close(switch(torch.zeros(2), 1.0, training=True), torch.tensor([0.5, 0.5]))


def test_the_temperature_falls_as_its_table_says():
    table = {0: 5.0, 100_000: 4.524, 1_000_000: 1.839, 3_000_000: 0.249, 3_218_876: 0.2, 10**9: 0.2}
    assert {n: temperature(n) for n in table} == pytest.approx(table, abs=5e-4)


def test_a_gate_reads_the_means_of_real_tokens_and_decides_for_each_modality_in_float32():
    """By hand: in the first sample text has the mean 2, vision 15; the second has no vision."""
    gate = Gate(1, 3).eval()
    states = torch.tensor([[1.0, 3, 9, 10, 20, 9], [4, 5, 6, 7, 8, 9]])[..., None]
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    logits = gate.linear(torch.tensor([[2.0, 15.0], [5.0, 0.0]]))
    with torch.autocast("cpu", torch.bfloat16):
        found = gate(states, layout_of(mask, 3).averages, 0.7)
    close(found, (logits / 0.7).view(2, 2, 3).softmax(-1))


def share_of_bf16(numbers):
    """Numbers of float32 are seldom numbers of bfloat16 as well, unless they were rounded."""
    return (numbers.bfloat16() == numbers).float().mean()


def test_neither_a_gate_nor_its_gradient_is_rounded_under_autocast(inputs):
    model = SwitchBert(SwitchBertConfig.tiny()).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs, temperature=1.0)
    out.pooled.float().square().sum().backward()
    assert share_of_bf16(out.modes) < 0.1 and share_of_bf16(out.depths[1]) < 0.1
    gates = [model.layers[1].switch_input.gate, *(layer.mode_gate for layer in model.layers)]
    for gate in gates:
        assert share_of_bf16(gate.linear.weight.grad) < 0.1


def test_what_a_gate_decides_reaches_the_tokens_unrounded_and_its_gradient_comes_back_so():
    layout = layout_of(torch.ones(64, 7).long(), 3)
    modes = torch.rand(64, 2, 3).softmax(-1)
    depths = list(torch.randn(2, 64, 7, 16).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        bias = switch_bias(modes, layout)
        mixed, weights = SwitchInput(SwitchBertConfig.tiny(), 1)(depths, layout, 1.0)
    assert bias.equal(switch_bias(modes, layout))
    weights.retain_grad()
    mixed.float().square().sum().backward()
    assert mixed.dtype == torch.bfloat16 and share_of_bf16(weights.grad) < 0.5


# --- settings ---


def setting(switches, layers=4, **changes):
    config = SwitchBertConfig.tiny(switches=switches, num_hidden_layers=layers, **changes)
    return SwitchBert(config).eval()


def test_frozen_single_is_a_bert_over_text_and_vision_in_one_sequence(tmp_path, inputs):
    model = setting("single", 2)
    load_bert(model, write_bert(tmp_path, bert_weights()))
    text_mask, region_mask = inputs["text_mask"], inputs["region_mask"]
    text = model.text_embeddings(inputs["input_ids"])
    vision = model.region_embeddings(inputs["region_features"], inputs["region_boxes"], region_mask)
    mask = torch.cat([text_mask, torch.ones(3, 1), region_mask], 1).bool()
    expected = encode(bert_weights(), torch.cat([text, vision], 1), mask)
    out = model(**inputs)
    found = torch.cat([out.text_states, expected[:, 5:6], out.region_states], 1)
    close(found[mask], expected[mask], rtol=1e-4, atol=1e-5)
    pooled = F.relu(model.pooler.text(expected[:, 0])) * F.relu(model.pooler.vision(expected[:, 5]))
    close(out.pooled, pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("switches, layers, expected", [
    ("intra", 4, [INTRA] * 4), ("single", 4, [JOINT] * 4), ("dual", 4, [INTRA, INTER] * 2),
    ("late", 4, [INTRA, INTRA, INTER, INTRA]), ("late", 8, [INTRA] * 4 + [INTER, INTRA] * 2),
    ("attention", 4, None), ("input", 4, [JOINT] * 4), ("learned", 4, None),
    ("IX,JJ", 2, [[INTRA, INTER], [JOINT, JOINT]]), ("XI", 1, [[INTER, INTRA]])])
def test_what_is_not_learned_follows_its_plan_without_gates(switches, layers, expected, inputs):
    model = setting(switches, layers)
    out = model(**inputs, temperature=1.0)
    if expected:
        modes = torch.tensor([mode if isinstance(mode, list) else [mode] * 2 for mode in expected])
        assert out.modes.equal(F.one_hot(modes, 3).float().expand(3, -1, 2, 3))
    else:
        assert ((out.modes > 0) & (out.modes < 1)).all()
    for newest, weights in enumerate(out.depths):
        if newest and switches in ("input", "learned"):
            assert ((weights > 0) & (weights < 1)).all()
        else:  # each layer reads the one before
            assert weights.equal(F.one_hot(torch.tensor(newest)).expand(3, 2, -1))
    gates = {name.split(".")[2] for name, _ in model.named_parameters() if "gate" in name}
    assert gates == {"learned": {"mode_gate", "switch_input"}, "attention": {"mode_gate"},
        "input": {"switch_input"}}.get(switches, set())


def test_base_has_the_parameters_of_bert_plus_what_switching_adds():
    d, layers = 768, range(12)
    bert = 109_482_240 - (d * d + d)  # bert-base-uncased without its own pooler
    regions, pool = (2048 * d + d) + (5 * d + d) + 3 * 2 * d, 2 * (d * 1024 + 1024)
    gates = sum((2 * d + 1) * 2 * options for l in layers for options in (3, l + 1 if l else 0))
    with torch.device("meta"):
        model = SwitchBert(SwitchBertConfig.base())
    assert sum(p.numel() for p in model.parameters()) == bert + regions + pool + gates


# --- the encoder ---


def test_padding_never_changes_a_real_token(config, inputs):
    model = SwitchBert(config).eval()
    before = model(**inputs)
    inputs["input_ids"][1, 3:] = 7
    inputs["region_features"][1, 2:] = 100.0
    inputs["region_boxes"][1, 2:] = 0.9
    wider = {k: F.pad(v, (0, 0) * (v.ndim - 2) + (0, 2)) for k, v in inputs.items()}
    for after in (model(**inputs), model(**wider)):
        for name, mask in (("text_states", inputs["text_mask"]),
                ("region_states", inputs["region_mask"])):
            x, y = getattr(before, name), getattr(after, name)[:, : mask.shape[1]]
            close(x[mask.bool()], y[mask.bool()], rtol=1e-4, atol=1e-5)
        close(before.pooled, after.pooled, rtol=1e-4, atol=1e-5)
        assert before.modes.equal(after.modes)


def test_the_feature_of_a_hidden_region_is_not_seen(config, inputs):
    model, hidden = SwitchBert(config).eval(), torch.zeros(3, 4).bool()
    hidden[0, 1] = hidden[1, 0] = True
    one, shown = model(**inputs, region_hidden=hidden), model(**inputs)
    inputs["region_features"][hidden] = 50.0
    two = model(**inputs, region_hidden=hidden)
    assert two.region_states.equal(one.region_states) and two.pooled.equal(one.pooled)
    assert not shown.region_states[:2].equal(one.region_states[:2])


def test_regions_and_the_mean_of_the_visible_ones_enter_by_content_and_place(config, inputs):
    """Both parts are normalised before they are added, and boxes enter as 2 b - 1."""
    embed = SwitchBert(config).eval().region_embeddings
    features, boxes, mask = (inputs[k] for k in ("region_features", "region_boxes", "region_mask"))
    hidden = torch.zeros(3, 4).bool()
    hidden[0, 1] = True
    nn.init.normal_(embed.feature.bias)  # without it, LayerNorm would make up for a wrong mean
    found = embed(features.half(), boxes, mask, hidden)
    features = features.half().float()
    features[0, 1] = 0
    means = features.mul(mask[..., None]).sum(1) / torch.tensor([[3], [2], [4]])  # visible regions
    plain = nn.LayerNorm(16, eps=1e-12)  # as all three begin
    whole = torch.tensor([0.0, 0, 1, 1, 1])  # the box of the global region is the whole picture
    for x, content, box in ((found[:, 0], means, whole), (found[:, 1:], features, boxes)):
        expected = plain(plain(embed.feature(content)) + plain(embed.box(2 * box - 1)))
        close(x, expected, rtol=1e-4, atol=1e-5)


def test_switches_are_hard_in_evaluation_soft_at_a_temperature_and_drawn_in_training(
        config, inputs):
    model = SwitchBert(config).eval()
    out = model(**inputs)
    for weights in (out.modes, *out.depths):
        assert weights.eq(0).logical_or(weights.eq(1)).all() and weights.sum(-1).eq(1).all()
    soft = model(**inputs, temperature=2.0).modes
    assert ((soft > 0) & (soft < 1)).all()
    model.train()
    one, two = model(**inputs), model(**inputs)
    assert not one.modes.equal(two.modes) and not one.depths[1].equal(two.depths[1])
    assert [w.shape for w in (one.modes, *one.depths)] == [(3, 2, 2, 3), (3, 2, 1), (3, 2, 2)]
    default, given = (torch.manual_seed(5) and model(**inputs, **t).modes
        for t in ({}, {"temperature": 1.0}))
    assert default.equal(given)
    assert (model(**inputs, temperature=100.0).modes - 1 / 3).abs().max() < 0.1


def test_text_and_vision_read_depths_and_choose_modes_apart(config, inputs):
    """Text reads depth 0, the embeddings, and vision depth 1, the first layer's output."""
    model = SwitchBert(config).eval()
    for gate, bias in ((model.layers[1].switch_input.gate, [9.0, 0, 0, 9]),
            *((layer.mode_gate, [0, 5.0, 0, 0, 0, 5]) for layer in model.layers)):
        nn.init.zeros_(gate.linear.weight)
        gate.linear.bias.data = torch.tensor(bias)
    seen = []
    model.layers[1].register_forward_hook(lambda m, args, out: seen.extend(args[0]))
    for part in (model.layers[1].mode_gate, model.layers[1].attention):
        part.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    out = model(**inputs)
    gated, read, depth0, depth1 = seen
    assert gated.equal(read)
    assert read[:, :5].equal(depth0[:, :5]) and read[:, 5:].equal(depth1[:, 5:])
    assert out.depths[1].tolist() == [[[1.0, 0.0], [0.0, 1.0]]] * 3
    assert out.modes.argmax(-1).tolist() == [[[INTER, JOINT]] * 2] * 3


@pytest.mark.parametrize("tau", [None, 0.7])
def test_what_a_layer_reads_is_the_weighted_sum_of_all_depths(tau):
    block = SwitchInput(SwitchBertConfig.tiny(), 3).eval()
    nn.init.normal_(block.gate.linear.weight, std=9.0)
    depths = [torch.randn(8, 7, 16, requires_grad=True) for _ in range(4)]
    layout = layout_of(torch.ones(8, 7).long(), 3)
    mixed, weights = block(depths, layout, tau)
    close(weights, block.gate(depths[-1], layout.averages, tau))  # decided by the newest states
    assert weights.amax(dim=(0, 1)).count_nonzero() > 1
    per_token = torch.cat([weights[:, :1].expand(8, 3, 4), weights[:, 1:].expand(8, 4, 4)], 1)
    expected = torch.einsum("bli,ibld->bld", per_token, torch.stack(depths))
    close(mixed, expected, rtol=3e-6, atol=3e-6)
    wanted = torch.randn(8, 7, 16)
    inputs = depths + [block.gate.linear.weight] * (tau is not None)
    for x, y in zip(torch.autograd.grad((mixed * wanted).sum(), inputs, retain_graph=True),
            torch.autograd.grad((expected * wanted).sum(), inputs)):
        close(x, y, rtol=1e-4, atol=1e-5)


def test_no_stack_of_depths_is_kept_for_the_backward_pass():
    depths = [torch.randn(8, 7, 16, requires_grad=True) for _ in range(4)]
    block = SwitchInput(SwitchBertConfig.tiny(), 3)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(depths, layout_of(torch.ones(8, 7).long(), 3), 1.0)
    assert max(kept) == depths[0].numel()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_depths_are_kept_in_the_precision_of_products(dtype, inputs):
    model = SwitchBert(SwitchBertConfig.tiny(num_hidden_layers=3))
    seen = []
    model.layers[2].register_forward_hook(lambda module, args, out: seen.extend(args[0]))
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        model(**inputs)
    assert [states.dtype for states in seen] == [dtype or torch.float32] * 3


@pytest.mark.parametrize("tau", [5.0, 1.0, 0.2])
def test_training_begins_near_single_whatever_the_temperature(tau, inputs):
    """Gates that know nothing yet: even modes are joint attention, and the newest of l + 1 depths
    has the weight e^5 / (e^5 + l).
    """
    out = setting("learned", initializer_range=0.0)(**inputs, temperature=tau)
    close(out.modes, torch.full((3, 4, 2, 3), 1 / 3))
    for l, weights in enumerate(out.depths):
        assert weights[..., -1].flatten().tolist() == pytest.approx(
            [math.e**5 / (math.e**5 + l)] * 6)
    attention = setting("attention")
    for layer in attention.layers:
        nn.init.zeros_(layer.mode_gate.linear.weight)
    single = setting("single")
    single.load_state_dict(attention.state_dict(), strict=False)
    one, other = attention(**inputs, temperature=tau), single(**inputs)
    for name in ("text_states", "region_states", "pooled"):
        close(getattr(one, name), getattr(other, name))


# --- heads and losses ---


def pretraining_batch(inputs):
    """The second pair is only matched, the first only masked, the third both. T = 5, R = 4."""
    hidden = torch.zeros(3, 4).bool()
    hidden[0, 2] = hidden[2, 1] = True
    return dict(inputs, mlm_positions=torch.tensor([1, 2 * 5 + 2, 2 * 5 + 3]),
        mlm_labels=torch.tensor([9, 11, 12]), region_hidden=hidden,
        mrc_positions=torch.tensor([2, 2 * 4 + 1]), mrc_targets=torch.rand(2, 7).softmax(-1),
        itm_positions=torch.tensor([1, 2]), itm_labels=torch.tensor([MISMATCH, MATCH]))


@pytest.mark.parametrize("switches", ["learned", "dual"])
def test_in_bf16_losses_stay_within_its_rounding_and_gradients_are_finite(switches, inputs):
    """As training on a GPU runs: the whole model under autocast, in the soft and the hard mode."""
    model = SwitchBertForPretraining(SwitchBertConfig.tiny(switches=switches)).eval()
    batch = pretraining_batch(inputs)
    for tau in (1.0, None):
        plain = model(**batch, temperature=tau).losses
        with torch.autocast("cpu", torch.bfloat16):
            out = model(**batch, temperature=tau)
        assert out.sums.dtype == torch.float32
        close(out.losses, plain, rtol=0.02, atol=0.02)
        out.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_three_losses_by_hand(config, inputs):
    model = SwitchBertForPretraining(config).eval()
    batch = pretraining_batch(inputs)
    found, out = model(**batch), model.bert(**inputs, region_hidden=batch["region_hidden"])
    embeddings = model.bert.text_embeddings.word_embeddings.weight

    def word(b, t, label):
        scores = embeddings @ model.mlm_transform(out.text_states[b, t]) + model.mlm_bias
        return -scores.log_softmax(-1)[label]

    def region(b, r, target):
        p = model.mrc_classifier(model.mrc_transform(out.region_states[b, r])).softmax(-1)
        return (target * (target / p).log()).sum()

    itm = model.itm_classifier(out.pooled).log_softmax(-1)
    one, two = batch["mrc_targets"]
    close(found.losses, torch.stack([(word(0, 1, 9) + word(2, 2, 11) + word(2, 3, 12)) / 3,
        (region(0, 2, one) + region(2, 1, two)) / 2, -(itm[1, 0] + itm[2, 1]) / 2]))
    close(found.loss, found.losses.sum())
    assert found.counts == (3, 2, 2)
    with torch.no_grad():
        model.mlm_bias[11] = model.itm_classifier.bias[MATCH] = 1e4  # always piece 11, and a match
    assert model(**batch).correct.tolist() == [1, 1]


@pytest.mark.parametrize("targets", [torch.zeros(0, 7), None])
def test_a_batch_without_any_predicted_place_has_zero_losses_not_nan(config, inputs, targets):
    none = torch.zeros(0).long()
    batch = dict(pretraining_batch(inputs), mlm_positions=none, mlm_labels=none,
        mrc_positions=none, mrc_targets=targets)
    model = SwitchBertForPretraining(config)
    out = model(**batch)
    assert out.losses[:2].tolist() == [0, 0] and out.losses[2] > 0
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_an_answer_starts_at_probability_one_over_their_number(config, inputs):
    logits, _ = SwitchBertForVQA(config, 11).eval()(**inputs)
    assert logits.shape == (3, 11)
    assert logits.sigmoid().mean().item() == pytest.approx(1 / 11, rel=0.1)


def test_retrieval_starts_with_the_log_odds_of_a_match(config, inputs):
    pretrained = SwitchBertForPretraining(config).eval()
    model = SwitchBertForRetrieval.from_pretraining(config, pretrained.state_dict()).eval()
    scores, out = model(**inputs)
    odds = pretrained.itm_classifier(out.pooled).softmax(-1)
    close(scores, (odds[:, MATCH] / odds[:, MISMATCH]).log(), rtol=1e-4, atol=1e-6)
    assert out.pooled.equal(pretrained.bert(**inputs).pooled) and scores.shape == (3,)


def test_referring_scores_every_region_and_padding_lowest(config, inputs):
    logits = SwitchBertForReferring(config).eval()(**inputs)[0]
    padding = inputs["region_mask"] == 0
    assert logits.shape == (3, 4) and logits[padding].eq(torch.finfo(torch.float32).min).all()
    assert logits[~padding].abs().max() < 100


# --- BERT weights ---


def bert_weights():
    """A random BERT with Hugging Face's names, its MLM head, pooler and next-sentence head."""
    g, d, e, head = torch.Generator().manual_seed(5), 16, "bert.embeddings.", "cls.predictions."
    shapes = {f"{e}word_embeddings.weight": (60, d), f"{e}position_embeddings.weight": (48, d),
        f"{e}token_type_embeddings.weight": (2, d), f"{head}bias": (60,)}
    linear = {"bert.pooler.dense": (d, d), "cls.seq_relationship": (2, d),
        f"{head}transform.dense": (d, d)}
    norms = [f"{e}LayerNorm", f"{head}transform.LayerNorm"]
    for layer in ("bert.encoder.layer.0.", "bert.encoder.layer.1."):
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            linear[f"{layer}attention.{part}"] = (d, d)
        linear |= {f"{layer}intermediate.dense": (32, d), f"{layer}output.dense": (d, 32)}
        norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
    for name, shape in {**linear, **dict.fromkeys(norms, (d,))}.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    weights = {name: torch.randn(shape, generator=g) / 4 for name, shape in shapes.items()}
    weights[f"{head}decoder.weight"] = weights[f"{e}word_embeddings.weight"]
    return weights


def linear(w, name, x):
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def norm(w, name, x):
    return F.layer_norm(x, (16,), w[name + ".weight"], w[name + ".bias"], 1e-12)


def encode(w, x, mask):
    """The two layers of that BERT, by its names alone, out of torch's own attention."""
    for layer in ("bert.encoder.layer.0.", "bert.encoder.layer.1."):
        q, k, v = (linear(w, f"{layer}attention.self.{p}", x).unflatten(-1, (2, 8)).transpose(1, 2)
            for p in ("query", "key", "value"))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None].bool())
        y = linear(w, layer + "attention.output.dense", y.transpose(1, 2).flatten(2))
        x = norm(w, layer + "attention.output.LayerNorm", x + y)
        y = linear(w, layer + "output.dense", F.gelu(linear(w, layer + "intermediate.dense", x)))
        x = norm(w, layer + "output.LayerNorm", x + y)
    return x


def write_bert(folder, weights, kind="model.safetensors", **config):
    """A Hugging Face folder. A .safetensors file: header length, JSON header, raw tensors."""
    folder.mkdir(exist_ok=True)
    sizes = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, hidden_act="gelu")
    (folder / "config.json").write_text(json.dumps(sizes | config))
    if kind != "model.safetensors":
        torch.save(weights, folder / kind)
        return folder
    types = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, t in weights.items():
        start, body = len(body), body + t.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = dict(dtype=types[t.dtype], shape=t.shape, data_offsets=[start, len(body)])
    text = json.dumps(header).encode()
    (folder / kind).write_bytes(struct.pack("<Q", len(text)) + text + body)
    return folder


@pytest.fixture
def model():
    """With frozen intra switches its text is a BERT."""
    return SwitchBertForPretraining(SwitchBertConfig.tiny(switches="intra")).eval()


FORMS = {"now": [], "without_prefix": [("bert.", "")],
    "old": [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")]}


@pytest.mark.parametrize("kind, dtype", [("pytorch_model.bin", torch.float32),
    *(("model.safetensors", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16))])
@pytest.mark.parametrize("form", FORMS)
def test_a_berts_weights_in_every_published_form_make_that_bert(
        model, tmp_path, inputs, kind, dtype, form):
    weights = {name: tensor.to(dtype) for name, tensor in bert_weights().items()}
    renamed = {"bert.embeddings.position_ids": torch.arange(48)[None]}
    for name, tensor in weights.items():
        for now, then in FORMS[form]:
            name = name.replace(now, then)
        renamed[name] = tensor
    load_bert(model, write_bert(tmp_path, renamed, kind))
    w, e, head = ({k: v.float() for k, v in weights.items()}, "bert.embeddings.",
        "cls.predictions.")
    words, real = w[e + "word_embeddings.weight"], inputs["text_mask"].bool()
    x = words[inputs["input_ids"]] + w[e + "position_embeddings.weight"][:5]
    x = norm(w, e + "LayerNorm", x + w[e + "token_type_embeddings.weight"][0])
    expected, found = encode(w, x, real)[real], model.bert(**inputs).text_states[real]
    close(found, expected, rtol=1e-4, atol=1e-5)
    x = F.gelu(linear(w, head + "transform.dense", expected))
    scores = norm(w, head + "transform.LayerNorm", x) @ words.T + w[head + "bias"]
    close(model.mlm_logits(found), scores, rtol=1e-4, atol=1e-4)


def test_what_was_not_found_and_what_was_not_used_is_named(tmp_path):
    write_bert(tmp_path, bert_weights())
    missing, unexpected = load_bert(SwitchBertForPretraining(SwitchBertConfig.tiny()), tmp_path)
    assert sorted(unexpected) == ["bert.pooler.dense.bias", "bert.pooler.dense.weight",
        "cls.seq_relationship.bias", "cls.seq_relationship.weight"]
    new = ("region_embeddings", "gate", "bert.pooler", "mrc_", "itm_")
    assert {part for part in new for name in missing if part in name} == {*new}
    assert all(any(part in name for part in new) for name in missing)
    missing, unexpected = load_bert(SwitchBert(SwitchBertConfig.tiny()), tmp_path)
    assert "cls.predictions.bias" in unexpected
    assert all("gate" in n or n.startswith(("region_embeddings", "pooler")) for n in missing)


def loading(weights=None, edit=None, kind="model.safetensors", **config):
    def write_and_load(model, folder):
        write_bert(folder, bert_weights() if weights is None else weights, kind, **config)
        if edit:
            (folder / kind).write_bytes(edit((folder / kind).read_bytes()))
        load_bert(model, folder)
    return write_and_load


REFUSED = {  # what is wrong: (the call, words of the message)
    "switches": (lambda *_: SwitchBertConfig(switches="both"),
        "switches='both': expected one of learned, attention, input, intra, single, .*late, or"),
    "path": (lambda *_: SwitchBertConfig(switches="II,XX,JJ", num_hidden_layers=2),
        "switches='II,XX,JJ': .* two letters of I, X, J for each of at most 2 layers"),
    "heads": (lambda *_: SwitchBertConfig(hidden_size=10, num_attention_heads=4),
        "hidden_size=10 is not a multiple of num_attention_heads=4"),
    "depth": (loading(num_hidden_layers=12), "num_hidden_layers is 12, but this model has 2"),
    "activation": (loading(hidden_act="relu"), "hidden_act is 'relu', but this model has 'gelu'"),
    "norm": (loading(layer_norm_eps=1e-5), "layer_norm_eps is 1e-05, but this model has 1e-12"),
    "positions": (loading(position_embedding_type="relative_key"), "embedding_type is 'relative"),
    "shape": (loading(bert_weights() | {"bert.encoder.layer.1.output.dense.bias": torch.zeros(17)}),
        "size mismatch for bert.layers.1.output.bias"),
    "names": (loading({"gpt2.weight": torch.zeros(3)}), "no weight has a name of BERT's"),
    "no folder": (load_bert, "config.json"),
    "cut in a tensor": (loading(edit=lambda whole: whole[:-4]), None),
    "number type": (loading(edit=lambda whole: whole.replace(b'"F32"', b'"F99"', 1)), "F99"),
    "too few bytes": (loading(edit=lambda whole: whole.replace(b"[60, 16]", b"[61, 16]")), "61"),
    "too many bytes": (loading(edit=lambda whole: whole.replace(b"[60, 16]", b"[59, 16]")), "59")}


@pytest.mark.parametrize("wrong", REFUSED)
def test_wrong_settings_and_unfitting_weights_are_refused(model, tmp_path, wrong):
    call, message = REFUSED[wrong]
    with pytest.raises((ValueError, RuntimeError, OSError, KeyError), match=message):
        call(model, tmp_path)
