"""The small tokenizer loses nothing, and what it saves is what transformers loads."""

import unicodedata

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from regrpo.modeling import attention
from regrpo.names import NAMES
from regrpo.prompts import REFLECTION_OPENER
from regrpo.segments import render
from regrpo.small_model import SPECIAL_TOKENS, build_model, render_template


@settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_the_tasks_own_text_comes_back_and_is_short(tokenizer, texts):
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert len(ids) < len(text) / 4


def test_identifiers_and_markers_are_one_token(tokenizer):
    for symbol in (*NAMES, *SPECIAL_TOKENS, REFLECTION_OPENER, "Thought:"):
        assert len(tokenizer(symbol, add_special_tokens=False)["input_ids"]) == 1, symbol
    # Wherever they stand, so that copying one is copying one symbol.
    oak = tokenizer("oak", add_special_tokens=False)["input_ids"][0]
    for text in ('read_file("oak.txt")', "elm -> oak", "oak 12", "\noak"):
        assert oak in tokenizer(text, add_special_tokens=False)["input_ids"], text
    assert oak not in tokenizer("oaken soak", add_special_tokens=False)["input_ids"]


def test_the_template_is_what_render_template_says(tokenizer, corpus):
    for record in corpus.rot[:5]:
        assert render(tokenizer, record["conversations"]) == render_template(
            record["conversations"]
        )


def test_saved_and_loaded(tokenizer, model, texts, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.eos_token_id == tokenizer.eos_token_id
    for text in texts[:20]:
        ours = tokenizer(text, return_offsets_mapping=True)
        theirs = again(text, return_offsets_mapping=True)
        assert dict(ours) == dict(theirs)
    ids = torch.tensor([again(texts[0])["input_ids"]])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert loaded.config.vocab_size == len(tokenizer)


def test_heads_of_the_first_layer_look_back_whatever_the_tokens_are(tokenizer):
    model = build_model(tokenizer, seed=1).eval()
    ids = torch.randint(len(tokenizer), (4, 80), generator=torch.Generator().manual_seed(0))
    with attention(model, "eager"), torch.no_grad():
        first, second = model(ids, output_attentions=True).attentions

    def by_distance(weights):
        return torch.tensor(
            [weights[:, range(40, 80), range(40 - d, 80 - d)].mean() for d in range(40)]
        )

    for head in range(first.shape[1]):
        profile = by_distance(first[:, head])
        assert profile.argmax() == head + 1
        assert profile[head + 1] > 0.25
        assert profile[8:].max() < 0.05
    assert by_distance(second.mean(1)).max() < 0.05
