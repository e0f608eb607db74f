"""The small world of the tests: a tokenizer and a model made once, and real material where it is at hand."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import BROWSER

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; no test needs the network
if not torch.cuda.is_available():  # triton reads it once, when it is first imported, and transformers imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parent.parent
os.environ["TDPO_CACHE"] = tempfile.mkdtemp(prefix="tdpo-cache-")  # the tests leave the user's own cache alone
SHARED = Path(os.environ.get("TDPO_SHARED", REPOSITORY.parent / "shared"))
END = "<|endoftext|>"
torch.set_num_threads(1)  # the worlds are tiny: threads would spend their time waiting for each other

NOUNS = ["river", "garden", "window", "teacher", "engine", "letter", "forest", "market", "violin", "harbour"]


def sentences() -> list[str]:
    """A few hundred short English texts."""
    verbs = ["sees", "likes", "paints", "remembers", "repairs"]
    return [f"The {a} {v} the {b}." for a in NOUNS for v in verbs for b in NOUNS if a != b]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with 400 tokens, ending in ``<|endoftext|>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sentences(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, model_max_length=128)


def make_model(vocab_size: int, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama of width 32 with two layers and a tied head."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


def preference_rows(count: int = 24) -> list[dict[str, str]]:
    """Rows a model can learn to rank: the chosen response names a river, the rejected one an engine."""
    return [
        {
            "prompt": f"The {NOUNS[i % 10]} and the {NOUNS[(i * 3 + 1) % 10]} were near",
            "chosen": f" the river, the {NOUNS[(i + 2) % 10]}.",
            "rejected": f" an engine, no {NOUNS[(i + 5) % 10]} at all.",
        }
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: list) -> Path:
    """Writes rows one a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return make_model(len(tokenizer))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with model and tokenizer as ``save_pretrained`` leaves it."""
    folder = tmp_path_factory.mktemp("world") / "model"
    make_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", preference_rows())


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and models beside the repository; what needs them is skipped without."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"needs the real data and models, looked for in {SHARED} (TDPO_SHARED names another folder)")
    return SHARED


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless browser of the system's; what needs it is skipped without."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, which `make install` installs")
    if not BROWSER:
        pytest.skip("needs Chromium or Chrome, for example Debian's package chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def all_threads() -> Iterator[None]:
    """For the few tests whose models are large enough to share their work."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)
