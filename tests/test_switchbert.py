"""What switchbert.py promises. Every claim meets numbers worked out by hand, or a second
computation that shares no code with the first.
"""

import json
import math
import struct

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from switchbert import (MATCH, MISMATCH, MODES, TEXT, VISION, Gate,
    SwitchAttention, SwitchBert, SwitchBertConfig, SwitchBertForPretraining,
    SwitchBertForReferring, SwitchBertForRetrieval, SwitchBertForVQA, SwitchBertLayer,
    SwitchInput, attention_weights, layout_of, load_bert, sees_of, switch, switch_attention,
    switch_bias, temperature)

parametrize = pytest.mark.parametrize
close = torch.testing.assert_close
TINY = SwitchBertConfig.tiny()
ONE_NUMBER = SwitchBertConfig.tiny(hidden_size=1, num_attention_heads=1, num_hidden_layers=4)
INTRA, INTER, JOINT = range(3)  # in the order of MODES

# Sizes of the tensors made here. The fixture `inputs` has others: B = 3, T = 5, R = 4.
B = 2
H = 3
T = 4
VISUAL = 5  # vision tokens: the global region and four regions
L = T + VISUAL
SIZE = 6  # of a head, d

# How text (first row) and vision share their attention out: intra, inter, joint.
SHARES = {
    "soft": [[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]],
    "sharp": [[0.9999, 1e-9, 1e-12], [1e-12, 0.9999, 1e-9]],  # soft, late in training
    "hard": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]],  # both attend to text
    "joint": [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]],
    "even": [[1 / 3, 1 / 3, 1 / 3], [1 / 3, 1 / 3, 1 / 3]],
}


def shares_of(kind):
    """A row of SHARES, for each of B pairs: (B, 2, 3)"""
    return torch.tensor(SHARES[kind]).repeat(B, 1, 1)


def modes_of(shares):
    """Shares (..., 3) of INTRA, INTER, JOINT -> weights (..., M), 0 for any other mode."""
    weights = torch.zeros(*shares.shape[:-1], len(MODES), dtype=shares.dtype)
    weights[..., [INTRA, INTER, JOINT]] = shares
    return weights


def random_modes(batch):
    """Weights (B, 2, M) of all modes. They are positive and sum to 1."""
    return torch.rand(batch, 2, len(MODES)).softmax(-1)


def tokens(numbers, dtype=torch.float32):
    """One number per token, as a query, key or value (1, 1, L, 1) of one head."""
    return torch.tensor(numbers, dtype=dtype).view(1, 1, -1, 1).requires_grad_()


def close_but_for_rounding(found, expected):
    """For float32 numbers that were added up in another order."""
    close(found, expected, rtol=1e-4, atol=1e-5)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def unpadded(batch, words, regions):
    """The Layout of a batch without padding; regions include the global one."""
    return layout_of(torch.ones(batch, words + regions), words)


def is_soft(weights):
    lowest, highest = weights.aminmax()
    return bool(0 < lowest and highest < 1)


def is_hard(weights):
    best = weights.argmax(-1)
    one_hot = F.one_hot(best, weights.shape[-1])
    return weights.equal(one_hot.float())


def assert_same_gradients(found, expected, inputs, **tolerances):
    """Both outputs send back the same gradients, for random gradients of their own."""
    incoming = torch.randn_like(found)
    ours = torch.autograd.grad(found, inputs, incoming, retain_graph=True)
    theirs = torch.autograd.grad(expected, inputs, incoming)
    close(ours, theirs, **tolerances)


def inputs_of(module):
    """A list that gets the first argument of each call of the module from now on."""
    seen = []
    module.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    return seen


def outputs_of(module):
    """A list that gets the result of each call of the module from now on."""
    seen = []
    module.register_forward_hook(lambda module, args, output: seen.append(output))
    return seen


# --- Switch-Attention ---


def test_by_hand_a_word_and_a_region_attend_to_each_other():
    """The word's switch is 1/4 intra, 1/2 inter, 1/4 joint.

                    open to the word    e^score     product    weight    value
        the word    1/4 + 1/4 = 1/2     e^(ln 3)    3/2        2/3       3
        the region  1/2 + 1/4 = 3/4     e^0         3/4        1/3       9

    Weights are products over their sum, 9/4. The word gets 2/3 x 3 + 1/3 x 9 = 5. The region's
    switch is hard, inter: the region sees the word alone, and gets its value, 3.
    """
    shares = torch.tensor([[[0.25, 0.5, 0.25], [0.0, 1.0, 0.0]]])
    modes = modes_of(shares)
    query = tokens([1.0, 1.0])
    key = tokens([math.log(3), 0.0])
    value = tokens([3.0, 9.0])
    layout = unpadded(1, words=1, regions=1)
    weights = attention_weights(query, key, modes, layout)
    close(weights[0, 0], torch.tensor([[2 / 3, 1 / 3], [1.0, 0.0]]))
    context = switch_attention(query, key, value, modes, layout)
    close(context.flatten(), torch.tensor([5.0, 3.0]))


def definition(query, key, mask, shares):
    """The weights (B, H, L, L) of one softmax in which a key counts as much as it is open."""
    modality = (torch.arange(L) >= T).long()  # TEXT or VISION of each token
    same = modality[:, None] == modality  # (L, L): are query and key of one modality?
    of_query = shares[:, modality]  # (B, L, 3)
    intra, inter, joint = of_query[..., None].unbind(dim=2)  # (B, L, 1) each
    opened = torch.where(same, intra + joint, inter + joint)  # (B, L, L)
    opened = opened * mask[:, None]
    products = query @ key.transpose(2, 3)  # (B, H, L, L)
    scores = products / math.sqrt(SIZE)
    counts = opened[:, None] * scores.exp()
    return counts / counts.sum(dim=-1, keepdim=True)


@parametrize("kind", SHARES)
@parametrize("words, regions", [(4, 5), (1, 5), (4, 1), (1, 1)])
def test_a_key_counts_as_much_as_it_is_open_to_its_query(kind, words, regions):
    """In float64: the explicit weights, the fused output, and the gradients of the latter."""
    query, key, value = torch.randn(3, B, H, L, SIZE).double().requires_grad_()
    shares = shares_of(kind).double().requires_grad_()
    mask = torch.ones(B, L)
    mask[0, 2:4] = 0
    mask[1, words:T] = 0
    mask[1, T + regions :] = 0
    layout = layout_of(mask, T)
    layout = layout._replace(modality=layout.modality.double(), group=layout.group.double())
    modes = modes_of(shares)
    weights = definition(query, key, mask, shares)
    close(attention_weights(query, key, modes, layout), weights)
    found = switch_attention(query, key, value, modes, layout)
    expected = weights @ value
    close(found, expected)
    inputs = [query, key, value]
    if is_soft(shares):  # a hard switch has no gradient: that of log(0) is infinite
        inputs.append(shares)
    assert_same_gradients(found, expected, inputs)


@parametrize("kind", ["soft", "hard"])
@parametrize("dtype, error", [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
def test_the_fused_operation_equals_the_definition(kind, dtype, error):
    query, key, value = torch.randn(3, B, H, L, SIZE).to(dtype)
    modes = modes_of(shares_of(kind))
    mask = torch.ones(B, L)
    mask[1, 2:T] = 0
    mask[1, T + 1 :] = 0
    layout = layout_of(mask, T)
    found = switch_attention(query, key, value, modes, layout)
    assert found.dtype == dtype
    weights = attention_weights(query.float(), key.float(), modes, layout)
    close(found.float(), weights @ value.float(), rtol=error, atol=error)


@parametrize("dtype", [torch.float32, torch.bfloat16])
@parametrize("apart", [0, 30, 50, 80, 1e4])
@parametrize("best", [TEXT, VISION])
def test_a_hard_switch_finds_its_keys_however_far_their_scores_lie_below_the_others(
        best, apart, dtype):
    """A word and a region see only each other, and each gets exactly the other's value. The
    third token is padding, and has the highest score.
    """
    scores = {TEXT: [0.0, -apart, apart], VISION: [-apart, 0.0, apart]}
    query = tokens([1.0, 1.0, 1.0], dtype)
    key = tokens(scores[best], dtype)
    value = tokens([1.0, 2.0, 4.0], dtype)
    shares = torch.tensor([0.0, 1.0, 0.0]).expand(1, 2, 3)
    inter = modes_of(shares).requires_grad_()
    layout = layout_of(torch.tensor([[1, 1, 0]]), num_text=1)
    context = switch_attention(query, key, value, inter, layout)[0, 0, :2]
    assert context.flatten().tolist() == [2.0, 1.0]
    weights = attention_weights(query, key, inter, layout)[0, 0, :2]
    assert weights.tolist() == [[0, 1, 0], [1, 0, 0]]
    assert switch_bias(inter, layout).to(dtype).isfinite().all()
    for gradient in torch.autograd.grad(context.sum(), [query, key, value, inter]):
        assert gradient.abs().max() < 1e3  # which NaN is not


def test_a_mode_may_see_the_first_token_of_each_modality_alone():
    """[CLS] and the global region: the mode that an exercise of the README adds."""
    sees = sees_of({"summary": (1, 0, 1, 0)})
    layout = layout_of(torch.ones(1, 5), 2, sees)  # [CLS] word | global region region
    query = key = torch.zeros(1, 1, 5, 1)
    weights = attention_weights(query, key, torch.ones(1, 2, 1), layout)[0, 0]
    assert weights.tolist() == 5 * [[0.5, 0, 0.5, 0, 0]]


@parametrize("share", [1e-10, 1e-17, 1e-19, 1e-30])
@parametrize("ahead", [0, 30, 80, 1e4])
def test_a_soft_switch_that_is_all_but_hard_has_bounded_gradients(share, ahead):
    """The gradient of log(open) is 1 / open, and `open` counts as at least 1e-18. This holds
    however far the score of the all but closed key is ahead of the other one's.
    """
    query = tokens([1.0, 1.0])
    key = tokens([0.0, -ahead])
    value = tokens([1.0, 2.0])
    shares = torch.tensor([share, 1.0, share]).expand(1, 2, 3)
    inter = modes_of(shares).requires_grad_()
    layout = unpadded(1, words=1, regions=1)
    context = switch_attention(query, key, value, inter, layout)
    for gradient in torch.autograd.grad(context.sum(), [query, inter]):
        assert gradient.abs().max() < 1e18


@parametrize("switches, seen", [("learned", True), ("IX", False)])
def test_kept_weights_are_those_with_which_a_layer_averages_values(inputs, switches, seen):
    """Padding gets no weight, nor does what a mode hides: under IX both see text only."""
    model = SwitchBert(SwitchBertConfig.tiny(switches=switches)).eval()
    attention = model.layers[1].attention
    attention.keep_weights = True
    values = outputs_of(attention.value)
    contexts = inputs_of(attention.dense)
    model(**inputs)
    weights = attention.weights  # (B, H, L, L)
    averages = weights @ attention.heads(values[0])  # (B, H, L, d)
    averages = averages.transpose(1, 2).flatten(2)  # (B, L, D)
    close(averages, contexts[0])
    close(weights.sum(-1), torch.ones(3, 2, 10))
    to_padded_words = weights[1, :, :, 3:5]
    to_padded_regions = weights[1, :, :, 8:]
    assert not to_padded_words.any()
    assert not to_padded_regions.any()
    to_vision = weights[..., 5:]
    assert to_vision.any() == seen


def test_only_layers_that_are_asked_keep_their_weights(inputs):
    model = SwitchBert(TINY)
    first, second = model.layers
    second.attention.keep_weights = True
    model(**inputs)
    assert not hasattr(first.attention, "weights")


def test_dropout_reaches_attention_weights():
    """At rate 1, every weight is dropped, and the bias of the last linear layer is left."""
    attention = SwitchAttention(SwitchBertConfig.tiny(attention_probs_dropout_prob=1.0))
    arguments = (torch.randn(2, 6, 16), random_modes(2), unpadded(2, words=3, regions=3))
    bias = attention.dense.bias.expand(2, 6, 16)
    trained = attention.train()(*arguments)
    evaluated = attention.eval()(*arguments)
    close(trained, bias)
    assert not evaluated.equal(bias)


def test_dropout_reaches_both_residual_branches():
    """At rate 1, only the two LayerNorms change the states."""
    states = torch.randn(2, 6, 16)
    layer = SwitchBertLayer(SwitchBertConfig.tiny(hidden_dropout_prob=1.0), 0).train()
    found = layer([states], unpadded(2, words=3, regions=3), 1.0)[0]
    expected = layer.output_norm(layer.attention_norm(states))
    close(found, expected)


# --- Switches ---


def test_low_temperatures_give_one_hot_switches_that_still_have_gradients():
    logits = torch.randn(1000, 3, requires_grad=True)
    weights = switch(logits, 0.2, training=True)
    nearly_hard = weights.amax(-1) > 0.9
    assert nearly_hard.float().mean() > 0.6
    gradient = torch.autograd.grad(weights[:, 0].sum(), logits)[0]
    assert gradient.isfinite().all()
    felt = gradient[:, 0] > 1e-3
    assert felt.float().mean() > 0.3


START = torch.tensor([0.0, 3.0])


@parametrize("tau, expected", [(5.0, 3), (1.0, 3), (0.5, 6), (0.2, 15)])
def test_a_start_is_log_odds_that_only_temperatures_below_1_divide(tau, expected):
    """With noise it is their median."""
    weights = switch(torch.zeros(2), tau, training=False, start=START)
    log_odds = weights.double().log().diff()
    assert log_odds.item() == pytest.approx(expected, rel=1e-2)
    noisy = switch(torch.zeros(9999, 2), tau, training=True, start=START)
    log_odds = noisy.log().diff()
    assert log_odds.median().item() == pytest.approx(expected, abs=0.3 / tau)


@parametrize("tau", [0.7, 0.2])
def test_below_1_the_temperature_changes_no_choice(tau):
    logits = torch.randn(1000, 2)

    def choices(temperature):
        torch.manual_seed(1)  # the same noise
        return switch(logits, temperature, training=True, start=START).argmax(-1)

    assert choices(tau).equal(choices(1.0))
    assert not choices(5.0).equal(choices(1.0))


@parametrize("logit, best", [(2.9, 1), (3.1, 0)])
def test_a_hard_switch_adds_the_start_to_the_logits(logit, best):
    weights = switch(torch.tensor([logit, 0.0]), None, training=False, start=START)
    assert weights.argmax() == best


def test_noisy_choices_come_as_often_as_softmax_says():
    n = 40_000
    logits = torch.tensor([1.0, 0.0, -1.5, 2.0])
    choices = switch(logits.expand(n, 4), 0.2, training=True).argmax(-1)
    found = torch.bincount(choices, minlength=4) / n
    expected = logits.softmax(-1)
    deviation = (expected * (1 - expected) / n).sqrt()  # of a share that is counted n times
    assert ((found - expected).abs() < 4 * deviation).all()


def test_noise_is_finite_even_where_a_draw_is_0(monkeypatch):
    """On Apple's GPUs, exponential_ can draw 0."""
    monkeypatch.setattr(torch.Tensor, "exponential_", torch.Tensor.zero_)
    weights = switch(torch.zeros(2), 1.0, training=True)
    close(weights, torch.tensor([0.5, 0.5]))


@parametrize("pairs, expected", [(0, 5.0), (100_000, 4.524), (1_000_000, 1.839),
    (3_000_000, 0.249), (3_218_876, 0.2), (10**9, 0.2)])
def test_the_temperature_falls_as_its_table_says(pairs, expected):
    assert temperature(pairs) == pytest.approx(expected, abs=5e-4)


def test_a_gate_reads_the_means_of_real_tokens_and_decides_for_each_modality_in_float32():
    """The means by hand: (1 + 3) / 2 = 2 and (10 + 20) / 2 = 15, then 5 and no vision: 0."""
    gate = Gate(ONE_NUMBER, num_options=3, ahead=2).eval()
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    states = torch.tensor([[1.0, 3, 9, 10, 20, 9], [4, 5, 6, 7, 8, 9]])
    means = torch.tensor([[2.0, 15.0], [5.0, 0.0]])
    with autocast():
        found = gate(states[..., None], layout_of(mask, 3).averages, 0.7)
    logits = gate.linear(means).view(2, 2, 3)
    start = torch.tensor([0.0, 0, 5 + math.log(2)])  # ahead of two options
    close(found, ((logits + start) / 0.7).softmax(-1))


def share_of_bf16(numbers):
    """The share that bfloat16 can hold: small, unless the numbers have been rounded to it."""
    return (numbers.bfloat16() == numbers).float().mean()


def test_neither_a_gate_nor_its_gradient_is_rounded_under_autocast(inputs):
    model = SwitchBert(TINY).train()
    with autocast():
        out = model(**inputs, temperature=1.0)
    assert share_of_bf16(out.modes) < 0.1
    assert share_of_bf16(out.depths[1]) < 0.1
    out.pooled.float().square().sum().backward()
    gates = [layer.mode_gate for layer in model.layers]
    gates.append(model.layers[1].switch_input.gate)
    for gate in gates:
        assert share_of_bf16(gate.linear.weight.grad) < 0.1


def test_modes_reach_the_tokens_unrounded_under_autocast():
    layout = unpadded(64, words=3, regions=4)
    modes = random_modes(64)
    with autocast():
        bias = switch_bias(modes, layout)
    assert bias.equal(switch_bias(modes, layout))


def test_the_gradient_of_depth_weights_comes_back_unrounded_under_autocast():
    layout = unpadded(64, words=3, regions=4)
    depths = list(torch.randn(2, 64, 7, 16).bfloat16())
    block = SwitchInput(TINY, 1)
    with autocast():
        mixed, weights = block(depths, layout, 1.0)
    assert mixed.dtype == torch.bfloat16
    weights.retain_grad()
    mixed.float().square().sum().backward()
    assert share_of_bf16(weights.grad) < 0.5


# --- Learned and frozen switches ---


def encoder(switches, layers=4, **changes):
    config = SwitchBertConfig.tiny(switches=switches, num_hidden_layers=layers, **changes)
    return SwitchBert(config).eval()


def test_frozen_single_is_a_bert_over_text_and_vision_in_one_sequence(tmp_path, inputs):
    model = encoder("single", layers=2)
    weights = bert_weights()
    load_bert(model, write_bert(tmp_path, weights))
    region_mask = inputs["region_mask"]
    mask = torch.cat([inputs["text_mask"], torch.ones(3, 1), region_mask], dim=1)
    text = model.text_embeddings(inputs["input_ids"])
    vision = model.region_embeddings(
        inputs["region_features"], inputs["region_boxes"], region_mask)
    embedded = torch.cat([text, vision], dim=1)
    expected = encode(weights, embedded, mask)
    cls_state = expected[:, 0]
    global_state = expected[:, 5]
    out = model(**inputs)
    found = torch.cat([out.text_states, global_state[:, None], out.region_states], dim=1)
    real = mask.bool()
    close_but_for_rounding(found[real], expected[real])
    pooled = F.relu(model.pooler.text(cls_state)) * F.relu(model.pooler.vision(global_state))
    close_but_for_rounding(out.pooled, pooled)


WITHIN = [INTRA, INTRA]  # the modes of text and of vision in one layer
ACROSS = [INTER, INTER]
JOINTLY = [JOINT, JOINT]


@parametrize("switches, plan", [
    ("intra", [WITHIN] * 4),
    ("single", [JOINTLY] * 4),
    ("dual", [WITHIN, ACROSS] * 2),
    ("late", [WITHIN, WITHIN, ACROSS, WITHIN]),
    ("late", [WITHIN] * 4 + [ACROSS, WITHIN] * 2),
    ("input", [JOINTLY] * 4),
    ("IX,JJ", [[INTRA, INTER], JOINTLY]),
    ("XI", [[INTER, INTRA]]),
])
def test_modes_that_are_not_learned_follow_their_plan(switches, plan, inputs):
    """At any temperature: a plan is hard."""
    out = encoder(switches, layers=len(plan))(**inputs, temperature=1.0)
    expected = F.one_hot(torch.tensor(plan), len(MODES)).float()  # (layers, 2, M)
    assert out.modes.equal(expected.expand(3, -1, -1, -1))


@parametrize("switches, learns_modes, learns_depths", [
    ("learned", True, True),
    ("attention", True, False),
    ("input", False, True),
    ("intra", False, False),
    ("single", False, False),
    ("dual", False, False),
    ("late", False, False),
    ("IX,JJ", False, False),
])
def test_only_what_is_learned_has_a_gate_and_is_soft(
        switches, learns_modes, learns_depths, inputs):
    """A layer that does not learn what to read reads the newest depth; so must the first."""
    model = encoder(switches)
    out = model(**inputs, temperature=1.0)
    assert is_soft(out.modes) == learns_modes
    for layer, weights in enumerate(out.depths):
        block = model.layers[layer]
        chooses = learns_depths and layer > 0
        assert bool(block.mode_gate) == learns_modes
        assert bool(block.switch_input) == chooses
        if chooses:
            assert is_soft(weights)
        else:
            assert is_hard(weights)
            assert weights[..., -1].all()


def test_base_has_the_parameters_of_bert_plus_what_switching_adds():
    d = 768
    bert = 109_482_240 - (d * d + d)  # bert-base-uncased without its own pooler
    features = 2048 * d + d
    boxes = 5 * d + d
    norms = 3 * 2 * d
    pooler = 2 * (d * 1024 + 1024)
    per_option = 2 * (2 * d + 1)  # a gate decides twice, from two means
    options_of_modes = 12 * len(MODES)
    options_of_depths = sum(range(2, 13))  # layer l has l + 1, the first none
    gates = per_option * (options_of_modes + options_of_depths)
    with torch.device("meta"):
        model = SwitchBert(SwitchBertConfig.base())
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == bert + features + boxes + norms + pooler + gates


# --- The encoder ---


def test_padding_never_changes_a_real_token(config, inputs):
    """Neither its content nor its amount does."""
    model = SwitchBert(config).eval()
    before = model(**inputs)
    inputs["input_ids"][1, 3:] = 7
    inputs["region_features"][1, 2:] = 100.0
    inputs["region_boxes"][1, 2:] = 0.9
    words = inputs["text_mask"].bool()
    regions = inputs["region_mask"].bool()

    def two_more(tensor):
        padding = torch.zeros_like(tensor[:, :2])
        return torch.cat([tensor, padding], dim=1)

    wider = {name: two_more(tensor) for name, tensor in inputs.items()}
    for after in (model(**inputs), model(**wider)):
        text_states = after.text_states[:, :5]
        region_states = after.region_states[:, :4]
        close_but_for_rounding(text_states[words], before.text_states[words])
        close_but_for_rounding(region_states[regions], before.region_states[regions])
        close_but_for_rounding(after.pooled, before.pooled)
        assert after.modes.equal(before.modes)


def test_the_feature_of_a_hidden_region_is_not_seen(config, inputs):
    model = SwitchBert(config).eval()
    hidden = torch.zeros(3, 4).bool()
    hidden[0, 1] = True
    hidden[1, 0] = True
    shown = model(**inputs)
    before = model(**inputs, region_hidden=hidden)
    inputs["region_features"][hidden] = 50.0
    after = model(**inputs, region_hidden=hidden)
    assert after.region_states.equal(before.region_states)
    assert after.pooled.equal(before.pooled)
    assert not shown.region_states[:2].equal(before.region_states[:2])


def test_regions_and_the_mean_of_the_visible_ones_enter_by_content_and_place(config, inputs):
    """Both parts are normalised before they are added, and boxes enter as 2 b - 1."""
    embed = SwitchBert(config).eval().region_embeddings
    nn.init.normal_(embed.feature.bias)  # else LayerNorm would hide a wrong mean
    features = inputs["region_features"].half()
    boxes = inputs["region_boxes"]
    mask = inputs["region_mask"]
    hidden = torch.zeros(3, 4).bool()
    hidden[0, 1] = True
    found = embed(features, boxes, mask, hidden)

    norm = nn.LayerNorm(16, eps=1e-12)  # as all three begin

    def embedded(content, box):
        return norm(norm(embed.feature(content)) + norm(embed.box(2 * box - 1)))

    seen = features.float()
    seen[0, 1] = 0
    visible = torch.tensor([[3], [2], [4]])  # regions in each sample
    mean = seen.mul(mask[..., None]).sum(dim=1) / visible
    whole_picture = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])
    close_but_for_rounding(found[:, 0], embedded(mean, whole_picture))
    close_but_for_rounding(found[:, 1:], embedded(seen, boxes))


def test_switches_are_hard_in_evaluation_and_soft_at_a_temperature(config, inputs):
    model = SwitchBert(config).eval()
    out = model(**inputs)
    assert is_hard(out.modes)
    assert all(map(is_hard, out.depths))
    assert out.modes.shape == (3, 2, 2, len(MODES))
    assert [weights.shape for weights in out.depths] == [(3, 2, 1), (3, 2, 2)]
    assert is_soft(model(**inputs, temperature=2.0).modes)


def test_switches_are_drawn_in_training(config, inputs):
    """The hotter, the more even, but for the start."""
    model = SwitchBert(config).train()
    one = model(**inputs)
    other = model(**inputs)
    assert not one.modes.equal(other.modes)
    assert not one.depths[1].equal(other.depths[1])
    hot = model(**inputs, temperature=100.0).modes
    starts = torch.stack([layer.mode_gate.start for layer in model.layers])  # (layers, M)
    close(hot, starts.softmax(-1)[:, None].expand_as(hot), rtol=0, atol=0.02)


def test_training_runs_at_temperature_1_unless_told_otherwise(config, inputs):
    model = SwitchBert(config).train()
    torch.manual_seed(5)
    default = model(**inputs).modes
    torch.manual_seed(5)
    given = model(**inputs, temperature=1.0).modes
    assert default.equal(given)


def set_gate(gate, text, vision):
    """From now on the gate chooses these options, whatever it reads."""
    choices = torch.tensor([text, vision])
    options = len(gate.start)
    nn.init.zeros_(gate.linear.weight)
    chosen = F.one_hot(choices, options).flatten()
    gate.linear.bias.data = 9.0 * chosen  # more than a start of 5 + log(M - 1)


def test_text_and_vision_choose_depths_and_modes_separately(config, inputs):
    """Text reads depth 0, the embeddings, and vision depth 1, the first layer's output."""
    model = SwitchBert(config).eval()
    first, second = model.layers
    set_gate(second.switch_input.gate, text=0, vision=1)
    set_gate(first.mode_gate, INTER, JOINT)
    set_gate(second.mode_gate, INTER, JOINT)
    depths = inputs_of(second)
    gated = inputs_of(second.mode_gate)
    attended = inputs_of(second.attention)
    out = model(**inputs)
    depth0, depth1 = depths[0]
    read = attended[0]
    assert read[:, :5].equal(depth0[:, :5])
    assert read[:, 5:].equal(depth1[:, 5:])
    assert gated[0].equal(read)
    assert out.depths[1].tolist() == [[[1.0, 0.0], [0.0, 1.0]]] * 3
    assert out.modes.argmax(-1).tolist() == [[[INTER, JOINT]] * 2] * 3


@parametrize("tau", [None, 0.7])
def test_what_a_layer_reads_is_the_weighted_sum_of_all_depths(tau):
    """The newest states decide on the weights."""
    block = SwitchInput(TINY, 3).eval()
    nn.init.normal_(block.gate.linear.weight, std=9.0)
    depths = [torch.randn(8, 7, 16, requires_grad=True) for _ in range(4)]
    layout = unpadded(8, words=3, regions=4)
    mixed, weights = block(depths, layout, tau)
    close(weights, block.gate(depths[-1], layout.averages, tau))
    chosen = weights.amax(dim=(0, 1)) > 0  # by any sample, for text or vision
    assert chosen.sum() > 1
    modality = [TEXT] * 3 + [VISION] * 4
    of_tokens = weights[:, modality]  # (B, L, depths)
    expected = torch.einsum("bli,ibld->bld", of_tokens, torch.stack(depths))
    close(mixed, expected, rtol=3e-6, atol=3e-6)
    sources = list(depths)
    if tau:  # a hard switch sends its gate no gradient
        sources.append(block.gate.linear.weight)
    assert_same_gradients(mixed, expected, sources, rtol=1e-4, atol=1e-5)


def test_no_stack_of_depths_is_kept_for_the_backward_pass():
    depths = [torch.randn(8, 7, 16, requires_grad=True) for _ in range(4)]
    block = SwitchInput(TINY, 3)
    layout = unpadded(8, words=3, regions=4)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(depths, layout, 1.0)
    assert max(kept) == depths[0].numel()


@parametrize("dtype", [torch.float32, torch.bfloat16])
def test_depths_are_kept_in_the_precision_of_products(dtype, inputs):
    model = SwitchBert(SwitchBertConfig.tiny(num_hidden_layers=3))
    depths = inputs_of(model.layers[2])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        model(**inputs)
    assert [states.dtype for states in depths[0]] == [dtype] * 3


@parametrize("tau", [5.0, 1.0])
def test_training_begins_as_vilberts_alternation_and_with_the_newest_depth(tau, inputs):
    """While gates know nothing, the odds are e^5 to 1 against all other options together."""
    out = encoder("learned", initializer_range=0.0)(**inputs, temperature=tau)
    expected = torch.full((3, 2), math.e**5 / (math.e**5 + 1))
    for l, weights in enumerate(out.depths):
        if l > 0:
            close(weights[..., -1], expected)
        alternating = out.modes[:, l, :, (INTRA, INTER)[l % 2]]
        close(alternating, expected)


def test_a_gate_that_has_learned_nothing_leaves_its_start_once_in_149_samples():
    """To the end, and with any number of options."""
    n = 40_000
    gate = Gate(ONE_NUMBER, num_options=12, ahead=11).train()
    nn.init.zeros_(gate.linear.bias)  # it reads zeros, so the bias alone is its logits
    weights = gate(torch.zeros(n, 2, 1), torch.zeros(n, 2, 2), 0.2)  # (n, 2, 12)
    left = (weights.argmax(-1) != 11).float().mean().item()
    share = 1 / (1 + math.e**5)
    assert abs(left - share) < 4 * math.sqrt(share / (2 * n))


@parametrize("layers", [4, 12])
def test_a_tenth_of_the_samples_leaves_the_starting_path_of_a_model_of_any_depth(layers, inputs):
    """4 layers: 14 switches, each at 148 to 1, 9 %. 12 layers: 46, each at 445 to 1, 10 %."""
    many = {name: tensor[:1].repeat(3000, *[1] * (tensor.ndim - 1))
        for name, tensor in inputs.items()}
    model = encoder("learned", layers, initializer_range=0.0)
    model.train()
    with torch.no_grad():
        out = model(**many, temperature=0.2)
    keeps = torch.ones(3000).bool()
    for l, weights in enumerate(out.depths):
        modes = out.modes[:, l].argmax(-1)  # (3000, 2)
        keeps &= (modes == (INTRA, INTER)[l % 2]).all(-1)
        keeps &= (weights.argmax(-1) == l).all(-1)
    leaves = 1 - keeps.float().mean().item()
    assert 0.065 < leaves < 0.125


def test_hard_switches_begin_as_dual(inputs):
    known = encoder("learned", initializer_range=0.0)(**inputs)
    assert known.modes.equal(encoder("dual")(**inputs).modes)


@parametrize("tau", [5.0, 1.0, 0.2])
def test_even_modes_are_joint_attention(tau, inputs):
    even = encoder("attention")
    for layer in even.layers:
        nn.init.zeros_(layer.mode_gate.linear.weight)
        layer.mode_gate.start.fill_(-1e30)  # of modes that you add
        layer.mode_gate.start[[INTRA, INTER, JOINT]] = 0
    single = encoder("single")
    single.load_state_dict(even.state_dict(), strict=False)
    found = even(**inputs, temperature=tau)
    expected = single(**inputs, temperature=tau)
    close(found.text_states, expected.text_states)
    close(found.region_states, expected.region_states)
    close(found.pooled, expected.pooled)


# --- Heads and losses ---


def pretraining_batch(inputs):
    """Three pairs: the first is only masked, the second only matched, the third both."""
    hidden = torch.zeros(3, 4).bool()
    hidden[0, 2] = True
    hidden[2, 1] = True
    return inputs | {
        "mlm_positions": torch.tensor([1, 2 * 5 + 2, 2 * 5 + 3]),  # b T + t, T = 5
        "mlm_labels": torch.tensor([9, 11, 12]),
        "region_hidden": hidden,
        "mrc_positions": torch.tensor([2, 2 * 4 + 1]),  # b R + r, R = 4
        "mrc_targets": torch.rand(2, 7).softmax(-1),
        "itm_positions": torch.tensor([1, 2]),
        "itm_labels": torch.tensor([MISMATCH, MATCH]),
    }


def assert_finite_gradients(model):
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


@parametrize("tau", [1.0, None], ids=["soft", "hard"])
@parametrize("switches", ["learned", "dual"])
def test_in_bf16_losses_change_by_rounding_only_and_gradients_are_finite(
        switches, tau, inputs):
    """As training on a GPU runs: the whole model under autocast."""
    model = SwitchBertForPretraining(SwitchBertConfig.tiny(switches=switches)).eval()
    batch = pretraining_batch(inputs)
    plain = model(**batch, temperature=tau)
    with autocast():
        out = model(**batch, temperature=tau)
    assert out.sums.dtype == torch.float32
    close(out.sums[:3], plain.sums[:3], rtol=0.02, atol=0.02)
    out.loss.backward()
    assert_finite_gradients(model)


def test_the_three_losses_by_hand(config, inputs):
    model = SwitchBertForPretraining(config).eval()
    batch = pretraining_batch(inputs)
    found = model(**batch)
    out = model.bert(**inputs, region_hidden=batch["region_hidden"])
    embeddings = model.bert.text_embeddings.word_embeddings.weight

    def word(b, t, label):
        scores = embeddings @ model.mlm_transform(out.text_states[b, t]) + model.mlm_bias
        return -scores.log_softmax(-1)[label]

    def region(b, r, target):
        logits = model.mrc_classifier(model.mrc_transform(out.region_states[b, r]))
        prediction = logits.softmax(-1)
        return (target * (target / prediction).log()).sum()

    mlm = word(0, 1, 9) + word(2, 2, 11) + word(2, 3, 12)
    first, second = batch["mrc_targets"]
    mrc = region(0, 2, first) + region(2, 1, second)
    log_p = model.itm_classifier(out.pooled).log_softmax(-1)
    itm = -(log_p[1, MISMATCH] + log_p[2, MATCH])
    close(found.sums[:3], torch.stack([mlm, mrc, itm]))
    close(found.loss, mlm / 3 + mrc / 2 + itm / 2)
    assert found.counts == (3, 2, 2, 3, 2)


def test_the_last_sums_count_the_words_and_the_pairs_predicted_right(config, inputs):
    """A model that always says "piece 11" and "match" gets one word and one pair right."""
    model = SwitchBertForPretraining(config).eval()
    with torch.no_grad():
        model.mlm_bias[11] = 1e4
        model.itm_classifier.bias[MATCH] = 1e4
    assert model(**pretraining_batch(inputs)).sums[3:].tolist() == [1, 1]


@parametrize("targets", [torch.zeros(0, 7), None])
def test_a_batch_without_any_predicted_place_has_zero_losses_not_nan(config, inputs, targets):
    none = torch.zeros(0).long()
    batch = pretraining_batch(inputs)
    batch["mlm_positions"] = none
    batch["mlm_labels"] = none
    batch["mrc_positions"] = none
    batch["mrc_targets"] = targets
    model = SwitchBertForPretraining(config)
    out = model(**batch)
    mlm, mrc, itm = out.sums[:3]
    assert mlm == mrc == 0
    assert out.loss == itm / 2 > 0
    out.loss.backward()
    assert_finite_gradients(model)


def test_each_of_n_answers_starts_at_probability_1_over_n(config, inputs):
    logits, _ = SwitchBertForVQA(config, num_answers=11).eval()(**inputs)
    assert logits.shape == (3, 11)
    assert logits.sigmoid().mean().item() == pytest.approx(1 / 11, rel=0.1)


def test_retrieval_starts_with_the_log_odds_of_a_match(config, inputs):
    pretrained = SwitchBertForPretraining(config).eval()
    model = SwitchBertForRetrieval.from_pretraining(config, pretrained.state_dict()).eval()
    scores, out = model(**inputs)
    assert scores.shape == (3,)
    assert out.pooled.equal(pretrained.bert(**inputs).pooled)
    p = pretrained.itm_classifier(out.pooled).softmax(-1)
    odds = p[:, MATCH] / p[:, MISMATCH]
    close(scores, odds.log(), rtol=1e-4, atol=1e-6)


def test_referring_scores_every_region_and_gives_padding_the_lowest_score(config, inputs):
    logits, _ = SwitchBertForReferring(config).eval()(**inputs)
    assert logits.shape == (3, 4)
    padding = inputs["region_mask"] == 0
    lowest = torch.finfo(torch.float32).min
    assert (logits[padding] == lowest).all()
    assert logits[~padding].abs().max() < 100


# --- BERT weights ---


LAYERS = ("bert.encoder.layer.0.", "bert.encoder.layer.1.")


def bert_weights():
    """A random BERT with Hugging Face's names: encoder, MLM, pooler and next-sentence heads."""
    linear_shapes = {
        "bert.pooler.dense": (16, 16),
        "cls.predictions.transform.dense": (16, 16),
        "cls.seq_relationship": (2, 16),
    }
    norms = ["bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"]
    for layer in LAYERS:
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            linear_shapes[f"{layer}attention.{name}"] = (16, 16)
        linear_shapes[f"{layer}intermediate.dense"] = (32, 16)
        linear_shapes[f"{layer}output.dense"] = (16, 32)
        norms.append(f"{layer}attention.output.LayerNorm")
        norms.append(f"{layer}output.LayerNorm")

    shapes = {
        "bert.embeddings.word_embeddings.weight": (60, 16),
        "bert.embeddings.position_embeddings.weight": (48, 16),
        "bert.embeddings.token_type_embeddings.weight": (2, 16),
        "cls.predictions.bias": (60,),
    }
    for name, shape in linear_shapes.items():
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]
    for name in norms:
        shapes[f"{name}.weight"] = (16,)
        shapes[f"{name}.bias"] = (16,)

    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, shape in shapes.items():
        weights[name] = torch.randn(shape, generator=generator) / 4
    words = weights["bert.embeddings.word_embeddings.weight"]
    weights["cls.predictions.decoder.weight"] = words  # tied
    return weights


def linear(weights, name, x):
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def norm(weights, name, x):
    return F.layer_norm(x, (16,), weights[name + ".weight"], weights[name + ".bias"], 1e-12)


def encode(weights, x, mask):
    """The two layers of that BERT, by its names alone, out of torch's own attention."""
    def heads(name):
        return linear(weights, name, x).unflatten(-1, (2, 8)).transpose(1, 2)  # (B, H, L, d)

    for layer in LAYERS:
        query = heads(layer + "attention.self.query")
        key = heads(layer + "attention.self.key")
        value = heads(layer + "attention.self.value")
        real = mask[:, None, None].bool()
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=real)
        context = context.transpose(1, 2).flatten(2)  # (B, L, D)
        attended = linear(weights, layer + "attention.output.dense", context)
        x = norm(weights, layer + "attention.output.LayerNorm", x + attended)
        wide = F.gelu(linear(weights, layer + "intermediate.dense", x))
        narrow = linear(weights, layer + "output.dense", wide)
        x = norm(weights, layer + "output.LayerNorm", x + narrow)
    return x


def write_bert(folder, weights, kind="model.safetensors", **config):
    """A Hugging Face folder with these weights; config: other entries of config.json."""
    folder.mkdir(exist_ok=True)
    sizes = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, hidden_act="gelu")
    (folder / "config.json").write_text(json.dumps(sizes | config))
    if kind == "model.safetensors":
        write_safetensors(folder / kind, weights)
    else:
        torch.save(weights, folder / kind)
    return folder


def write_safetensors(path, weights):
    """8 bytes with the length of the header, the header in JSON, the bytes of the tensors."""
    types = {
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
    }
    header = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, tensor in weights.items():
        start = len(body)
        body += tensor.contiguous().view(torch.uint8).numpy().tobytes()
        offsets = [start, len(body)]
        header[name] = dict(dtype=types[tensor.dtype], shape=tensor.shape, data_offsets=offsets)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.fixture
def model():
    """With frozen intra switches its text is a BERT."""
    return SwitchBertForPretraining(SwitchBertConfig.tiny(switches="intra")).eval()


RENAMED = {  # a published form: what has another name there
    "now": {},
    "without prefix": {"bert.": ""},
    "old": {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"},
}


@parametrize("form", RENAMED)
@parametrize("kind, dtype", [
    ("pytorch_model.bin", torch.float32),
    ("model.safetensors", torch.float32),
    ("model.safetensors", torch.float16),
    ("model.safetensors", torch.bfloat16),
])
def test_the_weights_of_a_bert_in_every_published_form_make_that_bert(
        model, tmp_path, inputs, kind, dtype, form):
    weights = {name: tensor.to(dtype) for name, tensor in bert_weights().items()}
    published = {"bert.embeddings.position_ids": torch.arange(48)[None]}
    for name, tensor in weights.items():
        for now, then in RENAMED[form].items():
            name = name.replace(now, then)
        published[name] = tensor
    load_bert(model, write_bert(tmp_path, published, kind))

    weights = {name: tensor.float() for name, tensor in weights.items()}
    words = weights["bert.embeddings.word_embeddings.weight"]
    positions = weights["bert.embeddings.position_embeddings.weight"][:5]
    token_type = weights["bert.embeddings.token_type_embeddings.weight"][0]
    embedded = words[inputs["input_ids"]] + positions + token_type
    embedded = norm(weights, "bert.embeddings.LayerNorm", embedded)
    real = inputs["text_mask"].bool()
    expected = encode(weights, embedded, real)[real]
    found = model.bert(**inputs).text_states[real]
    close_but_for_rounding(found, expected)

    transformed = F.gelu(linear(weights, "cls.predictions.transform.dense", expected))
    transformed = norm(weights, "cls.predictions.transform.LayerNorm", transformed)
    scores = transformed @ words.T + weights["cls.predictions.bias"]
    tied = model.bert.text_embeddings.word_embeddings.weight
    found = F.linear(model.mlm_transform(found), tied, model.mlm_bias)
    close_but_for_rounding(found, scores)


def test_loading_names_what_was_missing_and_what_was_not_used(tmp_path):
    write_bert(tmp_path, bert_weights())
    missing, unused = load_bert(SwitchBertForPretraining(TINY), tmp_path)
    assert sorted(unused) == ["cls.seq_relationship.bias", "cls.seq_relationship.weight",
        "pooler.dense.bias", "pooler.dense.weight"]
    new = ("region_embeddings", "gate", "bert.pooler", "mrc_", "itm_")
    for part in new:
        assert any(part in name for name in missing)
    for name in missing:
        assert any(part in name for part in new)


def test_loading_into_a_bare_encoder_leaves_the_mlm_head_unused(tmp_path):
    write_bert(tmp_path, bert_weights())
    missing, unused = load_bert(SwitchBert(TINY), tmp_path)
    assert "mlm_bias" in unused
    for name in missing:
        assert "gate" in name or name.startswith(("region_embeddings", "pooler"))


def loading(changes=None, damage=None, **config):
    """A function that loads a BERT with changed weights, a damaged file or other sizes."""
    def write_and_load(model, folder):
        write_bert(folder, bert_weights() | (changes or {}), **config)
        path = folder / "model.safetensors"
        if damage:
            path.write_bytes(damage(path.read_bytes()))
        load_bert(model, folder)
    return write_and_load


def load_gpt2(model, folder):
    load_bert(model, write_bert(folder, {"gpt2.weight": torch.zeros(3)}))


def replacing(old, new):
    return lambda content: content.replace(old, new, 1)


LONGER = {"bert.encoder.layer.1.output.dense.bias": torch.zeros(17)}
REFUSED = {  # what is wrong: (what is tried with a model and a folder, words of the message)
    "switches": (lambda *_: SwitchBertConfig(switches="both"),
        "switches='both': expected one of learned, attention, input, intra, single, .*late, or"),
    "path": (lambda *_: SwitchBertConfig(switches="II,XX,JJ", num_hidden_layers=2),
        "switches='II,XX,JJ': .* two letters of I, X, J.* for each of at most 2 layers"),
    "heads": (lambda *_: SwitchBertConfig(hidden_size=10, num_attention_heads=4),
        "hidden_size=10 is not a multiple of num_attention_heads=4"),
    "depth": (loading(num_hidden_layers=12), "num_hidden_layers is 12, but this model has 2"),
    "activation": (loading(hidden_act="relu"), "hidden_act is 'relu', but this model has 'gelu'"),
    "norm": (loading(layer_norm_eps=1e-5), "layer_norm_eps is 1e-05, but this model has 1e-12"),
    "positions": (loading(position_embedding_type="relative_key"), "embedding_type is 'relative"),
    "shape": (loading(LONGER), "size mismatch for bert.layers.1.output.bias"),
    "names": (load_gpt2, "no weight has a name of BERT's"),
    "no folder": (load_bert, "config.json"),
    "cut in a tensor": (loading(damage=lambda content: content[:-4]), None),
    "number type": (loading(damage=replacing(b'"F32"', b'"F99"')), "F99"),
    "too few bytes": (loading(damage=replacing(b"[60, 16]", b"[61, 16]")), "61"),
    "too many bytes": (loading(damage=replacing(b"[60, 16]", b"[59, 16]")), "59"),
}


@parametrize("wrong", REFUSED)
def test_wrong_settings_and_weights_that_do_not_fit_are_refused(model, tmp_path, wrong):
    attempt, message = REFUSED[wrong]
    with pytest.raises((ValueError, RuntimeError, OSError, KeyError), match=message):
        attempt(model, tmp_path)
