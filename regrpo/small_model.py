"""A small Qwen2 model and its tokenizer, for experiments that fit two CPU cores.

The tokenizer is built from the tasks' own text. Identifiers and recurring numbers are single
symbols; what stands between them (the fixed wording of prompts, calls and error messages) becomes
one token a phrase where it recurs, one a word otherwise, and bytes as the last resort, so any text
is encoded without loss (up to Unicode normalisation). The longest match wins. It is a Qwen2
tokenizer without merges, whose phrases are added tokens, because that is what transformers loads
beside a Qwen2 model.

The model is pretrained on in-context copying (induction; Olsson et al. 2022, arXiv 2209.11895), a
stand-in for what every pretrained language model can do already. Without it none of the serial
repairs is learned. Induction takes heads that look one or a few tokens back, and finding those is
most of the work from random weights. Here they are there from the start: in the first layer, the
biases of queries and keys make head ``h`` look ``h + 1`` tokens back. They train like the rest.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from tokenizers import AddedToken, pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

PAD, END = "<|pad|>", "<|end|>"
SPECIAL_TOKENS = (PAD, END, "<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def render_template(messages: Sequence[Mapping[str, str]]) -> str:
    """What ``CHAT_TEMPLATE`` makes of a conversation, without a tokenizer."""
    return "".join(f"<|{m['role']}|>{m['content']}{END}" for m in messages)


def build_tokenizer(
    texts: Iterable[str], symbols: Sequence[str], *, min_count: int = 4
) -> Qwen2Tokenizer:
    """Builds a lossless tokenizer from rendered conversations.

    Args:
        texts: conversations rendered with ``CHAT_TEMPLATE``.
        symbols: strings that are always one token of their own (identifiers).
        min_count: how often a phrase or word must occur to become a token.
    """
    whole = (rf"\b{s}\b" if s.isalpha() else re.escape(s) for s in symbols)
    boundary = re.compile("|".join([*map(re.escape, SPECIAL_TOKENS), *whole, "[0-9]+"]))
    numbers: Counter[str] = Counter()
    phrases: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for text in texts:
        numbers.update(re.findall(r"\b[0-9]+\b", text))
        for fragment in boundary.split(text):
            phrases[fragment] += 1
            words.update(re.findall(r"\s?[^\s\w]+|\s?\w+|\s+", fragment))
    recurring = sorted(
        text for text, count in (phrases + words).items() if len(text) > 1 and count >= min_count
    )
    known = sorted(n for n, count in numbers.items() if len(n) > 1 and count >= min_count)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={character: index for index, character in enumerate(alphabet)},
        merges=[],
        unk_token=PAD,  # never produced: every byte is in the vocabulary
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[t for t in SPECIAL_TOKENS if t not in (PAD, END)],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.add_tokens(
        [AddedToken(s, normalized=False, single_word=s.isalnum()) for s in [*symbols, *known]]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in recurring])
    return tokenizer


def build_model(
    tokenizer: Qwen2Tokenizer,
    *,
    hidden_size: int = 96,
    num_layers: int = 2,
    num_heads: int = 3,
    seed: int = 0,
) -> Qwen2ForCausalLM:
    """A Qwen2 model with fresh weights that fits ``tokenizer``; its first layer looks back."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        # The usual 0.02 is for widths of thousands; at 96 attention would start out blind.
        initializer_range=0.6 * hidden_size**-0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    _look_back(model, sharpness=3.0)
    return model


def _look_back(model: Qwen2ForCausalLM, sharpness: float) -> None:
    """Points head ``h`` of the first layer ``h + 1`` tokens back, whatever the tokens are.

    Rotary positions (Su et al. 2021, arXiv 2104.09864) turn channel pair ``f`` of a query and a key
    that are ``d`` apart by ``d * rate[f]`` against each other. With constant query and key, turned
    by ``back * rate[f]`` beforehand, the score is ``sharpness * sum_f cos((d - back) * rate[f])``:
    greatest at ``d = back``. Slow pairs cannot tell neighbours apart and stay free for content.
    """
    attention = model.model.layers[0].self_attn
    half = attention.head_dim // 2
    rate = model.model.rotary_emb.inv_freq
    radius = math.sqrt(sharpness * math.sqrt(attention.head_dim)) * (rate > 0.08)
    queries = attention.q_proj.bias.data.view(-1, 2, half)
    keys = attention.k_proj.bias.data.view(-1, 2, half)
    for head in range(len(queries)):
        turn = (head + 1) * rate
        queries[head] = radius * torch.stack([turn.cos(), -turn.sin()])
        keys[head, 0] = radius
