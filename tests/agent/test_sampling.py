"""Sampling against transformers' generate, and its log-probs against a packed forward."""

import pytest
import torch
from peft.tuners import lora
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from regrpo.decoding import few_row_linear
from regrpo.losses import packed_log_probs
from regrpo.merged_adapter import merged_adapter
from regrpo.modeling import head, hidden_states, load_model
from regrpo.packing import collate
from regrpo.sampling import LocalPolicy, sample
from regrpo.segments import TokenizedTrajectory
from regrpo_kernels import Segment


@pytest.fixture(scope="module")
def tiny():
    """A vocabulary so small that a random model ends some turns early."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(5)
    lengths = (3, 31, 7, 7, 12, 1, 20, 2)
    return [torch.randint(1, 24, (n,), generator=generator).tolist() for n in lengths]


def run(model, prompts, *, stop_id, temperature=1.0, seed=0, limit=24, **kwargs):
    return sample(
        model,
        prompts,
        stop_id=stop_id,
        pad_id=0,
        temperature=temperature,
        max_new_tokens=limit,
        generator=torch.Generator().manual_seed(seed),
        **kwargs,
    )


@pytest.fixture(scope="module")
def stop_id(tiny, prompts):
    """A token that ends some greedy turns early and others never."""
    free = [s.ids for s in run(tiny, prompts, stop_id=-1, temperature=0.0)]
    tokens = {t for ids in free for t in ids}
    best = min(tokens, key=lambda t: abs(sum(t in ids for ids in free) - len(free) / 2))
    assert 0 < sum(best in ids for ids in free) < len(free)
    return best


def test_greedy_equals_generate(tiny, prompts, stop_id):
    ours = run(tiny, prompts, stop_id=stop_id, temperature=0.0)
    for prompt, result in zip(prompts, ours, strict=True):
        theirs = tiny.generate(
            torch.tensor([prompt]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=stop_id,
            pad_token_id=0,
        )[0, len(prompt) :]
        assert result.ids == theirs.tolist()
    ended = [r.ids[-1] == stop_id for r in ours]
    assert any(ended)
    assert not all(ended)


def test_greedy_equals_generate_with_learned_positions(prompts):
    """Rotary positions hide a shift by the padding; learned ones do not."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=24, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
    model = GPT2LMHeadModel(config).eval()
    for prompt, result in zip(
        prompts, run(model, prompts, stop_id=-1, temperature=0.0, limit=6), strict=True
    ):
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert result.ids == theirs[0, len(prompt) :].tolist()


def test_turns_end_with_the_stop_token_or_at_the_limit(tiny, prompts, stop_id):
    for result in run(tiny, prompts * 8, stop_id=stop_id):
        assert len(result.ids) == len(result.log_probs) <= 24
        assert stop_id not in result.ids[:-1]
        assert len(result.ids) == 24 or result.ids[-1] == stop_id
    assert all(len(r.ids) == 1 for r in run(tiny, prompts, stop_id=stop_id, limit=1))
    assert run(tiny, [], stop_id=stop_id) == []


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probs_are_those_of_a_packed_forward(tiny, prompts, stop_id, temperature):
    results = run(tiny, prompts, stop_id=stop_id, temperature=temperature)
    rows = []
    for prompt, result in zip(prompts, results, strict=True):
        row = TokenizedTrajectory()
        row.extend(prompt, Segment.CONTEXT)
        row.extend(result.ids, Segment.ACTION, result.log_probs)
        rows.append(row)
    batch = collate(rows, with_old_log_probs=True)
    with torch.no_grad():
        hidden = hidden_states(tiny, batch)
    learner = packed_log_probs(hidden, *head(tiny), batch, temperature or 1.0)
    assert batch.loss_mask.sum() == sum(len(r.ids) for r in results)
    torch.testing.assert_close(learner, batch.old_log_probs, rtol=1e-4, atol=1e-4)
    assert (batch.old_log_probs[batch.loss_mask] < 0).all()
    assert (batch.old_log_probs[~batch.loss_mask] == 0).all()


def test_rows_that_leave_the_batch_change_nothing(tiny, prompts, stop_id):
    together = run(tiny, prompts, stop_id=stop_id, temperature=0.0)
    alone = [run(tiny, [p], stop_id=stop_id, temperature=0.0)[0] for p in prompts]
    pairs = run(tiny, prompts, stop_id=stop_id, temperature=0.0, max_batch=2)
    for others in (alone, pairs):
        assert [r.ids for r in together] == [r.ids for r in others]
        for ours, theirs in zip(together, others, strict=True):
            assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-4)


def test_draws_are_reproducible_and_leave_the_global_state_alone(tiny, prompts, stop_id):
    state = torch.get_rng_state()
    first = run(tiny, prompts, stop_id=stop_id, seed=3)
    torch.manual_seed(99)
    assert run(tiny, prompts, stop_id=stop_id, seed=3) == first
    assert run(tiny, prompts, stop_id=stop_id, seed=4) != first
    torch.set_rng_state(state)
    run(tiny, prompts, stop_id=stop_id)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(tiny, temperature):
    prompt, count = [7, 9, 13], 6000
    drawn = run(tiny, [prompt] * count, stop_id=-1, temperature=temperature, limit=1)
    with torch.no_grad():
        logits = tiny(torch.tensor([prompt])).logits[0, -1].double()
    expected = count * (logits / temperature).softmax(-1)
    observed = torch.bincount(torch.tensor([r.ids[0] for r in drawn]), minlength=len(expected))
    common = expected > 20
    statistic = ((observed - expected) ** 2 / expected)[common].sum()
    degrees = int(common.sum()) - 1
    assert degrees >= 3
    assert statistic < degrees + 6 * (2 * degrees) ** 0.5
    rest = observed[~common].sum().item()
    assert rest == pytest.approx(expected[~common].sum().item(), abs=6 * count**0.5)


def test_the_model_is_left_in_the_mode_it_was_in(tiny, prompts, stop_id):
    for mode in (True, False):
        tiny.train(mode)
        run(tiny, prompts[:2], stop_id=stop_id, limit=2)
        assert tiny.training is mode
    tiny.eval()


def test_an_adapter_is_sampled_from(tiny, prompts, stop_id, tmp_path):
    def greedy(model):
        return [r.ids for r in run(model, prompts, stop_id=stop_id, temperature=0.0)]

    tiny.save_pretrained(tmp_path)
    adapted = load_model(str(tmp_path), lora_rank=2)
    plain = greedy(tiny)
    assert greedy(adapted) == plain
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    assert greedy(adapted) != plain


def test_local_policy(model, tokenizer):
    policy = LocalPolicy(model, tokenizer, max_new_tokens=5, seed=1)
    prompt = policy.chat.prompt([{"role": "user", "content": "Task: oak?"}])

    def generate():
        return policy.session().generate([prompt] * 4, range(4))

    first = generate()
    assert all(len(r.ids) <= 5 for r in first)
    assert generate() != first  # the generator went on
    policy.renew(1)
    assert generate() == first


@pytest.mark.parametrize("rows", [1, 8, 33])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_head_of_few_rows_is_the_head(rows, with_bias):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 512, dtype=torch.float64, generator=generator)
    weight = torch.randn(8200, 512, dtype=torch.float64, generator=generator)  # beyond the limit
    bias = torch.randn(8200, dtype=torch.float64, generator=generator) if with_bias else None
    found = few_row_linear(hidden, weight, bias)
    assert found.is_contiguous()
    torch.testing.assert_close(found, torch.nn.functional.linear(hidden, weight, bias))


@pytest.fixture
def adapted(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype=torch.float64, lora_rank=2).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def test_a_merged_adapter_computes_the_same_and_leaves_the_very_weights(adapted):
    ids = torch.arange(1, 13)[None]
    before = {name: (p.data_ptr(), p.clone()) for name, p in adapted.named_parameters()}
    with torch.no_grad():
        expected = adapted(ids).logits
        with merged_adapter(adapted):
            merged = [n for n, p in adapted.named_parameters() if p.data_ptr() != before[n][0]]
            assert merged
            assert all(name.endswith("base_layer.weight") for name in merged)
            torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-9, atol=1e-9)
        with pytest.raises(KeyboardInterrupt), merged_adapter(adapted):
            raise KeyboardInterrupt
        assert torch.equal(adapted(ids).logits, expected)
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(ids).logits, expected)
    for name, parameter in adapted.named_parameters():
        assert parameter.data_ptr() == before[name][0], name
        assert torch.equal(parameter, before[name][1]), name


def test_an_adapter_is_not_rounded_into_bfloat16(adapted):
    half = adapted.to(torch.bfloat16)
    before = {name: p.data_ptr() for name, p in half.named_parameters()}
    with merged_adapter(half):
        assert before == {name: p.data_ptr() for name, p in half.named_parameters()}


def test_sampling_merges_the_adapter_and_log_probs_are_those_without(adapted, prompts, monkeypatch):
    adapted.float()
    merges = []
    merge = lora.Linear.merge
    monkeypatch.setattr(
        lora.Linear, "merge", lambda layer, **kwargs: (merges.append(layer), merge(layer, **kwargs))
    )
    results = run(adapted, prompts, stop_id=-1)
    assert len(merges) == sum(isinstance(m, lora.Linear) for m in adapted.modules()) > 0
    for prompt, result in zip(prompts, results, strict=True):
        with torch.no_grad():
            logits = adapted(torch.tensor([prompt + result.ids])).logits[0, len(prompt) - 1 : -1]
        forced = logits.log_softmax(-1).gather(1, torch.tensor(result.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(result.log_probs), forced, rtol=1e-4, atol=1e-4)
