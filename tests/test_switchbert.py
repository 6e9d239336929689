"""What switchbert.py promises, each against an independent computation."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import random_inputs
from torch import nn

from switchbert import (IGNORE, INTER, INTRA, JOINT, MATCH, MISMATCH, TEXT, VISION, Gate,
    SwitchBert, SwitchBertConfig, SwitchBertForPretraining, SwitchBertForReferring,
    SwitchBertForRetrieval, SwitchBertForVQA, averaging_matrix, switch, switch_attention,
    temperature)

B, H, T, V, SIZE = 2, 3, 4, 5, 6  # V vision tokens


def tensors(dtype=torch.float64, requires_grad=False):
    generator = torch.Generator().manual_seed(3)
    qkv = [torch.randn(B, H, T + V, SIZE, generator=generator, dtype=torch.float64) .to(dtype)
        .requires_grad_(requires_grad) for _ in range(3)]
    mask = torch.ones(B, T + V).long()
    mask[0, 2:4] = 0
    mask[1, 7:] = 0
    return qkv, mask


def one_mode(q, k, v, mask, mode):
    """Plain masked softmax attention, query by query: the definition."""
    out = torch.zeros_like(v)
    for b in range(B):
        for i in range(T + V):
            own = torch.arange(T + V).lt(T) == (i < T)
            seen = {INTRA: own, INTER: ~own, JOINT: own | ~own}[mode] & mask[b].bool()
            if seen.any():
                scores = (k[b, :, seen] @ q[b, :, i, :, None]).squeeze(-1) / math.sqrt(SIZE)
                out[b, :, i] = (scores.softmax(-1).unsqueeze(-1) * v[b, :, seen]).sum(1)
    return out


def gates(*rows):
    return torch.tensor(rows, dtype=torch.float64).expand(B, 2, 3)


@pytest.mark.parametrize("mode", [INTRA, INTER, JOINT])
def test_with_the_gate_at_mode_k_attention_is_plain_attention_of_mode_k(mode):
    (q, k, v), mask = tensors()
    forced = F.one_hot(torch.tensor([mode, mode]), 3).double().expand(B, 2, 3)
    found = switch_attention(q, k, v, mask, T, forced)
    # The scores are computed in float32, whatever comes in.
    torch.testing.assert_close(found, one_mode(q, k, v, mask, mode), rtol=1e-5, atol=1e-6)


def mixture(q, k, v, mask, modes):
    """The three modes computed separately, then mixed with each query's weights."""
    weight = torch.cat([modes[:, :1].expand(B, T, 3), modes[:, 1:].expand(B, V, 3)], 1)
    return sum(weight[:, None, :, m, None] * one_mode(q, k, v, mask, m) for m in range(3))


def test_any_mixture_equals_the_three_modes_mixed_forward_and_gradient():
    (q, k, v), mask = tensors(requires_grad=True)
    modes = gates([0.2, 0.5, 0.3], [0.6, 0.1, 0.3]).clone().requires_grad_()
    wanted = torch.randn(B, H, T + V, SIZE, dtype=torch.float64)
    found, expected = (
        f(q, k, v, mask, *a) for f, a in ((switch_attention, (T, modes)), (mixture, (modes,))))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for x, y in zip(torch.autograd.grad((found * wanted).sum(), [q, k, v, modes]),
            torch.autograd.grad((expected * wanted).sum(), [q, k, v, modes])):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [slice(0, T), slice(T, None), slice(None)])
def test_a_fully_padded_block_gives_nothing_and_stays_finite(padded):
    (q, k, v), mask = tensors(requires_grad=True)
    mask[:, padded] = 0
    modes = gates([0.2, 0.5, 0.3], [0.6, 0.1, 0.3])
    found = switch_attention(q, k, v, mask, T, modes)
    torch.testing.assert_close(found, mixture(q, k, v, mask, modes), rtol=1e-5, atol=1e-6)
    for gradient in torch.autograd.grad(found.square().sum(), [q, k, v]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 3e-3), (torch.bfloat16, 3e-2)])
def test_half_precision_stays_within_its_rounding(dtype, tolerance):
    (q, k, v), mask = tensors(dtype)
    mask[1, T:] = 0
    modes = gates([0.2, 0.5, 0.3], [0.6, 0.1, 0.3])
    found = switch_attention(q, k, v, mask, T, modes.to(dtype))
    assert found.dtype == dtype
    expected = mixture(q.double(), k.double(), v.double(), mask, modes)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=2 * tolerance)


# --- frozen settings ---


def plain_bert(model, states, mask):
    """A BERT encoder with this model's weights, out of torch's own attention."""
    for layer in model.layers:
        attention = layer.attention
        b, n, d = states.shape
        q, k, v = (f(states).view(b, n, attention.num_heads, -1).transpose(1, 2)
            for f in (attention.query, attention.key, attention.value))
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :].bool())
        states = layer.attention_norm(
            states + attention.dense(context.transpose(1, 2).reshape(b, n, d)))
        states = layer.output_norm(states + layer.output(F.gelu(layer.intermediate(states))))
    return states


def frozen(switches, **changes):
    changes = {"num_hidden_layers": 4, **changes}
    return SwitchBert(SwitchBertConfig.tiny(switches=switches, **changes)).eval()


def test_frozen_single_is_a_bert_over_the_concatenated_sequence(inputs):
    model = frozen("single")
    text = model.text_embeddings(inputs["input_ids"])
    vision = model.region_embeddings(
        *(inputs[k] for k in ("region_features", "region_boxes", "region_mask")))
    mask = torch.cat([inputs["text_mask"], torch.ones(3, 1).long(), inputs["region_mask"]], 1)
    expected = plain_bert(model, torch.cat([text, vision], 1), mask)
    out, real = model(**inputs), inputs["text_mask"].bool()
    torch.testing.assert_close(out.text_states[real], expected[:, :5][real], rtol=1e-4, atol=1e-5)
    real = inputs["region_mask"].bool()
    torch.testing.assert_close(out.region_states[real], expected[:, 6:][real], rtol=1e-4, atol=1e-5)


def test_frozen_intra_text_is_a_text_only_bert(inputs):
    model = frozen("intra")
    expected = plain_bert(model, model.text_embeddings(inputs["input_ids"]), inputs["text_mask"])
    real = inputs["text_mask"].bool()
    torch.testing.assert_close(
        model(**inputs).text_states[real], expected[real], rtol=1e-4, atol=1e-5)


def test_frozen_intra_has_exactly_no_gradient_across_modalities(inputs):
    model = frozen("intra")
    inputs["region_features"].requires_grad_()
    out = model(**inputs)
    assert (
        torch.autograd.grad(
            out.text_states.sum(), inputs["region_features"], allow_unused=True, retain_graph=True
        )[0].count_nonzero()
        == 0
    )
    word = torch.autograd.grad(
        out.region_states.sum(), model.text_embeddings.word_embeddings.weight)[0]
    assert word.count_nonzero() == 0


@pytest.mark.parametrize(
    "switches, expected",
    [("intra", [INTRA] * 4), ("single", [JOINT] * 4), ("dual", [INTRA, INTER] * 2),
        ("late", [INTRA] * 2 + [JOINT] * 2)],
)
def test_frozen_settings_follow_their_plan_without_gates(switches, expected, inputs):
    model = frozen(switches)
    out = model(**inputs)
    assert out.modes.argmax(-1).tolist() == [[[m, m] for m in expected]] * 3
    assert all(d[..., -1].eq(1).all() and d.sum() == 6 for d in out.depths)
    assert not [name for name, _ in model.named_parameters() if "gate" in name]


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
            torch.testing.assert_close(x[mask.bool()], y[mask.bool()], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(before.pooled, after.pooled, rtol=1e-4, atol=1e-5)
        assert before.modes.equal(after.modes)


def test_permuting_regions_permutes_their_states_and_nothing_else(config, inputs):
    model = SwitchBert(config).eval()
    order = torch.tensor([2, 0, 3, 1])
    permuted = {k: v[:, order] if k.startswith("region") else v for k, v in inputs.items()}
    one, two = model(**inputs), model(**permuted)
    torch.testing.assert_close(one.region_states[:, order], two.region_states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.text_states, two.text_states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.pooled, two.pooled, rtol=1e-4, atol=1e-5)


def test_evaluation_is_deterministic_and_hard(config, inputs):
    model = SwitchBert(config).eval()
    one, two = model(**inputs), model(**inputs)
    assert one.text_states.equal(two.text_states) and one.pooled.equal(two.pooled)
    for weights in (one.modes, *one.depths):
        assert weights.eq(0).logical_or(weights.eq(1)).all() and weights.sum(-1).eq(1).all()


def test_evaluation_with_a_temperature_is_the_soft_mixture(config, inputs):
    out = SwitchBert(config).eval()(**inputs, temperature=2.0)
    assert ((out.modes > 0) & (out.modes < 1)).all()
    torch.testing.assert_close(out.modes.sum(-1), torch.ones(3, 2, 2))


def test_training_samples_each_switch_anew(config, inputs):
    model = SwitchBert(config).train()
    one, two = model(**inputs, temperature=1.0), model(**inputs, temperature=1.0)
    assert not one.modes.equal(two.modes)
    assert one.modes.shape == (3, 2, 2, 3) and [d.shape for d in one.depths] == [(3, 2, 1),
        (3, 2, 2)]


def test_a_depth_weight_of_one_reads_exactly_that_depth(config, inputs):
    """Text reads depth 0, the embeddings, and vision depth 1, the first layer's output."""
    model = SwitchBert(config).eval()
    gate, seen = model.layers[1].switch_input.gate.linear, {}
    with torch.no_grad():
        gate.weight.zero_()
        gate.bias.copy_(torch.tensor([9.0, 0.0, 0.0, 9.0]))  # (text, vision) x (depth 0, depth 1)
    model.layers[0].register_forward_hook(
        lambda m, args, out: seen.update(depth0=args[0][0], depth1=out[0]))
    model.layers[1].attention.register_forward_hook(lambda m, args, out: seen.update(read=args[0]))
    out = model(**inputs)
    assert seen["read"][:, :5].equal(seen["depth0"][:, :5])
    assert seen["read"][:, 5:].equal(seen["depth1"][:, 5:])
    assert out.depths[1].tolist() == [[[1.0, 0.0], [0.0, 1.0]]] * 3


def test_text_and_vision_switch_apart(config, inputs):
    model = SwitchBert(config).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.mode_gate.linear.weight.zero_()
            layer.mode_gate.linear.bias.copy_(torch.tensor([0, 5.0, 0, 0, 0, 5.0]))
    modes = model(**inputs).modes.argmax(-1)
    assert modes[..., TEXT].eq(INTER).all() and modes[..., VISION].eq(JOINT).all()


def test_the_global_region_is_the_mean_of_the_visible_ones(config, inputs):
    embed = SwitchBert(config).eval().region_embeddings
    features, boxes, mask = (inputs[k] for k in ("region_features", "region_boxes", "region_mask"))
    features[0, 1] = 0  # a masked region
    found = embed(features, boxes, mask)[:, 0]
    means = torch.stack(
        [features[0, [0, 2, 3]].mean(0), features[1, :2].mean(0), features[2].mean(0)])
    box = embed.box(torch.tensor([-1.0, -1, 1, 1, 1]))  # the whole picture, [0, 0, 1, 1, 1]


    def norm(x):  # with weight 1 and bias 0, as all three begin
        return (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True)

    expected = norm(norm(embed.feature(means)) + norm(box))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gates_read_the_means_of_real_tokens_by_hand():
    """Two words and two regions, the last of each padding in the first sample; no region in the
    second.
    """
    states = torch.tensor([[[1.0], [50.0], [7.0], [60.0]], [[1.0], [3.0], [8.0], [9.0]]])
    mask = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0]])
    assert (averaging_matrix(mask, 2) @ states).tolist() == [[[1.0], [7.0]], [[2.0], [0.0]]]


def test_base_has_the_parameters_of_bert_plus_what_switching_adds():
    d, f, layers = 768, 2048, 12
    bert = ((30522 + 512 + 2) * d + 2 * d
        + layers * (4 * (d * d + d) + (d * 3072 + 3072) + (3072 * d + d) + 4 * d))
    regions = (f * d + d) + (5 * d + d) + 3 * 2 * d
    pool = 2 * (d * 1024 + 1024)
    mode_gates = layers * (2 * d * 6 + 6)
    depth_gates = sum(2 * d * 2 * (l + 1) + 2 * (l + 1) for l in range(1, layers))
    with torch.device("meta"):
        model = SwitchBert(SwitchBertConfig.base())
    assert (sum(p.numel() for p in model.parameters())
        == bert + regions + pool + mode_gates + depth_gates)
    assert bert == 109_482_240 - (d * d + d)  # bert-base-uncased without its own pooler


# --- switches ---


def test_low_temperature_gives_one_hot_gates_that_still_have_gradients():
    logits = torch.randn(1000, 3, requires_grad=True)
    weights = switch(logits, 0.2, training=True)
    assert (weights.amax(-1) > 0.9).float().mean() > 0.6
    weights = switch(logits, 0.01, training=True)
    assert (weights.amax(-1) > 0.99).float().mean() > 0.95
    gradient = torch.autograd.grad(switch(logits, 0.2, training=True)[:, 0].sum(), logits)[0]
    assert gradient.isfinite().all() and (gradient[:, 0] > 1e-3).float().mean() > 0.3


def test_high_temperature_mixes_evenly():
    assert (switch(torch.zeros(1000, 3), 100.0, training=True) - 1 / 3).abs().max() < 0.05


def test_gumbel_choices_come_as_often_as_softmax_says():
    logits = torch.tensor([1.0, 0.0, -1.5, 2.0])
    n = 40_000
    chosen = switch(logits.expand(n, 4), 0.2, training=True).argmax(-1)
    found = torch.bincount(chosen, minlength=4) / n
    expected = logits.softmax(-1)
    # four standard deviations of a share that is counted n times
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / n).sqrt()).all()


def test_the_gate_computes_in_float32_under_autocast():
    gate, summary = Gate(8, 3).eval(), torch.randn(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        weights = gate(summary, 1.0)
    logits = F.linear(summary, gate.linear.weight, gate.linear.bias).view(2, 2, 3)
    assert weights.equal(logits.softmax(-1))


@pytest.mark.parametrize(
    "pairs, expected",
    [(0, 5.0), (100_000, 4.524), (1_000_000, 1.839), (3_000_000, 0.249), (3_218_876, 0.2),
        (10**9, 0.2)],
)
def test_temperature_table(pairs, expected):
    assert temperature(pairs) == pytest.approx(expected, abs=5e-4)


# --- heads ---


def pretraining_batch(inputs):
    labels = torch.full((3, 5), IGNORE)
    labels[0, 1], labels[2, 2], labels[2, 3] = 9, 11, 12
    mrc_mask = torch.zeros(3, 4, dtype=torch.bool)
    mrc_mask[0, 2] = mrc_mask[1, 0] = mrc_mask[2, 1] = True
    targets = torch.rand(3, 7).softmax(-1)
    return dict(inputs, mlm_labels=labels, mrc_mask=mrc_mask, mrc_targets=targets,
        itm_labels=torch.tensor([MATCH, MISMATCH, MATCH]))


def test_the_three_losses_by_hand(config, inputs):
    model = SwitchBertForPretraining(config).eval()
    batch = pretraining_batch(inputs)
    found, out = model(**batch), model.bert(**inputs)
    words = model.bert.text_embeddings.word_embeddings.weight

    def mlm(b, t, label):
        scores = words @ model.mlm_transform(out.text_states[b, t]) + model.mlm_bias
        return -scores.log_softmax(-1)[label]

    def mrc(b, r, target):
        p = model.mrc_classifier(model.mrc_transform(out.region_states[b, r])).softmax(-1)
        return sum(float(q) * math.log(q / pi) for q, pi in zip(target.tolist(), p.tolist()))

    assert found.losses[0].item() == pytest.approx(
        ((mlm(0, 1, 9) + mlm(2, 2, 11) + mlm(2, 3, 12)) / 3).item(), rel=1e-4)
    targets = batch["mrc_targets"]
    assert found.losses[1].item() == pytest.approx(
        (mrc(0, 2, targets[0]) + mrc(2, 1, targets[2])) / 2, rel=1e-4)
    itm = model.itm_classifier(out.pooled).log_softmax(-1)
    assert found.losses[2].item() == pytest.approx(
        -(itm[0, 1] + itm[1, 0] + itm[2, 1]).item() / 3, rel=1e-4)
    assert found.loss.item() == pytest.approx(found.losses.sum().item())
    assert found.counts.tolist() == [3, 2, 3]


def test_a_batch_without_any_masked_place_has_zero_losses_not_nan(config, inputs):
    batch = pretraining_batch(inputs)
    batch["itm_labels"][:] = MISMATCH
    out = SwitchBertForPretraining(config)(**batch)
    assert out.losses[:2].tolist() == [0, 0] and out.losses[2] > 0
    out.loss.backward()
    batch.update(
        mlm_labels=torch.full((3, 5), IGNORE), mrc_mask=batch["mrc_mask"] & False, mrc_targets=None)
    assert SwitchBertForPretraining(config)(**batch).losses[:2].tolist() == [0, 0]


def test_the_mlm_output_matrix_is_the_word_embedding(config, inputs):
    model = SwitchBertForPretraining(config)
    assert not [
        n for n, p in model.named_parameters() if p.shape == (60, 16) and "word_embeddings" not in n
    ]
    out = model(**pretraining_batch(inputs))
    gradient = torch.autograd.grad(
        out.losses[0], model.bert.text_embeddings.word_embeddings.weight)[0]
    unseen = [i for i in range(60) if i not in inputs["input_ids"].unique().tolist()]
    assert (
        gradient[unseen].abs().sum(-1) > 0).all()  # words that are no input: gradient as outputs


def test_task_heads_have_the_promised_shapes(config, inputs):
    assert SwitchBertForVQA(config, 11).eval()(**inputs)[0].shape == (3, 11)
    assert SwitchBertForRetrieval(config).eval()(**inputs)[0].shape == (3,)
    logits = SwitchBertForReferring(config).eval()(**inputs)[0]
    assert logits.shape == (3, 4)
    assert logits[1, 2:].eq(torch.finfo(torch.float32).min).all()
    assert logits[1, :2].abs().max() < 100 and logits[[0, 2]].abs().max() < 100


def test_wrong_settings_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="switches='both'.*'learned'"):
        SwitchBertConfig(switches="both")
    with pytest.raises(ValueError, match="hidden_size=10 .* num_attention_heads=4"):
        SwitchBertConfig(hidden_size=10, num_attention_heads=4)


def test_sixteen_pairs_can_be_learned_by_heart(config):
    generator = torch.Generator().manual_seed(0)
    inputs = random_inputs(generator, b=16)
    labels = torch.full((16, 5), IGNORE)
    labels[:, 2] = torch.randint(5, 60, (16,), generator=generator)
    mask = torch.zeros(16, 4, dtype=torch.bool)
    mask[:, 0] = True
    inputs["region_features"][:, 0] = 0
    targets = F.one_hot(torch.randint(0, 7, (16,), generator=generator), 7).float()
    batch = dict(inputs, mlm_labels=labels, mrc_mask=mask, mrc_targets=targets,
        itm_labels=torch.tensor([MATCH, MATCH, MATCH, MISMATCH] * 4))
    model = SwitchBertForPretraining(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first = model(**batch, temperature=5.0).losses
    for step in range(200):
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        out = model(**batch, temperature=max(0.2, 5.0 * 0.97**step))
        out.loss.backward()
    assert (first > 0.5).all()
    assert (model.eval()(**batch).losses < 0.05).all()
