"""Shared by the trainer's tests: one environment, a few executed tasks, tiny models."""

import pytest
import torch
from runs import sft_config
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from regrpo.config import OptimConfig
from regrpo.copying import WORDS
from regrpo.data_engine.build import build, demonstrate
from regrpo.environment import LocalEnvironment
from regrpo.prompts import REFLECTION_OPENER
from regrpo.records import write_records
from regrpo.sft import run_sft
from regrpo.small_model import build_model, build_tokenizer, render_template
from regrpo.tasks import generate_tasks

LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@pytest.fixture(scope="session")
def environment():
    with LocalEnvironment() as environment:
        yield environment


@pytest.fixture(scope="session")
def tasks():
    return generate_tasks(96, seed=11, hops=(1, 4))


@pytest.fixture(scope="session")
def demonstrations(environment, tasks):
    return demonstrate(environment, tasks, seed=0)[0]


@pytest.fixture(scope="session")
def corpus(environment, tasks):
    return build(environment, tasks, seed=0)


@pytest.fixture(scope="session")
def texts(corpus):
    return [render_template(r["conversations"]) for r in [*corpus.success, *corpus.rot]]


@pytest.fixture(scope="session")
def tokenizer(texts):
    """The small tokenizer, as pretraining builds it."""
    return build_tokenizer(texts, [*WORDS, REFLECTION_OPENER, "Thought:"])


@pytest.fixture(scope="session")
def llama_tokenizer(texts):
    """A byte-level BPE, whose tokens straddle word boundaries, with Llama 3's chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer.train_from_iterator(
        texts[:40],
        trainers.BpeTrainer(
            vocab_size=600,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[AddedToken(s, normalized=False) for s in special],
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|eot_id|>",
        chat_template=LLAMA_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture
def model(tokenizer):
    """Two layers of width 32, randomly initialised."""
    return build_model(tokenizer, hidden_size=32, num_layers=2, num_heads=2, seed=0).eval()


@pytest.fixture(scope="session")
def base(tokenizer, corpus, tmp_path_factory):
    """A folder with a model that writes a turn now and then, `model`, and data, `rot.jsonl`."""
    folder = tmp_path_factory.mktemp("base")
    model = build_model(tokenizer, hidden_size=32, num_layers=2, num_heads=2, seed=0)
    model.save_pretrained(folder / "random")
    tokenizer.save_pretrained(folder / "random")
    write_records(folder / "rot.jsonl", corpus.rot[:24])
    optim = OptimConfig(lr=1e-2)
    config = sft_config(folder, folder, model=str(folder / "random"), steps=40, optim=optim)
    assert run_sft(config) == str(folder / "model")
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models are quicker without threads, and other tests may share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
