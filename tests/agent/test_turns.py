"""Keys and values kept from turn to turn, through tool calls: against computing all of it again."""

import random

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from regrpo import partial_attention, sampling
from regrpo.cached_rows import CachedRows
from regrpo.decoding import Continuations
from regrpo.modeling import load_model
from regrpo.rollout import run as roll
from regrpo.rollout import task_start
from regrpo.sampling import LocalPolicy, LocalSession

VOCAB = 24
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOW = {"sliding_window": 5, "head_dim": 8}  # shorter than most prompts
MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, **WINDOW)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SIZES,
            **WINDOW,
            layer_types=LAYERS,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **WINDOW, layer_types=LAYERS)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
    ),
}
WAYS = {
    "ours": Continuations,
    "transformers": lambda model, prompts: CachedRows(model, prompts, 0),
}


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    return build(request.param)


@pytest.fixture(params=list(WAYS))
def way(request, monkeypatch):
    """Both ways of keeping keys, for every model."""
    if request.param == "transformers":
        monkeypatch.setattr(sampling, "decodes", lambda model: False)
    return WAYS[request.param]


def tokens(rng, count):
    return [rng.randrange(1, VOCAB) for _ in range(count)]


def converse(model, *, turns=4, seed=0, temperature=0.0, limit=12, stop_id=3, **kwargs):
    """Trajectories of three states, which end after different turns: all tokens and samples."""
    session = LocalSession(
        model,
        stop_ids=(stop_id,),
        pad_id=0,
        temperature=temperature,
        max_new_tokens=limit,
        generator=torch.Generator().manual_seed(seed),
        **kwargs,
    )
    rng = random.Random(seed)
    states = [tokens(rng, n) for n in (9, 2, 23)]
    rows = [list(states[i % 3]) for i in range(11)]
    last = [rng.randrange(1, turns + 1) for _ in rows]
    last[4], last[7] = turns, turns
    said = []
    for turn in range(turns):
        going = [i for i in range(len(rows)) if last[i] > turn]
        rng.shuffle(going)  # the order of a call means nothing
        samples = session.generate([rows[i] for i in going], going)
        said += zip(going, samples, strict=True)
        observed = {i: tokens(rng, rng.choice([1, 2, 3, 5, 17])) for i in range(len(rows))}
        for i, sample in zip(going, samples, strict=True):
            rows[i] = [*rows[i], *sample.ids, *observed[i]]
    return rows, said


def assert_same(ours, theirs, tolerance):
    assert ours[0] == theirs[0]
    for (number, sample), (other, expected) in zip(ours[1], theirs[1], strict=True):
        assert number == other
        assert sample.ids == expected.ids
        assert sample.log_probs == pytest.approx(expected.log_probs, abs=tolerance)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_sampled_does_not_depend_on_what_is_kept(model, way, temperature):
    kept = converse(model, temperature=temperature)
    again = converse(model, temperature=temperature, cache_bytes=0)
    assert_same(kept, again, 2e-4)
    ended = [sample.ids[-1] == 3 for _, sample in kept[1]]
    assert any(ended)
    assert not all(ended)


def follow(model, way, tolerance):
    """Compares logits of rows that stop and go on with a forward pass of all tokens."""
    rng = random.Random(1)
    prompts = [tokens(rng, n) for n in (9, 2, 23)]
    rows = [list(prompts[i]) for i in (0, 0, 1, 2, 2, 2)]
    kept = way(model, rows)

    def check(numbers):
        for logits, number in zip(kept.logits, numbers, strict=True):
            expected = model(torch.tensor([rows[number]])).logits[0, -1]
            torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)

    def append(numbers, count):
        for _ in range(count):
            new = tokens(rng, len(numbers))
            for number, token in zip(numbers, new, strict=True):
                rows[number].append(token)
            kept.append(torch.tensor(new))
        check(numbers)

    check(range(6))
    append(range(6), 3)
    kept.keep(torch.tensor([0, 2, 4, 5]))
    append([0, 2, 4, 5], 2)
    kept.keep(torch.tensor([1]))  # two prompts rest
    append([2], 40)  # beyond the room of the branches
    # Rows 0 and 5 are cut: they had finished a token before they left.
    sizes = {n: len(rows[n]) - (n in (0, 5)) for n in (5, 1, 0, 2)}
    for number, size in sizes.items():
        rows[number] = rows[number][:size] + tokens(rng, rng.randrange(1, 9))
    order = list(sizes)
    kept.resume(order, [rows[n] for n in order], list(sizes.values()))
    check(order)
    append(order, 2)
    kept.keep(torch.tensor([3, 0]))
    append([2, 5], 2)
    for number in (1, 2):
        rows[number] += tokens(rng, 4 - number)
    kept.resume([1, 2], [rows[1], rows[2]], [len(rows[1]) - 3, len(rows[2]) - 2])
    check([1, 2])


@torch.no_grad()
def test_rounding_is_all_that_differs(model, way):
    # The attention that transformers softcaps has its softmax in float32, whatever the model is in.
    if model.config.to_dict().get("attn_logit_softcapping") is not None:
        follow(model, way, 1e-4)
        return
    try:
        follow(model.double(), way, 1e-9)
    finally:
        model.float()


@torch.no_grad()
def test_half_precision(way):
    follow(build("qwen2").bfloat16(), way, 0.3)


@pytest.mark.parametrize("limit", [1, 2])
def test_turns_of_a_token(model, way, limit):
    assert_same(converse(model, limit=limit), converse(model, limit=limit, cache_bytes=0), 2e-4)


def computed(model, **kwargs):
    """How many columns of tokens each forward pass of a conversation took."""
    seen = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _module, given, _out: seen.append(tuple(given[0].shape))
    )
    converse(model, **kwargs)
    handle.remove()
    return seen


def test_later_turns_compute_what_is_new(way):
    model = build("qwen2")
    many = [shape for shape in computed(model) if shape[1] > 1]
    # The three states, then observations of 17 at most and the last sampled token.
    assert many[0] == (3, 23)
    assert len(many) == 4
    assert all(length <= 18 for _, length in many[1:])
    again = [shape for shape in computed(model, cache_bytes=0) if shape[1] > 1]
    assert len(again) == 4
    assert all(length > 30 for _, length in again[1:])


def test_batches_beyond_the_limit_of_memory_compute_again(way):
    model = build("qwen2")
    expected = converse(model, max_batch=4, temperature=1.0)
    kept = computed(model, max_batch=4, temperature=1.0)
    seen = []
    # Room for the first batch and no more: 4 rows, 3 layers of 2 keys and values of 2 x 8 floats.
    half = {"max_batch": 4, "temperature": 1.0, "cache_bytes": 4 * 60 * 3 * 2 * 2 * 8 * 4}
    seen = computed(model, **half)
    assert sum(a * b for a, b in kept) < sum(a * b for a, b in seen)
    nothing = computed(model, max_batch=4, temperature=1.0, cache_bytes=0)
    assert sum(a * b for a, b in seen) < sum(a * b for a, b in nothing)
    assert_same(converse(model, **half), expected, 2e-4)


@pytest.mark.parametrize("name", ["qwen2", "mistral", "gemma2"])
def test_long_observations_are_attended_in_parts(name, monkeypatch):
    model = build(name)
    whole = converse(model)
    monkeypatch.setattr(partial_attention, "SCORES", 3000)
    assert_same(converse(model), whole, 2e-4)


def test_a_prompt_that_is_not_the_former_one_is_refused():
    session = LocalSession(
        build("qwen2"), stop_ids=(3,), pad_id=0, temperature=0.0, max_new_tokens=4
    )
    (sample,) = session.generate([[5, 6]], [0])
    with pytest.raises(ValueError, match="trajectory 0: expected its former prompt and turn"):
        session.generate([[5, 7, *sample.ids, 8]], [0])
    with pytest.raises(ValueError, match="with tokens behind them"):
        session.generate([[5, 6, *sample.ids]], [0])


@pytest.fixture
def base_policy(base, tokenizer):
    model = load_model(str(base / "model")).eval()
    return lambda cache_gib: LocalPolicy(
        model, tokenizer, max_new_tokens=24, seed=3, cache_gib=cache_gib
    )


def test_episodes_are_the_same(base_policy, demonstrations, environment):
    starts = [task_start(demo.task) for demo in demonstrations[:6] for _ in range(3)]
    results = []
    for cache_gib in (8.0, 0.0):
        policy = base_policy(cache_gib)
        done = roll(policy, environment, starts, reflect=True, whole=True)
        results.append([(t.tokens.input_ids, t.answer, t.end) for t in done])
        assert any(len(t.turns) > 1 for t in done)
    assert results[0] == results[1]
