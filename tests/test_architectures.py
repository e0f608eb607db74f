"""Tiny random models of many architectures: tdpo's statistics and gradients are those of the models' own logits.

Nothing in tdpo knows an architecture by name, so the list is a sample of conventions: biases, tied and untied heads,
scaled and capped logits, projections behind the body, sliding windows, ALiBi, experts, state spaces, adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from numeric_worlds import (
    BACKENDS,
    assert_same_gradients,
    gradients,
    moved,
    plain_pair_loss,
    plain_pair_stats,
    random_pairs,
    tiny_llama,
)
from torch import Tensor, nn

from tdpo import UserError, objectives, score_pairs
from tdpo.models.policy import disable_dropout, head_of, prove_head
from tdpo.models.reference import FrozenCopy

VOCAB = 53
NO_SPECIALS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    **NO_SPECIALS,
}
LLAMA_LIKE = {**COMMON, "intermediate_size": 24, "num_key_value_heads": 1}
GPT_LIKE = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
GEMMA = {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}

CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: hf.GPT2Config(**GPT_LIKE, **NO_SPECIALS),
    "llama": lambda: hf.LlamaConfig(**LLAMA_LIKE),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**COMMON, intermediate_size=24),
    "qwen3": lambda: hf.Qwen3Config(**LLAMA_LIKE, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**GEMMA, **ALTERNATING, final_logit_softcapping=2.0, attn_logit_softcapping=3.0),
    "gemma3": lambda: hf.Gemma3TextConfig(**GEMMA, **ALTERNATING),
    "phi": lambda: hf.PhiConfig(**COMMON, intermediate_size=24),
    "gptj": lambda: hf.GPTJConfig(**GPT_LIKE, **NO_SPECIALS, rotary_dim=4, tie_word_embeddings=False),
    "opt": lambda: hf.OPTConfig(**opt_settings()),
    "opt_projected": lambda: hf.OPTConfig(**opt_settings(), word_embed_proj_dim=12),
    "mixtral": lambda: hf.MixtralConfig(**LLAMA_LIKE, num_local_experts=3, num_experts_per_tok=2),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **LLAMA_LIKE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "cohere": lambda: hf.CohereConfig(**LLAMA_LIKE, logit_scale=0.25),
    "granite": lambda: hf.GraniteConfig(**LLAMA_LIKE, logits_scaling=3.0, embedding_multiplier=2.0),
    "hyperclovax": lambda: hf.HyperCLOVAXConfig(**LLAMA_LIKE, logits_scaling=3.0),
    "bloom": lambda: hf.BloomConfig(
        vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3, **NO_SPECIALS
    ),
    "mpt": lambda: hf.MptConfig(**MPT),
    "mpt_with_an_idle_logit_scale": lambda: hf.MptConfig(**MPT, logit_scale=0.5),
    "mpt_with_a_logit_scale_in_words": lambda: hf.MptConfig(**MPT, logit_scale="inv_sqrt_d_model"),
    "mamba": lambda: hf.MambaConfig(
        vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=0.3, **NO_SPECIALS
    ),
    "recurrent_gemma": lambda: hf.RecurrentGemmaConfig(
        **{**COMMON, "num_hidden_layers": 3},
        intermediate_size=24,
        lru_width=16,
        attention_window_size=4,
        logits_soft_cap=2.0,
    ),
    "falcon_h1": lambda: hf.FalconH1Config(
        **LLAMA_LIKE, lm_head_multiplier=0.3, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=4
    ),
}
MPT = {"vocab_size": VOCAB, "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "initializer_range": 0.3}
FLOAT32_ONLY = ("mixtral", "qwen3_moe")  # their grouped products have no float64
every_architecture = pytest.mark.parametrize("name", CONFIGS)


def opt_settings() -> dict[str, Any]:
    settings = {**COMMON, "ffn_dim": 24, "dropout": 0.0}
    settings["init_std"] = settings.pop("initializer_range")
    return settings


def build(name: str, dtype: torch.dtype | None = None, config: Any = None) -> Any:
    """A random model in evaluation mode; a head's bias is drawn too, since at its initial zero it would not show."""
    torch.manual_seed(0)
    config = config or CONFIGS[name]()
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager" if name == "mpt" else None)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        nn.init.normal_(bias)
    return model.to(dtype or (torch.float32 if name in FLOAT32_ONLY else torch.float64)).eval()


# --- statistics and gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@every_architecture
def test_statistics_and_gradients_are_those_of_the_models_own_logits(name: str, backend: Any):
    """Padded rows of several pairs against each sequence alone, through the model's whole forward."""
    reference = build(name)
    policy = moved(reference)
    pairs = random_pairs(seed=4, count=3, vocab=VOCAB, longest=8)
    assert max(len(pair.prompt_ids) + len(pair.chosen_ids) for pair in pairs) > 8  # past the sliding windows
    scores = score_pairs(policy, reference, pairs, objectives.tdpo1(0.3), backend=backend)
    plain = plain_pair_stats(policy, reference, pairs)
    # Some bodies compute their norms or positions in float32 whatever their own precision.
    rtol = 1e-5 if name in FLOAT32_ONLY else 2e-6
    for column in ("chosen_logratio", "rejected_logratio", "chosen_kl", "rejected_kl"):
        ours, theirs = getattr(scores.stats, column), getattr(plain, column).to(scores.loss)
        assert theirs.abs().min() > 1e-3
        assert ((ours - theirs).abs() / theirs.abs().max()).max() < rtol, column
    theirs = plain_pair_loss("tdpo1", plain, 0.3)
    assert_same_gradients(gradients(scores.loss.sum(), policy), gradients(theirs.sum(), policy), rtol=50 * rtol)


@every_architecture
def test_a_deep_copied_reference_is_the_model_itself(name: str):
    policy = build(name)
    pairs = random_pairs(seed=5, count=2, vocab=VOCAB)
    scores = score_pairs(policy, FrozenCopy.of(policy), pairs, objectives.tdpo1(0.3))
    assert (scores.tokens.kl == 0).all() and torch.equal(scores.tokens.logp, scores.tokens.ref_logp)
    assert all(parameter.requires_grad for parameter in policy.parameters())


@every_architecture
def test_bfloat16_models_pass_the_proof_and_score_near_their_own_logits(name: str):
    model = build(name, torch.bfloat16)
    prove_head(model)
    pairs = random_pairs(seed=6, count=2, vocab=VOCAB)
    scores = score_pairs(model, model, pairs, objectives.dpo(0.3))
    assert scores.tokens.logp.dtype == torch.float32
    for pair, ours in zip(pairs, scores.chosen_logp, strict=True):
        start = len(pair.prompt_ids) - 1
        logits = model(input_ids=torch.tensor([[*pair.prompt_ids, *pair.chosen_ids]])).logits[0, start:-1]
        theirs = logits.float().log_softmax(-1)[range(len(pair.chosen_ids)), pair.chosen_ids].sum()
        assert (ours - theirs).abs() < 0.02 * theirs.abs()


@every_architecture
def test_disabled_dropout_makes_training_mode_deterministic_and_equal_to_evaluation(name: str):
    config = CONFIGS[name]()
    for key, value in list(vars(config).items()):
        if "drop" in key and key not in ("classifier_dropout", "layerdrop") and isinstance(value, (int, float)):
            setattr(config, key, 0.4)
    model = build(name, config=config)
    ids = torch.arange(12)[None]
    expected = model(input_ids=ids).logits
    model.train()
    dropped = model(input_ids=ids).logits
    disable_dropout(model)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    if not name.startswith(("mamba", "recurrent_gemma", "falcon_h1", "mpt")):  # these take no dropout from their config
        assert (dropped - expected).abs().max() > 1e-2


# --- how the head is read -------------------------------------------------------------------------------------------

READINGS = {
    "llama": (1.0, None),
    "cohere": (0.25, None),
    "granite": (1 / 3, None),
    "hyperclovax": (3.0, None),
    "falcon_h1": (0.3, None),
    "gemma2": (1.0, 2.0),
    "recurrent_gemma": (1.0, 2.0),
    "mpt_with_an_idle_logit_scale": (1.0, None),
    "mpt_with_a_logit_scale_in_words": (1.0, None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", READINGS)
def test_scale_and_soft_cap_are_the_models_own(name: str, dtype: torch.dtype):
    head = head_of(build(name, dtype))
    scale, soft_cap = READINGS[name]
    assert head.scale == pytest.approx(scale, abs=1e-12)
    assert head.soft_cap == soft_cap


@pytest.mark.parametrize("name", ["phi", "gptj"])
def test_a_bias_of_the_head_is_part_of_it(name: str):
    model = build(name)
    head = head_of(model)
    assert head.bias is model.lm_head.bias and head.bias.abs().min() > 0


@pytest.mark.parametrize(
    "idle", [{"logit_scale": 0.5}, {"logits_scaling": 4.0}, {"final_logit_softcapping": 0.5}, {"logit_scale": "words"}]
)
def test_settings_a_model_does_not_use_do_not_misfire(idle: dict[str, Any]):
    """A Llama whose config has another model's key: its logits are as they were, so tdpo's statistics are too."""
    plain = tiny_llama()
    marked = copy.deepcopy(plain)
    for key, value in idle.items():
        setattr(marked.config, key, value)
    pairs = random_pairs(vocab=50)
    ours, theirs = (score_pairs(m, tiny_llama(seed=8), pairs, objectives.tdpo1(0.3)) for m in (marked, plain))
    assert torch.equal(ours.loss, theirs.loss)
    head = head_of(marked)
    assert (head.scale, head.soft_cap) == (1.0, None)


class Finished(hf.LlamaForCausalLM):
    """A Llama that does something to its logits, as ``finish`` says."""

    finish: Callable[[Tensor], Tensor] = staticmethod(lambda logits: logits)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = self.finish(output.logits)
        return output


def finished(finish: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32, **config: Any) -> Finished:
    model = Finished(tiny_llama().config)
    model.load_state_dict(tiny_llama().state_dict())
    model.finish = finish
    for key, value in config.items():
        setattr(model.config, key, value)
    return model.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("config", "finish", "reading"),
    [
        ({"logit_scale": 0.3}, lambda z: z * 0.3, (0.3, None)),
        ({"lm_head_multiplier": 0.3}, lambda z: z * 0.3, (0.3, None)),
        ({"output_multiplier": 0.3}, lambda z: z * 0.3, (0.3, None)),
        ({"logits_scaling": 0.3}, lambda z: z * 0.3, (0.3, None)),
        ({"logits_scaling": 0.25}, lambda z: z / 0.25, (4.0, None)),
        ({"final_logit_softcapping": 30.0}, lambda z: 30 * torch.tanh(z / 30), (1.0, 30.0)),
        ({"logits_soft_cap": 30.0}, lambda z: 30 * torch.tanh(z / 30), (1.0, 30.0)),
        ({"output_logit_soft_cap": 30.0}, lambda z: 30 * torch.tanh(z / 30), (1.0, 30.0)),
        (
            {"output_multiplier": 0.3, "final_logit_softcapping": 20.0},
            lambda z: 20 * torch.tanh(z * 0.3 / 20),
            (0.3, 20.0),
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_every_name_of_a_scale_or_cap_is_read_where_the_model_means_it(config, finish, reading, dtype):
    head = head_of(finished(finish, dtype, **config))
    assert (head.scale, head.soft_cap) == pytest.approx(reading)


def with_entry(logits: Tensor, entry: int, value: float) -> Tensor:
    logits = logits.clone()
    logits[..., entry] = value
    return logits


UNKNOWN = {
    "a constant added to one word": lambda z: z + 0.5 * torch.eye(50, dtype=z.dtype)[7],
    "a constant vector": lambda z: z + torch.linspace(-1, 1, 50, dtype=z.dtype),
    "a factor": lambda z: z * 1.7,
    "a sign": lambda z: -z,
    "a soft cap": lambda z: 30 * torch.tanh(z / 30),
    "a hard bound": lambda z: z.clamp(-50, 50),
    "a word left out": lambda z: with_entry(z, 7, -torch.inf),
    "a word pushed far down": lambda z: with_entry(z, 7, torch.finfo(z.dtype).min),
    "two words exchanged": lambda z: z[..., [1, 0, *range(2, 50)]],
    "not a number": lambda z: with_entry(z, 7, torch.nan),
    "a mean taken away from scaled logits": lambda z: 2 * z - z.mean(-1, keepdim=True),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", UNKNOWN)
def test_logits_changed_in_an_unknown_way_are_refused(what: str, dtype: torch.dtype):
    model = finished(UNKNOWN[what], dtype)
    with pytest.raises(UserError, match=r"Finished: .* differ from the model's own logits"):
        prove_head(model)
    with pytest.raises(UserError, match="Finished"):
        score_pairs(tiny_llama(), model, random_pairs(), objectives.dpo(0.1))


@pytest.mark.parametrize("what", ["a factor", "a soft cap", "a constant vector"])
def test_a_fresh_head_of_zeros_hides_nothing(what: str):
    """All logits are zero, as in some models before their first step; what becomes of others shows all the same."""
    model = finished(UNKNOWN[what])
    nn.init.zeros_(model.lm_head.weight)
    with pytest.raises(UserError, match="differ from the model's own logits"):
        prove_head(model)


def test_a_change_between_body_and_head_is_refused():
    class Doubling(nn.Linear):
        def forward(self, states: Tensor) -> Tensor:
            return super().forward(2 * states)

    model = tiny_llama(dtype=torch.float32)
    doubling = Doubling(16, 50, bias=False)
    doubling.weight = model.lm_head.weight
    model.lm_head = doubling
    with pytest.raises(UserError, match="differ from the model's own logits by 5"):
        prove_head(model)


@pytest.mark.parametrize(("factor", "known"), [(1.0, True), (1.7, False)])
def test_a_model_that_never_calls_its_heads_layer_is_judged_by_its_logits(factor: float, known: bool):
    class Direct(hf.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            states = self.model(input_ids=input_ids, **kwargs).last_hidden_state
            logits = factor * nn.functional.linear(states, self.lm_head.weight)
            return hf.modeling_outputs.CausalLMOutputWithPast(logits=logits)

    model = Direct(tiny_llama().config).eval()
    if known:
        assert (head_of(model).scale, head_of(model).soft_cap) == (1.0, None)
    else:
        with pytest.raises(UserError, match="differ from the model's own logits"):
            prove_head(model)


def test_words_left_out_by_the_heads_own_bias_are_no_obstacle():
    model = build("phi", torch.float32)
    with torch.no_grad():
        model.lm_head.bias[-3:] = -torch.inf
    prove_head(model)
    pairs = random_pairs(vocab=VOCAB - 3)
    scores = score_pairs(model, build("phi", torch.float32), pairs, objectives.dpo(0.1))
    assert scores.tokens.logp.isfinite().all()


def test_the_proof_runs_once_and_leaves_the_model_as_it_was():
    model = finished(lambda logits: logits).train()
    ids = torch.arange(5)[None]
    before = model(input_ids=ids).logits
    calls = []
    model.finish = lambda logits: calls.append(1) or logits
    for _ in range(3):
        prove_head(model)
    assert len(calls) == 1
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.training and not model.lm_head._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_proof_does_not_mind_autocast():
    """Body, head and logits all run in the precision the user chose; what is unknown is still refused."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        head = head_of(finished(lambda logits: logits * 0.3, logit_scale=0.3))
        with pytest.raises(UserError, match="differ from the model's own logits"):
            prove_head(finished(UNKNOWN["a soft cap"]))
        scores = score_pairs(tiny_llama(dtype=torch.float32), tiny_llama(seed=1), random_pairs(), objectives.dpo(0.1))
    assert head.scale == 0.3
    assert scores.loss.isfinite().all()


def test_resizing_the_vocabulary_after_the_proof_keeps_head_and_logits_together():
    model = tiny_llama(dtype=torch.float64)
    prove_head(model)
    model.resize_token_embeddings(57)
    reference = moved(model, seed=2)
    assert head_of(model).vocab_size == 57
    pairs = random_pairs(vocab=57)
    scores = score_pairs(model, reference, pairs, objectives.tdpo1(0.3))
    plain = plain_pair_stats(model, reference, pairs)
    torch.testing.assert_close(scores.stats.chosen_kl, plain.chosen_kl, rtol=1e-8, atol=1e-9)


def test_a_model_that_sees_the_future_is_refused():
    config = hf.Gemma3TextConfig(**GEMMA, **ALTERNATING, use_bidirectional_attention=True)
    with pytest.raises(UserError, match="lets a token see those after it"):
        prove_head(build("gemma3", torch.float32, config))


def test_weights_that_are_not_finite_are_called_so():
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        prove_head(model)


# --- adapters -------------------------------------------------------------------------------------------------------


def adapted(**settings: Any) -> Any:
    """A LoRA policy whose adapters have left zero."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(tiny_llama(dtype=torch.float32), config, autocast_adapter_dtype=False).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}], ids=["adapters", "adapters_and_head"])
def test_adapters_take_part_and_alone_receive_gradients(settings: dict[str, Any]):
    policy, reference = adapted(**settings), tiny_llama(dtype=torch.float32)
    if settings:
        with torch.no_grad():
            policy.get_base_model().lm_head.weight.mul_(1.3)
    pairs = random_pairs()
    scores = score_pairs(policy, reference, pairs, objectives.tdpo1(0.3))
    plain = plain_pair_stats(policy, reference, pairs)
    assert plain.chosen_kl.min() > 1e-3
    torch.testing.assert_close(scores.stats.chosen_kl, plain.chosen_kl, rtol=1e-4, atol=1e-6)
    ours = gradients(scores.loss.sum(), policy)
    theirs = gradients(plain_pair_loss("tdpo1", plain, 0.3).sum(), policy)
    assert_same_gradients(ours, theirs, rtol=1e-3)
    moving = {name for name, gradient in ours.items() if gradient.abs().max() > 0}
    assert moving == {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert all("lora" in name or "modules_to_save" in name for name in moving)


def test_an_adapter_on_the_head_is_refused():
    """Its weight would be read without the adapter: right at the first step, where the adapter is zero, then wrong."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    policy = peft.get_peft_model(tiny_llama(dtype=torch.float32), config)
    with pytest.raises(UserError, match="adapter on its language-model head"):
        score_pairs(policy, tiny_llama(), random_pairs(), objectives.dpo(0.1))
