"""Adapters on tied weights, trained tokens and merging: every value is compared with peft's own forward."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, preference_rows
from numeric_worlds import (
    BACKENDS,
    assert_same_gradients,
    gradients,
    plain_pair_loss,
    plain_pair_stats,
    random_pairs,
)
from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig, get_peft_model, get_peft_model_state_dict
from runs import history
from safetensors.torch import load_file
from tiny_training import tiny_config
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from tdpo import SFTConfig, SFTTrainer, TDPOConfig, TDPOTrainer, UserError, objectives, ops, score_pairs
from tdpo.cli import main
from tdpo.config import AdapterOptions
from tdpo.models.adapters import merge_adapter
from tdpo.models.reference import AdapterOff

pytestmark = pytest.mark.filterwarnings("ignore:Model .* `tie_word_embeddings=True`", "ignore:Setting `save_embedding")

TRAINED_TOKENS = {
    "tied": (True, [5, 6, 7, 30]),
    "head of a tied model": (True, {"lm_head": [5, 6, 7, 30]}),
    "embedding of an untied model": (False, {"embed_tokens": [5, 6, 30]}),
    "head of an untied model": (False, {"lm_head": [5, 6, 30]}),
    "both of an untied model": (False, {"lm_head": [5, 30], "embed_tokens": [5, 6]}),
}


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})


def llama(vocabulary: int, tied: bool = True) -> Any:
    model = make_model(vocabulary)
    if tied:
        return model
    model.config.tie_word_embeddings = False
    torch.manual_seed(0)
    return type(model)(model.config).eval()


def adapted(model: Any, config: LoraConfig, **options: Any) -> Any:
    """The model in an adapter whose every weight has left its start."""
    policy = get_peft_model(model, config, **options).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


def config(folder: Path, **fields: Any) -> TDPOConfig:
    return tiny_config(folder, **{"per_device_train_batch_size": 4, "max_steps": 4, **fields})


def curve(trainer: TDPOTrainer) -> list[list[float]]:
    names = ("loss", "grad_norm", "kl/chosen", "rewards/margins")
    return [[log[name] for name in names] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tied", "tokens"), TRAINED_TOKENS.values(), ids=TRAINED_TOKENS)
def test_trained_tokens_have_the_loss_and_gradients_of_pefts_own_logits(
    tied: bool, tokens: Any, backend: ops.BackendName
) -> None:
    reference = llama(50, tied).double()
    settings = lora(trainable_token_indices=tokens)
    policy = adapted(copy.deepcopy(reference), settings, autocast_adapter_dtype=False).double()
    pairs = random_pairs()
    theirs = plain_pair_loss("tdpo1", plain_pair_stats(policy, reference, pairs), 0.3).mean()
    expected = gradients(theirs, policy)
    assert any(gradient.abs().max() > 1e-4 for name, gradient in expected.items() if "trainable_tokens" in name)
    for layout in ("padded", "tree"):
        ours = score_pairs(policy, reference, pairs, objectives.tdpo1(0.3), layout, backend).loss.mean()
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
        assert abs(ours.item() - 0.6931) > 1e-3
        assert_same_gradients(gradients(ours, policy), expected, rtol=1e-6)


def test_trained_tokens_give_one_trajectory_with_every_reference(tmp_path: Path, tokenizer: Any) -> None:
    curves = {}
    for reference in ("adapter_off", "frozen", "cached"):
        trainer = TDPOTrainer(
            llama(len(tokenizer)), None, config(tmp_path / reference, reference=reference), None, preference_rows(8),
            None, tokenizer, peft_config=lora(trainable_token_indices=[5, 6, 7, 300]),
        )  # fmt: skip
        trainer.train()
        curves[reference] = curve(trainer)
    assert curves["frozen"][0][0] == pytest.approx(0.693147, abs=1e-6) and curves["frozen"][-1][2] > 1e-4
    for reference in ("adapter_off", "cached"):
        for ours, theirs in zip(curves[reference], curves["frozen"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


MERGED = {
    "embedding": ({"target_modules": ["embed_tokens"]}, False),
    "embedding and attention, rsLoRA": ({"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True}, False),
    "head": ({"target_modules": ["lm_head"]}, False),
    "embedding and head, apart": ({"target_modules": ["embed_tokens", "lm_head"]}, False),
    "embedding and head, as one": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "DoRA on the embedding": ({"target_modules": ["embed_tokens"], "use_dora": True}, False),
    "DoRA on the head": ({"target_modules": ["lm_head"], "use_dora": True}, False),
    "embedding saved whole": ({"modules_to_save": ["embed_tokens"]}, False),
    "head saved whole": ({"modules_to_save": ["lm_head"]}, False),
    "both saved whole": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "tokens of both": ({"trainable_token_indices": [5, 6, 7]}, True),
    "tokens of the head": ({"trainable_token_indices": {"lm_head": [5, 6, 7]}}, False),
    "attention alone": ({}, True),
}


def assert_reloads_as(folder: Path, model: Any, logits: torch.Tensor) -> Any:
    """What the folder holds gives these logits, relative to the largest, as the model in memory does."""
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    for plain in (model, reloaded):
        error = (plain(input_ids=torch.arange(3, 40)[None]).logits - logits).abs().max() / logits.abs().max()
        assert error < 1e-5
    return reloaded


@pytest.mark.parametrize(("options", "tied"), MERGED.values(), ids=MERGED)
def test_a_tied_model_merged_and_reloaded_equals_its_adapter(
    tmp_path: Path, options: dict[str, Any], tied: bool
) -> None:
    """Head and embedding stay one weight only where the adapter changed both alike."""
    policy = adapted(make_model(50), lora(**options))
    logits = policy(input_ids=torch.arange(3, 40)[None]).logits.detach()
    plain = merge_adapter(policy)
    plain.save_pretrained(tmp_path)
    reloaded = assert_reloads_as(tmp_path, plain, logits)
    assert (reloaded.lm_head.weight is reloaded.model.embed_tokens.weight) == tied
    assert reloaded.config.tie_word_embeddings == tied


def test_merging_takes_every_active_adapter_and_other_architectures(tmp_path: Path) -> None:
    """Two adapters at once; a scaled embedding with a capped head; an embedding under another name."""
    two = adapted(make_model(50), lora(target_modules=["embed_tokens", "q_proj"]))
    two.add_adapter("second", lora(target_modules=["lm_head", "embed_tokens"], init_lora_weights=False))
    two.base_model.set_adapter(["default", "second"])
    gemma = Gemma2Config(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    gpt2 = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    for name, policy in {
        "two": two.eval(),
        "gemma": adapted(Gemma2ForCausalLM(gemma), lora(target_modules=["embed_tokens", "q_proj"])),
        "gpt2": adapted(GPT2LMHeadModel(gpt2), lora(target_modules=["wte", "c_attn"], fan_in_fan_out=True)),
    }.items():
        logits = policy(input_ids=torch.arange(3, 40)[None]).logits.detach()
        plain = merge_adapter(policy)
        plain.save_pretrained(tmp_path / name)
        assert_reloads_as(tmp_path / name, plain, logits)


def test_the_command_merges_an_adapter_on_a_tied_embedding(tmp_path: Path, model_folder: Path) -> None:
    policy = adapted(AutoModelForCausalLM.from_pretrained(model_folder), lora(target_modules=["embed_tokens"]))
    policy.save_pretrained(tmp_path / "adapter")
    logits = policy(input_ids=torch.arange(3, 40)[None]).logits.detach()
    arguments = ["--model_name_or_path", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")]
    assert main(["merge", *arguments]) == 0
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(reloaded(input_ids=torch.arange(3, 40)[None]).logits, logits, rtol=1e-5, atol=1e-5)


def noisy(policy: Any) -> Any:
    """The policy after its active adapter has been trained, as it were: every trained weight has moved."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


def second_of_two(vocabulary: int) -> Any:
    """A policy with two adapters, the second of which is active and trained; the first is another."""
    policy = get_peft_model(make_model(vocabulary), lora(init_lora_weights=False))
    policy.add_adapter("second", lora(r=2, target_modules=["v_proj"]))
    policy.set_adapter("second")
    return policy


CONTINUED = {
    "one adapter": lambda vocabulary: get_peft_model(make_model(vocabulary), lora()),
    "head saved whole": lambda vocabulary: get_peft_model(make_model(vocabulary), lora(modules_to_save=["lm_head"])),
    "trained tokens": lambda vocabulary: get_peft_model(make_model(vocabulary), lora(trainable_token_indices=[5, 300])),
    "DoRA": lambda vocabulary: get_peft_model(make_model(vocabulary), lora(use_dora=True)),
    "second of two": second_of_two,
}


def train_continued(policy: Any, reference: Any, folder: Path, tokenizer: Any, **options: Any) -> TDPOTrainer:
    trainer = TDPOTrainer(policy, reference, config(folder, **options), None, preference_rows(8), None, tokenizer)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", CONTINUED)
def test_a_trained_adapter_is_copied_alone_and_is_the_reference_a_whole_copy_would_be(
    tmp_path: Path, tokenizer: Any, kind: str
) -> None:
    policy = noisy(CONTINUED[kind](len(tokenizer)))
    whole = copy.deepcopy(policy)
    own = ("lora_", "modules_to_save", "trainable_tokens_delta")
    adapters = sum(p.numel() for name, p in policy.named_parameters() if any(part in name for part in own))
    trainer = train_continued(policy, None, tmp_path / "alone", tokenizer)
    held = {id(p) for p in policy.parameters()}
    (copied,) = trainer.reference.models()
    extra = sum(p.numel() for p in copied.parameters() if id(p) not in held)
    assert extra == adapters < sum(p.numel() for p in policy.parameters()) / 3
    line = (
        "reference: frozen (a copy of the policy with its adapter as loaded; --reference adapter_off takes its base); "
    )
    assert trainer.reference_line.startswith(line + f"{extra:,} weights are copied, ")
    assert curve(trainer) == curve(train_continued(copy.deepcopy(whole), whole, tmp_path / "whole", tokenizer))
    assert curve(trainer)[0][2] == 0 and curve(trainer)[-1][2] > 1e-4
    ids = torch.arange(3, 40)[None]
    assert torch.equal(copied(input_ids=ids).logits, whole.eval()(input_ids=ids).logits), "training did not move it"


def test_an_adapter_that_changes_nothing_yet_needs_no_copy(tmp_path: Path, tokenizer: Any) -> None:
    """Also where it is the second of two, is on the embedding, saves a module whole or trains tokens."""
    vocabulary = len(tokenizer)
    two = get_peft_model(make_model(vocabulary), lora(init_lora_weights=False))
    two.add_adapter("second", lora(target_modules=["v_proj"]))
    two.set_adapter("second")
    wide = lora(target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"])
    tokens = lora(trainable_token_indices=[5, 6])
    curves = []
    new = {name: get_peft_model(make_model(vocabulary), c) for name, c in {"wide": wide, "tokens": tokens}.items()}
    for name, policy in {"two": two, **new}.items():
        trainer = train_continued(policy, None, tmp_path / name, tokenizer)
        assert trainer.reference_line == (
            "reference: adapter_off (the adapter changes nothing yet, so the policy without it is the policy before "
            "training)"
        )
        assert isinstance(trainer.reference, AdapterOff)
        curves.append(curve(trainer))
        assert curves[-1][0][0] == pytest.approx(0.693147, abs=1e-6) and curves[-1][-1][2] > 1e-5
    model = make_model(vocabulary)
    torch.manual_seed(42)  # the seed of the options, at which a new adapter of peft_config is drawn
    trainer = train_continued(get_peft_model(model, lora()), None, tmp_path / "drawn", tokenizer)
    given = TDPOTrainer(
        make_model(vocabulary), None, config(tmp_path / "given"), None, preference_rows(8), None, tokenizer,
        peft_config=lora(),
    )  # fmt: skip
    given.train()
    for ours, theirs in zip(curve(trainer), curve(given), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3), "as with peft_config"


def test_what_is_saved_is_the_trained_adapter_and_a_run_resumes_from_it(tmp_path: Path, tokenizer: Any) -> None:
    """A run of four steps, and one that stops after two and is resumed from the same start, end alike."""

    def policy() -> Any:
        return noisy(get_peft_model(make_model(len(tokenizer)), lora(modules_to_save=["lm_head"])))

    start = policy()
    names = sorted(get_peft_model_state_dict(start))
    options = {"save_strategy": "steps", "save_steps": 2}
    through = train_continued(start, None, tmp_path / "through", tokenizer, **options)
    through.save_model(str(tmp_path / "saved"))
    assert list(start.peft_config) == ["default"]
    for folder in (tmp_path / "saved", tmp_path / "through" / "checkpoint-2"):
        assert sorted(load_file(folder / "adapter_model.safetensors")) == names
        assert not [path for path in folder.rglob("*.safetensors") if path.parent != folder]
    again = TDPOTrainer(
        policy(), None, config(tmp_path / "through", **options), None, preference_rows(8), None, tokenizer
    )
    again.train(resume_from_checkpoint=str(tmp_path / "through" / "checkpoint-2"))
    assert curve(again)[2:] == curve(through)[2:]


def test_a_second_model_beside_an_adapter_is_warned_of(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def warned(policy: Any, peft_config: Any = None) -> list[str]:
        caplog.clear()
        TDPOTrainer(policy, None, config(tmp_path), None, preference_rows(4), None, tokenizer, peft_config=peft_config)
        return [record.message for record in caplog.records if "second model" in record.message]

    vocabulary = len(tokenizer)
    count = sum(parameter.numel() for parameter in make_model(vocabulary).parameters())
    assert warned(make_model(vocabulary), lora(init_lora_weights="pissa")) == [
        f"the reference is a second model of {count:,} weights beside the policy with its adapter"
    ]
    assert warned(noisy(get_peft_model(make_model(vocabulary), lora()))) == []
    assert warned(make_model(vocabulary), lora()) == warned(make_model(vocabulary)) == []


def test_an_adapter_of_the_prompt_made_by_the_user_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    policy = get_peft_model(make_model(len(tokenizer)), prompts)
    for make in (
        lambda: TDPOTrainer(policy, None, config(tmp_path), None, preference_rows(4), None, tokenizer),
        lambda: SFTTrainer(policy, SFTConfig(str(tmp_path), use_cpu=True), preference_rows(4), None, tokenizer),
    ):
        with pytest.raises(UserError, match="PromptTuningConfig changes the prompt; use LoRA"):
            make()


def test_the_flags_of_trls_model_config_are_the_lora_config_they_name() -> None:
    options = AdapterOptions(
        use_peft=True, lora_target_parameters=["mlp.experts.down_proj"], lora_task_type="CAUSAL_LM"
    )
    peft_config = options.peft_config()
    assert peft_config.target_parameters == ["mlp.experts.down_proj"] and peft_config.target_modules is None
    assert peft_config.task_type == "CAUSAL_LM" == AdapterOptions(use_peft=True).peft_config().task_type
    few = AdapterOptions(use_peft=True, load_in_4bit=True, bnb_4bit_quant_storage="bfloat16").quantization()
    assert few is not None and few["bnb_4bit_quant_storage"] == "bfloat16"
    for wrong, message in (
        ({"lora_target_parameters": ["x"]}, "--lora_target_parameters has no effect without --use_peft"),
        ({"use_peft": True, "lora_task_type": "SEQ_CLS"}, "--lora_task_type SEQ_CLS: there are CAUSAL_LM"),
        ({"bnb_4bit_quant_storage": "uint8"}, "--bnb_4bit_quant_storage has no effect without --load_in_4bit"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "int3"}, "there are uint8, float16, bfloat16, float32"),
    ):
        with pytest.raises(UserError, match=message):
            AdapterOptions(**wrong)


def test_an_adapter_on_the_parameters_of_experts_trains_by_its_flag_and_merges(
    tmp_path: Path, tokenizer: Any, pairs_file: Path
) -> None:
    """Weights of experts are parameters of no linear layer; every reference gives one curve, and a run continues it."""
    torch.manual_seed(0)
    experts = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    MixtralForCausalLM(experts).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    words = ["--dataset_name", pairs_file, "--use_cpu", "--disable_tqdm", "--max_steps=3", "--save_strategy=no"]
    words += ["--max_length=96", "--max_prompt_length=48", "--learning_rate=1e-2", "--logging_steps=1"]
    lora_words = ["--use_peft", "--lora_r=2", "--lora_target_parameters", "mlp.experts.gate_up_proj"]

    def train(model: str, out: str, *more: object) -> list[dict[str, float]]:
        given = ["--model_name_or_path", tmp_path / model, "--output_dir", tmp_path / out, *words, *more]
        assert main(["train", *map(str, given)]) == 0
        return [log for log in history(tmp_path / out) if "loss" in log]

    off, frozen = (train("base", name, *lora_words, "--reference", name) for name in ("adapter_off", "frozen"))
    for ours, theirs in zip(off, frozen, strict=True):
        assert [ours[name] for name in ("loss", "grad_norm", "kl/chosen")] == pytest.approx(
            [theirs[name] for name in ("loss", "grad_norm", "kl/chosen")], rel=1e-4, abs=1e-6
        )
    assert off[-1]["kl/chosen"] > 1e-2 and train("adapter_off", "on")[0]["kl/chosen"] == 0
    tensors = load_file(tmp_path / "on" / "adapter_model.safetensors")
    assert tensors and all("mlp.experts.lora_" in name for name in tensors)
    assert main(["merge", "--model_name_or_path", f"{tmp_path}/on", "--output_dir", f"{tmp_path}/merged"]) == 0
    ids = torch.arange(3, 40)[None]
    merged_logits = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
    adapted_logits = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "on")(input_ids=ids).logits
    torch.testing.assert_close(merged_logits, adapted_logits, rtol=1e-5, atol=1e-5)
