"""Rewards: each kind against the same computed by hand, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from tdpo import UserError
from tdpo.evaluate.rewards import RewardOptions, check_reward, label_index, load_reward

ROWS = [
    {"prompt": "The river", "response": " sees the garden."},
    {"prompt": "The engine and the old violin", "response": " no."},
    {"prompt": "A", "response": " letter to the teacher, and the market by the harbour."},
]
CHAT = [{"role": "user", "content": "The river?"}]
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def reward(name: str, tokenizer=None, **options):
    return load_reward(RewardOptions(reward=str(name), **options), tokenizer)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A user's module in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, body: str) -> str:
        (tmp_path / f"{name}.py").write_text(f"import torch, numpy\nCALLS = []\ndef f(texts):\n    {body}\n")
        return f"{name}:f"

    return write


def test_a_function_gets_texts_in_batches(module):
    name = module("r_batches", "CALLS.append(list(texts)); return [len(t) for t in texts]")
    found = reward(name, reward_batch_size=2)(ROWS)
    assert found == [float(len(row["prompt"] + row["response"])) for row in ROWS]
    import r_batches

    assert [len(call) for call in r_batches.CALLS] == [2, 1]
    assert r_batches.CALLS[0][0] == "The river sees the garden."


@pytest.mark.parametrize("body", ["torch.tensor([1.0, 2.0, 3.0])", "numpy.array([1, 2, 3])", "(1, 2.0, 3)"])
def test_tensors_arrays_and_tuples_are_numbers_too(module, body):
    assert reward(module(f"r_kinds_{len(body)}", f"return {body}"))(ROWS) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "expected 3 numbers for 3 texts, got 1 values"),
        ("return 5", "expected 3 numbers for 3 texts, got 5"),
        ("return [1.0, float('nan'), 2.0]", "expected a finite number for every text, got nan"),
        ("return ['a', 'b', 'c']", "expected a finite number for every text, got 'a'"),
        ("raise KeyError('no such word')", "it raised KeyError: 'no such word'"),
    ],
)
def test_what_a_function_may_not_give(module, body, message):
    with pytest.raises(UserError, match=message):
        reward(module(f"r_wrong_{abs(hash(body))}", body))(ROWS)


def test_a_reward_that_depends_on_the_batch_is_refused_before_a_run(module):
    check_reward(reward(module("r_good", "return [len(t) for t in texts]")), ROWS)
    ranked = reward(module("r_ranked", "return [sorted(texts).index(t) for t in texts]"))
    with pytest.raises(UserError, match=r"scores 2 beside others and 0 alone"):
        check_reward(ranked, ROWS)


def test_chats_are_rendered_by_the_policys_template(module):
    tokenizer = make_tokenizer()
    row = {"prompt": CHAT, "response": "Yes."}
    name = module("r_chat", "CALLS.extend(texts); return [0.0 for _ in texts]")
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        reward(name, tokenizer)([row])
    tokenizer.chat_template = TEMPLATE
    reward(name, tokenizer)([row, ROWS[0]])
    import r_chat

    assert r_chat.CALLS == ["[user]The river?[assistant]Yes.", "The river sees the garden."]


def classifier(folder, labels, template=None, positions=128):
    """A classifier with random weights and a tokenizer without a pad token."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=positions, initializer_range=0.5, pad_token_id=0,
        id2label=dict(enumerate(labels)), label2id={label: index for index, label in enumerate(labels)},
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def logits_by_hand(model, tokenizer, texts):
    with torch.no_grad():
        return [model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0] for text in texts]


def test_a_reward_model_gives_its_one_output(tmp_path):
    model, tokenizer = classifier(tmp_path, ["score"])
    expected = [x.item() for x in logits_by_hand(model, tokenizer, [r["prompt"] + r["response"] for r in ROWS])]
    assert reward(tmp_path)(ROWS) == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 3
    with pytest.raises(UserError, match="has one output: leave --reward_label and --reward_output out"):
        reward(tmp_path, reward_output="logit")


def test_a_classifier_gives_probability_or_log_odds_of_a_label(tmp_path):
    model, tokenizer = classifier(tmp_path, ["NEGATIVE", "NEUTRAL", "POSITIVE"])
    logits = torch.stack(logits_by_hand(model, tokenizer, [r["prompt"] + r["response"] for r in ROWS]))
    p = logits.softmax(-1)
    assert reward(tmp_path)(ROWS) == pytest.approx(p[:, 2].tolist(), abs=1e-5)
    assert reward(tmp_path, reward_label="neutral")(ROWS) == pytest.approx(p[:, 1].tolist(), abs=1e-5)
    odds = (p[:, 2] / (1 - p[:, 2])).log().tolist()
    assert reward(tmp_path, reward_output="logit")(ROWS) == pytest.approx(odds, abs=1e-4)
    with pytest.raises(UserError, match="has no label good; there are NEGATIVE, NEUTRAL, POSITIVE"):
        reward(tmp_path, reward_label="good")


def test_a_models_own_template_renders_chats_and_texts(tmp_path):
    model, tokenizer = classifier(tmp_path, ["score"], TEMPLATE)
    texts = ["[user]The river?[assistant]Yes.", "[user]The river[assistant] sees the garden."]
    expected = [x.item() for x in logits_by_hand(model, tokenizer, texts)]
    found = reward(tmp_path)([{"prompt": CHAT, "response": "Yes."}, ROWS[0]])
    assert found == pytest.approx(expected, abs=1e-5)


def test_long_texts_keep_their_end(tmp_path):
    model, tokenizer = classifier(tmp_path, ["score"], positions=8)
    ids = tokenizer(ROWS[2]["prompt"] + ROWS[2]["response"])["input_ids"]
    assert len(ids) > 8
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids[-8:]])).logits.item()
    assert reward(tmp_path)([ROWS[2]]) == [pytest.approx(expected, abs=1e-5)]


def test_a_pipeline_gives_what_scikit_learn_gives(tmp_path):
    pytest.importorskip("sklearn")
    skops = pytest.importorskip("skops.io")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline

    texts, labels = ["good river", "bad engine", "good garden", "bad no violin"] * 5, [1, 0, 1, 0] * 5
    both = [row["prompt"] + row["response"] for row in ROWS]
    pipeline = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts, labels)
    skops.dump(pipeline, tmp_path / "c.skops")
    p = pipeline.predict_proba(both)[:, 1]
    assert reward(tmp_path / "c.skops")(ROWS) == pytest.approx(p.tolist())
    found = reward(tmp_path / "c.skops", reward_output="logit")(ROWS)
    assert found == pytest.approx([math.log(x / (1 - x)) for x in p])
    skops.dump(make_pipeline(TfidfVectorizer(), Ridge()).fit(texts, labels), tmp_path / "r.skops")
    assert reward(tmp_path / "r.skops")(ROWS) == pytest.approx(skops.load(tmp_path / "r.skops").predict(both).tolist())


def shout(text: str) -> str:
    return text.upper()


def test_a_pipeline_that_could_run_code_is_refused(tmp_path):
    pytest.importorskip("sklearn")
    skops = pytest.importorskip("skops.io")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline

    pipeline = make_pipeline(TfidfVectorizer(preprocessor=shout), Ridge()).fit(["the river", "an engine"], [0, 1])
    skops.dump(pipeline, tmp_path / "r.skops")
    with pytest.raises(
        UserError, match=r"could run code: test_rewards\.shout\. If you trust it: --reward_trusted test_rewards"
    ):
        reward(tmp_path / "r.skops")
    trusted = reward(tmp_path / "r.skops", reward_trusted=["test_rewards.shout"])
    assert trusted(ROWS) == pytest.approx(pipeline.predict([r["prompt"] + r["response"] for r in ROWS]).tolist())


def test_a_column_is_read_and_missing_ones_are_named():
    assert reward("column:score")([{**ROWS[0], "score": 2}, {**ROWS[1], "score": -0.5}]) == [2.0, -0.5]
    with pytest.raises(UserError, match="row 1: 'score' is missing; there are prompt, response"):
        reward("column:score")(ROWS)
    with pytest.raises(UserError, match="row 1: 'score' holds 'x'"):
        reward("column:score")([{**ROWS[0], "score": "x"}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": "r.pkl"}, "a pickle can run any code when it is loaded; save the pipeline with skops.io.dump"),
        ({"reward": "column:x", "reward_label": "a"}, "--reward_label has no effect with --reward column:x"),
        ({"reward": "m:f", "reward_output": "logit"}, "--reward_output has no effect with --reward m:f"),
        ({"reward": "a-model", "reward_trusted": ["t"]}, "--reward_trusted has no effect with --reward a-model"),
        ({"reward": "m:f", "reward_batch_size": 0}, "--reward_batch_size must be at least 1"),
        ({"reward": "m:f", "reward_output": "loud"}, "--reward_output loud: there are probability, logit"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        RewardOptions(**options)


@pytest.mark.parametrize(
    ("name", "message"),
    [("no_such_module:f", "importing no_such_module failed"), ("math:nothing", "has no nothing"),
     ("none/such.skops", "no such file"), ("none-such-folder", "not a sequence-classification model")],
)  # fmt: skip
def test_what_cannot_be_loaded_is_named(name, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        reward(name)


def test_labels_by_hand():
    assert label_index(["neg", "pos"], None, "m") == 1
    assert label_index(["LABEL_0", "LABEL_1"], None, "m") == 1
    with pytest.raises(UserError, match="has no label named positive: name one with --reward_label; there are a, b"):
        label_index(["a", "b"], None, "m")
