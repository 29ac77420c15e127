"""A small Qwen2 model and its tokenizer, for experiments that fit two CPU cores.

The tokenizer is built from the tasks' own text. Identifiers and digits are single symbols; what
stands between them (the fixed wording of prompts, calls and error messages) becomes one token a
phrase where it recurs, one a word otherwise, and bytes as the last resort, so any text is encoded
without loss. Segmentation is the Unigram model's (Kudo 2018, arXiv 1804.10959) with fixed scores:
fewest tokens win.

The model is pretrained on in-context copying (induction; Olsson et al. 2022, arXiv 2209.11895), a
stand-in for what every pretrained language model can do already. Without it none of the serial
repairs is learned.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

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
) -> PreTrainedTokenizerFast:
    """Builds a lossless tokenizer from rendered conversations.

    Args:
        texts: conversations rendered with ``CHAT_TEMPLATE``.
        symbols: strings that are always one token of their own (identifiers).
        min_count: how often a phrase or word must occur to become a token.
    """
    special = "|".join(re.escape(s) for s in SPECIAL_TOKENS)
    names = "|".join(re.escape(s) for s in sorted(symbols, key=len, reverse=True))
    boundary = re.compile(rf"{special}|\b(?:{names})\b|[0-9]")
    phrases: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for text in texts:
        for fragment in boundary.split(text):
            phrases[fragment] += 1
            words.update(re.findall(r"\s?[^\s\w]+|\s?\w+|\s+", fragment))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def spell(text: str) -> str:
        return "".join(piece for piece, _ in to_bytes.pre_tokenize_str(text))

    pieces: dict[str, float] = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()), -4.0)
    for counter, score in ((words, -2.0), (phrases, -1.0)):
        for text, count in sorted(counter.items()):
            if len(text) > 1 and count >= min_count:
                pieces[spell(text)] = score
    vocabulary = [*((token, -100.0) for token in SPECIAL_TOKENS), *pieces.items()]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[0-9]"), "isolated"), to_bytes]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens(
        [AddedToken(s, normalized=False, single_word=s.isalpha()) for s in symbols]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 96,
    num_layers: int = 3,
    num_heads: int = 4,
    seed: int = 0,
) -> Qwen2ForCausalLM:
    """A randomly initialised Qwen2 model that fits ``tokenizer``."""
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
    return Qwen2ForCausalLM(config)
