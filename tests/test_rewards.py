"""Rewards: each kind against the same computed by hand, and what is refused."""

from __future__ import annotations

import math
import re
import sys

import pytest
import torch
from conftest import END, make_model, make_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from tdpo import UserError
from tdpo.commands import eval as eval_command
from tdpo.commands import frontier as frontier_command
from tdpo.evaluate.rewards import RewardOptions, check_reward, class_score, label_index, load_reward

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


@pytest.mark.parametrize(
    "body",
    [
        "torch.tensor([1.0, 2.0, 3.0], requires_grad=True)", "numpy.array([1, 2, 3])", "(1, 2.0, 3)",
        "[numpy.float32(n) for n in (1, 2, 3)]", "[torch.tensor(n) for n in (1.0, 2.0, 3.0)]",
    ],
)  # fmt: skip
def test_tensors_arrays_and_tuples_are_numbers_too(module, body):
    found = reward(module(f"r_kinds_{len(body)}", f"return {body}"))(ROWS)
    assert found == [1.0, 2.0, 3.0]
    assert {type(value) for value in found} == {float}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "expected 3 numbers for 3 texts, got 1 values"),
        ("return 5", "expected 3 numbers for 3 texts, got 5"),
        ("return [1.0, float('nan'), 2.0]", "expected a finite number for every text, got nan for row 2"),
        ("return ['a', 'b', 'c']", "expected a finite number for every text, got 'a' for row 1"),
        ("return torch.ones(3, 1)", r"expected a finite number for every text, got \[1.0\] for row 1"),
        ("raise KeyError('no such word')", "it raised KeyError: 'no such word'"),
    ],
)
def test_what_a_function_may_not_give(module, body, message):
    with pytest.raises(UserError, match=message):
        reward(module(f"r_wrong_{abs(hash(body))}", body))(ROWS)


def test_a_later_batch_names_the_row_by_its_number_among_all(module):
    name = module("r_later", "return [float('inf') if 'A' in t else 1.0 for t in texts]")
    with pytest.raises(UserError, match="got inf for row 3"):
        reward(name, reward_batch_size=1)(ROWS)


def test_an_error_of_the_users_function_is_chained(module):
    with pytest.raises(UserError, match=r"--reward r_chained:f: it raised ZeroDivisionError: ") as error:
        reward(module("r_chained", "return [1 / 0]"))(ROWS)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_a_reward_that_depends_on_the_batch_is_refused_before_a_run(module):
    check_reward(reward(module("r_good", "return [len(t) for t in texts]")), ROWS)
    check_reward(reward(module("r_zero", "return [0.0 for t in texts]")), ROWS)
    check_reward(reward(module("r_none", "return [0.0 for t in texts]")), [])
    ranked = reward(module("r_ranked", "return [1e-6 * sorted(texts).index(t) for t in texts]"))
    with pytest.raises(UserError, match=r"row 1 scores 2e-06 beside others and 0 alone"):
        check_reward(ranked, ROWS)
    assert reward("r_ranked:f", reward_batch_size=1)(ROWS) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("factor", "passes"), [(0.9e-4, True), (1.1e-4, False)])
def test_a_reward_may_depend_on_the_batch_by_a_ten_thousandth_of_the_largest(module, factor, passes):
    body = f"return [10.0 * len(t) + (len(texts) > 1) * 10.0 * {max(len(r['prompt'] + r['response']) for r in ROWS)} * "
    close = reward(module(f"r_close_{passes}", f"{body}{factor} for t in texts]"))
    if passes:
        return check_reward(close, ROWS)
    with pytest.raises(UserError, match="beside others"):
        check_reward(close, ROWS)


def test_a_few_rows_are_checked(module):
    name = module("r_few", "CALLS.append(len(texts)); return [0.0 for _ in texts]")
    check_reward(reward(name), ROWS * 10)
    import r_few

    assert r_few.CALLS == [8] + [1] * 8


def test_chats_are_rendered_by_the_policys_template(module):
    tokenizer = make_tokenizer()
    row = {"prompt": CHAT, "response": "Yes."}
    name = module("r_chat", "CALLS.extend(texts); return [0.0 for _ in texts]")
    with pytest.raises(UserError, match="row 1: the prompt is a chat, and the tokenizer has no chat template; --chat"):
        reward(name, tokenizer)([row])
    with pytest.raises(UserError, match="row 2: the prompt is a chat, and no tokenizer is given"):
        reward(name)([ROWS[0], row])
    tokenizer.chat_template = TEMPLATE
    reward(name, tokenizer)([row, ROWS[0]])
    import r_chat

    assert r_chat.CALLS == ["[user]The river?[assistant]Yes.", "The river sees the garden."]
    assert row["prompt"] == [{"role": "user", "content": "The river?"}]
    tokenizer.chat_template = "{{ raise_exception('no questions') }}"
    with pytest.raises(UserError, match="row 2: the chat template refuses it: no questions"):
        reward(name, tokenizer)([ROWS[0], row])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + 1 }}{% endfor %}"
    with pytest.raises(UserError, match="row 1: the chat template refuses it: can only concatenate str"):
        reward(name, tokenizer)([row])


def test_prompt_and_response_of_every_row_are_needed(module):
    found = reward(module("r_rows", "return [0.0 for _ in texts]"))
    for row, message in [
        ({"prompt": "a", "response": CHAT}, "the response must be text, got [{'role': 'user'"),
        ({"prompt": "a"}, "the response must be text, got None"),
        ({"response": "a"}, "the prompt must be text or a list of messages, got None"),
    ]:
        with pytest.raises(UserError, match=re.escape(f"row 2: {message}")):
            found([ROWS[0], row])


def classifier(folder, labels, template=None, positions=128, pad=0, **config):
    """A classifier with random weights and a tokenizer without a pad token."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=positions, initializer_range=0.5, pad_token_id=pad, **config,
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
        reward(tmp_path, reward_label="score", reward_output="logit")


@pytest.mark.parametrize("pad", [None, -1])
def test_a_model_without_a_pad_token_is_read_at_the_last_token_of_every_text(tmp_path, pad):
    # The template ends in the end token, which is the tokenizer's first choice to pad with.
    model, tokenizer = classifier(tmp_path, ["score"], TEMPLATE + END, pad=pad)
    texts = [f"[user]{row['prompt']}[assistant]{row['response']}{END}" for row in ROWS]
    model.config.pad_token_id = None
    expected = [x.item() for x in logits_by_hand(model, tokenizer, texts)]
    found = reward(tmp_path)
    assert found(ROWS) == pytest.approx(expected, abs=1e-5)
    assert found.model.config.pad_token_id == pad
    check_reward(found, ROWS)


def test_a_model_in_bfloat16_may_round_and_may_not_depend_on_the_batch(tmp_path):
    classifier(tmp_path, ["score"])[0].bfloat16().save_pretrained(tmp_path)
    found = reward(tmp_path)
    assert found.model.dtype is torch.bfloat16
    assert found.tolerance([0.5, -3.0]) == 3 * 16 * 2**-7
    check_reward(found, ROWS)
    forward = found.logits
    found.logits = lambda texts: forward(texts) + len(texts)
    with pytest.raises(UserError, match=r"row 1 scores .* beside others"):
        check_reward(found, ROWS)


def test_a_language_model_and_an_adapter_are_refused(tmp_path):
    # Its head would be drawn at random, and be another at each loading.
    make_model(400).save_pretrained(tmp_path / "lm")
    make_tokenizer().save_pretrained(tmp_path / "lm")
    with pytest.raises(UserError, match=r"lacks weights of LlamaForSequenceClassification, .* random: score\.weight"):
        reward(tmp_path / "lm")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"base_model_name_or_path": "a-base"}')
    with pytest.raises(UserError, match="is an adapter on 'a-base': save the two as one model"):
        reward(tmp_path / "lora")


def test_a_classifier_gives_probability_or_log_odds_of_a_label(tmp_path):
    model, tokenizer = classifier(tmp_path, ["NEGATIVE", "NEUTRAL", "POSITIVE"])
    logits = torch.stack(logits_by_hand(model, tokenizer, [r["prompt"] + r["response"] for r in ROWS]))
    p = logits.double().softmax(-1)
    for label in ("POSITIVE", "positive", "2"):
        assert reward(tmp_path, reward_label=label)(ROWS) == pytest.approx(p[:, 2].tolist(), abs=1e-5)
    assert reward(tmp_path, reward_label="neutral")(ROWS) == pytest.approx(p[:, 1].tolist(), abs=1e-5)
    odds = (p[:, 2] / (1 - p[:, 2])).log().tolist()
    assert reward(tmp_path, reward_label="2", reward_output="logit")(ROWS) == pytest.approx(odds, abs=1e-4)
    with pytest.raises(UserError, match="has no label good; there are NEGATIVE, NEUTRAL, POSITIVE"):
        reward(tmp_path, reward_label="good")
    with pytest.raises(UserError, match="has 3 labels: name one with --reward_label; there are NEGATIVE, NEUTRAL"):
        reward(tmp_path)


def test_two_labels_give_the_difference_of_their_logits_however_sure_the_model_is(tmp_path):
    model, tokenizer = classifier(tmp_path, ["LABEL_0", "LABEL_1"])
    with torch.no_grad():
        model.score.weight.mul_(100)
    model.save_pretrained(tmp_path)
    logits = torch.stack(logits_by_hand(model, tokenizer, [r["prompt"] + r["response"] for r in ROWS]))
    margins = (logits[:, 1] - logits[:, 0]).tolist()
    assert max(map(abs, margins)) > 40  # 1 - p rounds to 0 even in float64
    assert reward(tmp_path, reward_output="logit")(ROWS) == pytest.approx(margins, rel=1e-5)
    assert reward(tmp_path)(ROWS) == pytest.approx([1 / (1 + math.exp(-margin)) for margin in margins], abs=1e-5)


def test_labels_that_do_not_exclude_each_other_have_probabilities_of_their_own(tmp_path):
    model, tokenizer = classifier(tmp_path, ["rude", "good"], problem_type="multi_label_classification")
    logits = torch.stack(logits_by_hand(model, tokenizer, [r["prompt"] + r["response"] for r in ROWS]))
    assert reward(tmp_path)(ROWS) == pytest.approx(logits[:, 1].sigmoid().tolist(), abs=1e-5)
    found = reward(tmp_path, reward_label="rude", reward_output="logit")(ROWS)
    assert found == pytest.approx(logits[:, 0].tolist(), abs=1e-5)


def test_one_of_several_regressions_is_its_output(tmp_path):
    model, tokenizer = classifier(tmp_path, ["helpful", "correct", "brief"], problem_type="regression")
    logits = torch.stack(logits_by_hand(model, tokenizer, [r["prompt"] + r["response"] for r in ROWS]))
    assert reward(tmp_path, reward_label="correct")(ROWS) == pytest.approx(logits[:, 1].tolist(), abs=1e-5)
    with pytest.raises(UserError, match="of a regression have no probabilities: leave --reward_output out"):
        reward(tmp_path, reward_label="correct", reward_output="logit")


def test_a_models_own_template_renders_chats_and_texts(tmp_path):
    model, tokenizer = classifier(tmp_path, ["score"], TEMPLATE)
    texts = ["[user]The river?[assistant]Yes.", "[user]The river[assistant] sees the garden."]
    expected = [x.item() for x in logits_by_hand(model, tokenizer, texts)]
    found = reward(tmp_path)([{"prompt": CHAT, "response": "Yes."}, ROWS[0]])
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("template", [None, END + TEMPLATE])
def test_a_text_begins_with_one_bos_token_whether_template_or_tokenizer_adds_it(tmp_path, template):
    model, tokenizer = classifier(tmp_path, ["score"], template, pad=None)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{END} $A", special_tokens=[(END, bos)])
    tokenizer.save_pretrained(tmp_path)
    text = "[user]The river[assistant] sees the garden." if template else "The river sees the garden."
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == bos and bos not in ids[1:]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits.item()
    assert reward(tmp_path)([ROWS[0]]) == [pytest.approx(expected, abs=1e-5)]


def test_a_chat_needs_the_models_template_and_a_text_needs_tokens(tmp_path):
    classifier(tmp_path, ["score"])
    with pytest.raises(UserError, match=r"row 1: .* this model's tokenizer has no chat template; join the texts in a"):
        reward(tmp_path)([{"prompt": CHAT, "response": "Yes."}])
    with pytest.raises(UserError, match="a text is empty"):
        reward(tmp_path)([{"prompt": "", "response": ""}])


def test_roberta_counts_positions_from_its_padding(tmp_path):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=10, pad_token_id=1, type_vocab_size=1, num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = []
    for row in ROWS:
        ids = tokenizer(row["prompt"] + row["response"])["input_ids"][-8:]
        with torch.no_grad():
            expected.append(model(input_ids=torch.tensor([ids])).logits.item())
    assert reward(tmp_path)(ROWS) == pytest.approx(expected, abs=1e-5)


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


def test_a_classifier_without_probabilities_gives_its_decision(tmp_path):
    pytest.importorskip("sklearn")
    skops = pytest.importorskip("skops.io")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    texts, both = ["good river", "bad engine", "so garden"] * 5, [row["prompt"] + row["response"] for row in ROWS]
    two = make_pipeline(TfidfVectorizer(), LinearSVC()).fit(texts, ["pos", "neg", "pos"] * 5)
    skops.dump(two, tmp_path / "two.skops")
    margin = two.decision_function(both)
    assert reward(tmp_path / "two.skops")(ROWS) == pytest.approx(margin.tolist())
    assert reward(tmp_path / "two.skops", reward_label="neg")(ROWS) == pytest.approx((-margin).tolist())
    with pytest.raises(UserError, match="the classifier has no predict_proba: leave --reward_output out"):
        reward(tmp_path / "two.skops", reward_output="logit")
    three = make_pipeline(TfidfVectorizer(), LinearSVC()).fit(texts, ["pos", "neg", "so-so"] * 5)
    skops.dump(three, tmp_path / "three.skops")
    found = reward(tmp_path / "three.skops", reward_label="so-so")(ROWS)
    assert found == pytest.approx(three.decision_function(both)[:, 2].tolist())


def test_a_file_without_a_usable_pipeline_is_named(tmp_path):
    pytest.importorskip("sklearn")
    skops = pytest.importorskip("skops.io")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multioutput import MultiOutputClassifier
    from sklearn.pipeline import make_pipeline

    texts = ["the river", "an engine", "a garden", "no violin"]
    (tmp_path / "text.skops").write_text("x")
    skops.dump({"a": 1}, tmp_path / "dict.skops")
    skops.dump(make_pipeline(TfidfVectorizer(), Ridge()), tmp_path / "new.skops")
    skops.dump(make_pipeline(TfidfVectorizer(), Ridge()).fit(texts, [0, 1, 0, 1]), tmp_path / "ridge.skops")
    several = make_pipeline(TfidfVectorizer(), MultiOutputClassifier(LogisticRegression()))
    skops.dump(several.fit(texts, [[0, 1], [1, 0], [0, 0], [1, 1]]), tmp_path / "several.skops")
    messages = {
        "text": "it raised BadZipFile", "dict": "it raised TypeError: .* is not an estimator",
        "new": "it raised NotFittedError", "several": "the pipeline has several outputs",
    }  # fmt: skip
    for name, message in messages.items():
        with pytest.raises(UserError, match=message):
            reward(tmp_path / f"{name}.skops")
    with pytest.raises(UserError, match="is not a classifier: leave --reward_label and --reward_output out"):
        reward(tmp_path / "ridge.skops", reward_label="1", reward_output="logit")
    with pytest.raises(UserError, match=r"the file holds nothing to trust of type my\.Type"):
        reward(tmp_path / "ridge.skops", reward_trusted=["my.Type"])


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skops", None)
    monkeypatch.setitem(sys.modules, "skops.io", None)
    with pytest.raises(UserError, match=r"needs scikit-learn and skops: pip install 'tdpo\[experiments\]'"):
        reward(tmp_path / "r.skops")


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
    scored = [{**ROWS[0], "score": 1.0}] * 40  # more than a batch
    with pytest.raises(UserError, match="row 41 has no column 'score', only prompt, response"):
        reward("column:score")([*scored, ROWS[0]])
    for value in ("x", None, float("nan")):
        with pytest.raises(UserError, match=f"row 41: 'score' must be a finite number, got {value!r}"):
            reward("column:score")([*scored, {**ROWS[0], "score": value}])


def test_a_column_cannot_score_samples_and_that_is_known_before_a_model_is_loaded(tmp_path, pairs_file):
    argv = ["--model_name_or_path", "none", "--dataset_name", str(pairs_file), "--reward", "column:score"]
    with pytest.raises(UserError, match="--reward column:score: responses that are sampled have no columns"):
        eval_command.run([*argv, "--ref_model_name_or_path", "none", "--generate"])
    sweep = ["--output_dir", str(tmp_path), "--eval_steps", "1", "--test_fraction", "0.5"]
    with pytest.raises(UserError, match="--reward column:score: responses that are sampled have no columns"):
        frontier_command.run([*argv, *sweep])
    RewardOptions(reward="m:f").check_for_samples()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": "r.pkl"}, "a pickle can run any code when it is loaded; save the pipeline with skops.io.dump"),
        ({"reward": "R.PKL"}, "a pickle can run any code"),
        ({"reward": "r.joblib"}, "a pickle can run any code"),
        ({"reward": "column:x", "reward_label": "a"}, "--reward_label has no effect with --reward column:x"),
        ({"reward": "column:x", "reward_batch_size": 4}, "--reward_batch_size has no effect with --reward column:x"),
        ({"reward_label": "a"}, "--reward_label has no effect without --reward"),
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
     ("none/such.skops", "no such file"), ("none-such-folder", "model 'none-such-folder' cannot be loaded"),
     ("./none", r"--reward: \./none: no such folder"), ("math:pi", "expected a function, got 3.14")],
)  # fmt: skip
def test_what_cannot_be_loaded_is_named(name, message):
    with pytest.raises(UserError, match=message):
        reward(name)


def test_labels_by_hand():
    for labels in (["neg", "pos"], ["LABEL_0", "LABEL_1"], ["0", "1"], ["-1", "1"], ["False", "True"], ["bad", "Good"]):
        assert label_index(labels, None, "m") == 1
    assert label_index(["POSITIVE", "NEGATIVE"], None, "m") == 0
    assert label_index(["a", "A"], "A", "m") == 1
    assert label_index(["2", "1", "0"], "0", "m") == 2  # a name before an index
    for labels in (["a", "b"], ["1", "2"]):
        with pytest.raises(UserError, match="has no label named positive: name one with --reward_label; there are "):
            label_index(labels, None, "m")
    with pytest.raises(UserError, match="has no label 3; there are a, b, c"):
        label_index(["a", "b", "c"], "3", "m")


def test_class_scores_by_hand():
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    total = sum(math.exp(x) for x in (1, 2, 3))
    assert class_score(logits, 1, "probability").item() == pytest.approx(math.exp(2) / total)
    assert class_score(logits, 1, "logit").item() == pytest.approx(2 - math.log(math.exp(1) + math.exp(3)))
    p = torch.tensor([[0.25, 0.75]]).log()
    assert class_score(p, 0, "logit").item() == pytest.approx(math.log(1 / 3))
    assert class_score(torch.tensor([[0.0, -800.0]]), 0, "logit").item() == 800.0
