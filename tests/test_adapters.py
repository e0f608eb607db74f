"""Adapters: by flags and by peft_config, continued, merged, and one trajectory with every reference strategy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, preference_rows, write_jsonl
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from test_fused import Products
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tdpo import TDPOConfig, TDPOTrainer, UserError
from tdpo.cli import main
from tdpo.config import AdapterOptions, ModelConfig
from tdpo.models.adapters import merge_adapter
from tdpo.models.load import adapter_base, load_model, load_tokenizer

SHORT = ["--max_length=96", "--max_prompt_length=48"]
QUICK = [*SHORT, "--max_steps=2", "--save_strategy=no", "--use_cpu", "--disable_tqdm", "--learning_rate=1e-2"]
LORA = ["--use_peft", "--lora_r=4", "--lora_alpha=8"]


def tdpo(*words: object) -> int:
    return main([str(word) for word in words])


def train(model: object, data: object, out: object, *more: object) -> int:
    return tdpo("train", "--model_name_or_path", model, "--dataset_name", data, "--output_dir", out, *QUICK, *more)


def mistake(capsys: pytest.CaptureFixture, *words: object) -> str:
    """Runs a training that must fail as a user's mistake; returns the one message."""
    capsys.readouterr()
    assert train(*words) == 2
    output = capsys.readouterr().err
    assert "Traceback" not in output
    return output


def history(out: Path) -> list[dict[str, float]]:
    return json.loads((out / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, pairs_file: Path) -> Path:
    """A trained adapter with a trained head, as ``tdpo train`` leaves it."""
    out = tmp_path_factory.mktemp("adapter") / "lora"
    assert train(model_folder, pairs_file, out, *LORA, "--lora_modules_to_save", "lm_head") == 0
    return out


def test_flags_are_the_lora_config_they_name() -> None:
    options = AdapterOptions(
        use_peft=True, lora_r=3, lora_alpha=9, lora_dropout=0.1, lora_target_modules=["all-linear"],
        lora_modules_to_save=["lm_head"], use_rslora=True, use_dora=True,
    )  # fmt: skip
    peft_config = options.peft_config()
    assert isinstance(peft_config, LoraConfig)
    settings = (peft_config.r, peft_config.lora_alpha, peft_config.lora_dropout, peft_config.target_modules)
    assert settings == (3, 9, 0.1, "all-linear")
    assert peft_config.modules_to_save == ["lm_head"] and peft_config.use_rslora and peft_config.use_dora
    assert AdapterOptions().peft_config() is None and AdapterOptions().quantization() is None
    assert AdapterOptions(use_peft=True, lora_target_modules=["q_proj"]).peft_config().target_modules == {"q_proj"}
    commas = AdapterOptions(
        use_peft=True, lora_target_modules=["q_proj,v_proj"], lora_modules_to_save=["embed_tokens,lm_head"],
        lora_target_parameters=["a.w,b.w", "c.w"],
    ).peft_config()  # fmt: skip
    assert commas.target_modules == {"q_proj", "v_proj"} and commas.modules_to_save == ["embed_tokens", "lm_head"]
    assert commas.target_parameters == ["a.w", "b.w", "c.w"]
    few = AdapterOptions(use_peft=True, load_in_4bit=True, use_bnb_nested_quant=True).quantization()
    assert few == {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 4}, "--lora_r has no effect without --use_peft"),
        ({"use_dora": True}, "--use_dora has no effect without --use_peft"),
        ({"use_peft": True, "lora_r": 0}, "--lora_r must be at least 1"),
        ({"use_peft": True, "lora_dropout": 1.0}, r"--lora_dropout must be in \[0, 1\)"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "--load_in_4bit and --load_in_8bit contradict"),
        ({"bnb_4bit_quant_type": "fp4"}, "--bnb_4bit_quant_type has no effect without --load_in_4bit"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "there are nf4, fp4"),
    ],
)
def test_options_without_effect_or_against_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AdapterOptions(**options)


def test_mistakes_with_adapters_are_named(
    capsys: pytest.CaptureFixture, tmp_path: Path, model_folder: Path, pairs_file: Path, adapter_folder: Path
) -> None:
    start = (model_folder, pairs_file, tmp_path / "out")
    assert "--lora_r has no effect without --use_peft" in mistake(capsys, *start, "--lora_r", 4)
    assert "no_such_layer" in mistake(capsys, *start, *LORA, "--lora_target_modules", "no_such_layer")
    assert "an adapter on its language-model head" in mistake(capsys, *start, *LORA, "--lora_target_modules", "lm_head")
    assert "add --use_peft, or continue from an adapter" in mistake(capsys, *start, "--load_in_4bit")
    again = mistake(capsys, adapter_folder, pairs_file, tmp_path / "out", "--use_peft")
    assert "the model has an adapter already: leave --use_peft out" in again
    off = mistake(capsys, *start, "--reference", "adapter_off")
    assert "--reference adapter_off needs an adapter" in off
    lost = tmp_path / "lost"
    lost.mkdir()
    (lost / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "./gone"}))
    output = mistake(capsys, lost, pairs_file, tmp_path / "out", "--tokenizer_name_or_path", model_folder)
    assert f"the base of the adapter '{lost}': ./gone: no such folder" in output
    (lost / "adapter_config.json").write_text("{}")
    output = mistake(capsys, lost, pairs_file, tmp_path / "out", "--tokenizer_name_or_path", model_folder)
    assert "names no base" in output
    (lost / "config.json").write_text("{}")
    output = mistake(capsys, lost, pairs_file, tmp_path / "out", "--tokenizer_name_or_path", model_folder)
    assert "has a model (config.json) and an adapter" in output


def test_few_bits_without_bitsandbytes_is_one_message(
    capsys: pytest.CaptureFixture, tmp_path: Path, model_folder: Path, pairs_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import tdpo.models.load as load

    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    output = mistake(capsys, model_folder, pairs_file, tmp_path / "out", *LORA, "--load_in_4bit")
    assert "--load_in_4bit needs bitsandbytes: pip install 'tdpo[quant]'" in output


def test_a_model_in_four_bits_trains_its_adapter(tmp_path: Path, tokenizer: Any, pairs_file: Path) -> None:
    """The quantised base is its own reference: the first loss is log 2. Below a width of 64 nothing is quantised."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'tdpo[quant]'")
    config = make_model(len(tokenizer)).config
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    assert train(tmp_path / "wide", pairs_file, tmp_path / "out", *LORA, "--load_in_4bit", "--logging_steps=1") == 0
    logs = [log for log in history(tmp_path / "out") if "loss" in log]
    assert logs[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and logs[0]["kl/chosen"] == 0
    assert logs[1]["loss"] < 0.692 and logs[1]["kl/chosen"] > 0
    assert train(tmp_path / "out", pairs_file, tmp_path / "on", "--load_in_4bit", "--reference", "cached") == 0


def test_a_saved_adapter_loads_with_peft_and_with_transformers(adapter_folder: Path, model_folder: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    theirs = AutoPeftModelForCausalLM.from_pretrained(adapter_folder)(input_ids=ids).logits
    on_base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter_folder)
    ours = load_model(ModelConfig(str(adapter_folder)))
    assert torch.equal(ours(input_ids=ids).logits, theirs) and torch.equal(on_base(input_ids=ids).logits, theirs)
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(model_folder)(input_ids=ids).logits, theirs)
    assert not any(p.requires_grad for p in ours.parameters())
    trained = load_model(ModelConfig(str(adapter_folder)), trainable=True)
    names = {name.split(".")[-3] for name, p in trained.named_parameters() if p.requires_grad}
    assert names == {"lora_A", "lora_B", "modules_to_save"}
    assert adapter_base(str(adapter_folder)) == str(model_folder) and adapter_base(str(model_folder)) is None


def test_the_tokenizer_of_an_adapter_without_one_is_its_bases(tmp_path: Path, adapter_folder: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapter_folder / name).read_bytes())
    assert len(load_tokenizer(ModelConfig(str(tmp_path)))) == len(load_tokenizer(ModelConfig(str(adapter_folder))))


def test_continuing_from_an_adapter_starts_where_it_is_and_its_reference_is_logged(
    capsys: pytest.CaptureFixture, tmp_path: Path, adapter_folder: Path, model_folder: Path, pairs_file: Path
) -> None:
    def first_log(name: str, *more: object) -> tuple[str, dict[str, float]]:
        capsys.readouterr()
        assert train(adapter_folder, pairs_file, tmp_path / name, *more) == 0
        line = re.search(r"^reference: .*", capsys.readouterr().out, re.M)
        assert line is not None
        return line[0], history(tmp_path / name)[0]

    line, own = first_log("own")
    assert line.startswith("reference: frozen (a copy of the policy with its adapter as loaded")
    assert own["kl/chosen"] == 0 and own["loss"] == pytest.approx(0.693147, abs=1e-5)
    line, off = first_log("off", "--reference", "adapter_off")
    assert line.startswith("reference: adapter_off (the base of the adapter")
    line, named = first_log("named", "--ref_model_name_or_path", model_folder)
    assert line.startswith("reference: adapter_off (the base of the adapter"), "no second copy of what is there"
    line, copied = first_log("copied", "--ref_model_name_or_path", model_folder, "--reference", "frozen")
    assert line == "reference: frozen (the model named as reference)"
    assert off["kl/chosen"] > 1e-3
    for other in (named, copied):
        assert other["kl/chosen"] == pytest.approx(off["kl/chosen"], rel=1e-5)
    assert (tmp_path / "own" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "own" / "model.safetensors").exists()


def test_fine_tuning_trains_adapters_too(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    """The adapter of fine-tuning is what preference training continues."""
    words = ["--dataset_name", pairs_file, "--save_strategy=no", "--use_cpu", "--disable_tqdm", "--max_length=96"]
    words += ["--max_steps=6", "--learning_rate=3e-2", "--logging_steps=1"]
    for start, out, more in ((model_folder, "sft", LORA), (tmp_path / "sft", "on", [])):
        assert tdpo("sft", "--model_name_or_path", start, "--output_dir", tmp_path / out, *words, *more) == 0
        assert (tmp_path / out / "adapter_model.safetensors").is_file()
    losses = [[log["loss"] for log in history(tmp_path / name) if "loss" in log] for name in ("sft", "on")]
    assert losses[0][-1] < 0.9 * losses[0][0] and losses[1][0] < losses[0][0]
    assert train(tmp_path / "on", pairs_file, tmp_path / "aligned") == 0
    assert history(tmp_path / "aligned")[0]["kl/chosen"] == 0


def test_merging_gives_a_plain_model_that_says_the_same(
    capsys: pytest.CaptureFixture, tmp_path: Path, adapter_folder: Path, model_folder: Path, pairs_file: Path
) -> None:
    """The world's head is tied and the adapter trained it: the merged model must not tie it again."""
    assert tdpo("merge", "--model_name_or_path", adapter_folder, "--output_dir", tmp_path / "merged") == 0
    assert f"merged into {model_folder}, saved to {tmp_path / 'merged'}" in capsys.readouterr().out
    assert (tmp_path / "merged" / "objective.json").read_text() == (adapter_folder / "objective.json").read_text()
    plain, adapted = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        load_model(ModelConfig(str(adapter_folder))),
    )
    assert plain.lm_head.weight is not plain.model.embed_tokens.weight
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(plain(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    figures = tmp_path / "figures.json"
    assert tdpo(
        "eval", "--model_name_or_path", tmp_path / "merged", "--ref_model_name_or_path", adapter_folder,
        "--dataset_name", pairs_file, "--json", figures, *SHORT,
    ) == 0  # fmt: skip
    assert json.loads(figures.read_text())["kl/rejected"] < 1e-8
    for words, message in (
        ((model_folder, tmp_path / "again"), "is a model without an adapter"),
        ((adapter_folder, tmp_path / "merged"), "already holds config.json"),
        ((tmp_path / "none", tmp_path / "again"), "no such folder"),
    ):
        capsys.readouterr()
        assert tdpo("merge", "--model_name_or_path", words[0], "--output_dir", words[1]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="no adapter"):
        merge_adapter(plain)


def test_a_frozen_head_takes_three_products_and_a_trained_one_four(tmp_path: Path, tokenizer: Any) -> None:
    """Counted in whole training steps through an adapter, evaluation mode of the reference included."""
    counts = {}
    for saved in (None, ["lm_head"]):
        config = TDPOConfig(
            output_dir=str(tmp_path), max_length=96, max_prompt_length=48, use_cpu=True, disable_tqdm=True,
            save_strategy="no",
        )  # fmt: skip
        lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved, task_type="CAUSAL_LM")
        trainer = TDPOTrainer(
            make_model(len(tokenizer)), None, config, None, preference_rows(8), None, tokenizer, peft_config=lora
        )
        batch = next(iter(trainer.get_train_dataloader()))
        with Products(len(tokenizer)) as counted:
            total, *_ = trainer.loss_sum(trainer.model, batch)
            total.backward()
        counts[bool(saved)] = counted.count
        grads = {name for name, p in trainer.model.named_parameters() if p.grad is not None}
        assert all("lora_" in name or "modules_to_save" in name for name in grads) and grads
    assert counts == {False: 3, True: 4}


def test_gradient_checkpointing_changes_no_adapters_gradient(tmp_path: Path, tokenizer: Any) -> None:
    norms = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = TDPOConfig(
            output_dir=str(tmp_path), max_length=96, max_prompt_length=48, use_cpu=True, disable_tqdm=True,
            save_strategy="no", max_steps=2, learning_rate=1e-2, gradient_checkpointing=checkpointing, logging_steps=1,
        )  # fmt: skip
        lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        trainer = TDPOTrainer(
            make_model(len(tokenizer)), None, config, None, preference_rows(8), None, tokenizer, peft_config=lora
        )
        trainer.train()
        norms.append([log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and min(norms[0]) > 1e-3


def test_dropout_of_an_adapter_that_disable_dropout_takes_away_is_warned_of(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings(**options: Any) -> list[str]:
        caplog.clear()
        config = TDPOConfig(output_dir=str(tmp_path), use_cpu=True, save_strategy="no", **options)
        lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
        TDPOTrainer(
            make_model(len(tokenizer)), None, config, None, preference_rows(4), None, tokenizer, peft_config=lora
        )
        return [record.message for record in caplog.records if "lora_dropout" in record.message]

    assert warnings() == [
        "lora_dropout 0.1 is off: --disable_dropout is on, and covers the adapter (set it to false to keep it)"
    ]
    assert warnings(disable_dropout=False) == []


def check_trajectories(model: object, data: object, folder: Path, *options: object) -> None:
    """Frozen copy, cache and adapter switched off, through the command line: one curve, gradients from step 1 on."""
    for adapter in ([], [*LORA, "--lora_modules_to_save", "lm_head"]):
        curves = {}
        copied = ["--ref_model_name_or_path", model, "--reference", "frozen"]
        for name, words in {
            "copy": ["--reference", "frozen"], "named": copied, "cached": ["--reference", "cached"],
            **({"off": ["--reference", "adapter_off"], "auto": []} if adapter else {}),
        }.items():  # fmt: skip
            out = folder / f"{name}{len(adapter)}"
            assert train(model, data, out, "--logging_steps=1", *options, *adapter, *words) == 0
            curves[name] = [log for log in history(out) if "loss" in log]
        for name, curve in curves.items():
            assert len(curve) == len(curves["copy"]) >= 10
            assert curve[0]["grad_norm"] == pytest.approx(curves["copy"][0]["grad_norm"], rel=1e-5), name
            assert curve[0]["grad_norm"] > 1e-3
            for ours, theirs in zip(curve, curves["copy"], strict=True):
                for figure in ("loss", "grad_norm", "kl/chosen", "kl/rejected", "rewards/margins"):
                    assert ours[figure] == pytest.approx(theirs[figure], rel=1e-3, abs=1e-5), (name, ours["step"])
        assert curves["copy"][-1]["kl/rejected"] > 1e-3, "the policy moved"


def test_every_reference_gives_one_trajectory_through_the_command_line(
    tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    check_trajectories(model_folder, pairs_file, tmp_path, "--max_steps=10")


def test_a_cache_is_filled_by_its_command_and_read_by_training(
    capsys: pytest.CaptureFixture, tmp_path: Path, model_folder: Path, pairs_file: Path
) -> None:
    more = write_jsonl(tmp_path / "more.jsonl", [{"prompt": "A", "chosen": " b", "rejected": " c"}])
    cache = tmp_path / "cache"
    words = ["cache-reference", "--model_name_or_path", model_folder, "--reference_cache", cache, *SHORT, "--use_cpu"]

    def filled(*more: object) -> str:
        capsys.readouterr()
        assert tdpo(*words, *more) == 0
        return capsys.readouterr().out

    first = filled("--dataset_name", pairs_file)
    assert f"reference cache {cache}: 10 different pairs, 10 of them computed now; 128 bytes a response token" in first
    assert "10 different pairs, 0 of them computed now" in filled("--dataset_name", pairs_file)
    assert train(model_folder, pairs_file, tmp_path / "a", "--reference_cache", cache) == 0
    output = capsys.readouterr().out
    line = "reference: cached (--reference_cache names a folder; hidden states of the policy as it is before training)"
    assert f"{line}; 10 different pairs in {cache}" in output
    assert train(model_folder, pairs_file, tmp_path / "b", "--reference_cache", cache, *LORA) == 0, "the base of a LoRA"
    lacking = mistake(capsys, model_folder, more, tmp_path / "c", "--reference_cache", cache)
    assert "it lacks 1 of 1 pairs (rows 1): tokens changed" in lacking and "tdpo cache-reference adds" in lacking
    assert "11 different pairs, 1 of them computed now" in filled("--dataset_name", more)
    assert train(model_folder, more, tmp_path / "c", "--reference_cache", cache) == 0
    capsys.readouterr()
    assert tdpo(*words, "--dataset_name", pairs_file, "--reference_cache_dtype", "bfloat16") == 2
    assert "filled with dtype float32 (now bfloat16)" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert tdpo(*words, "--dataset_name", pairs_file, "--reference_cache", tmp_path / "file") == 2
    assert "cannot be written" in capsys.readouterr().err
