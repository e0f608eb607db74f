"""Multimodal checkpoints on rows of text: their own logits, their own class and processor, their vision left alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from conftest import END, make_tokenizer, preference_rows, write_jsonl
from numeric_worlds import (
    assert_same_gradients,
    gradients,
    moved,
    plain_pair_loss,
    plain_pair_stats,
    random_pairs,
)
from runs import completed, train_words, weights
from torch import nn

from tdpo import SFTConfig, SFTTrainer, TDPOConfig, TDPOTrainer, UserError, objectives, score_pairs
from tdpo.cli import main
from tdpo.config import ModelConfig
from tdpo.data.pack import pack_trees
from tdpo.data.tokenise import Tokeniser
from tdpo.models.load import load_model, load_tokenizer
from tdpo.models.multimodal import idle_parts, tokenizer_of
from tdpo.models.policy import body_states
from tdpo.score import packer

VOCAB, IMAGE = 410, 403
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_VISION = {"depth": 1, "num_heads": 2, "out_hidden_size": 16, "spatial_merge_size": 2, "window_size": 8} | VISION
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": 404, "vision_start_token_id": 405, "vision_end_token_id": 406}
SLIDING = {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen2_vl": lambda: hf.Qwen2VLConfig(
        text_config=TEXT | MROPE, vision_config={**QWEN_VISION, "embed_dim": 16}, **QWEN_IDS
    ),
    "qwen2_5_vl": lambda: hf.Qwen2_5_VLConfig(
        text_config=TEXT | MROPE, vision_config={**QWEN_VISION, "fullatt_block_indexes": [0]}, **QWEN_IDS
    ),
    "qwen3_vl": lambda: hf.Qwen3VLConfig(
        text_config=TEXT | MROPE | {"head_dim": 8},
        vision_config={**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **QWEN_IDS,
    ),
    "gemma3": lambda: hf.Gemma3Config(
        text_config=TEXT | SLIDING | {"query_pre_attn_scalar": 8},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
    ),
    "mistral3": lambda: hf.Mistral3Config(
        text_config={**TEXT, "model_type": "mistral", "sliding_window": None, "head_dim": 8},
        vision_config={**VISION, "model_type": "pixtral", "head_dim": 8},
        image_token_index=IMAGE,
    ),
    "llava_next": lambda: hf.LlavaNextConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**VISION, "model_type": "clip_vision_model"},
        image_token_index=IMAGE,
    ),
    "smolvlm": lambda: hf.SmolVLMConfig(
        text_config={**TEXT, "model_type": "llama"}, vision_config=VISION, image_token_id=IMAGE, scale_factor=2
    ),
    "mllama": lambda: hf.MllamaConfig(
        text_config={**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]},
        vision_config={
            **VISION, "num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 32, "max_num_tiles": 1,
            "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]],
        },
        image_token_index=IMAGE,
    ),
    "llama4": lambda: hf.Llama4Config(
        text_config={
            **TEXT, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 24,
            "attention_chunk_size": 8,
        },
        vision_config={
            **VISION, "intermediate_size": 64, "vision_output_dim": 16, "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
        image_token_index=IMAGE,
    ),
    "qwen2_audio": lambda: hf.Qwen2AudioConfig(
        text_config={**TEXT, "model_type": "qwen2"},
        audio_config={
            "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": 8,
            "max_source_positions": 16,
        },
        audio_token_index=IMAGE,
    ),
}  # fmt: skip
IDLE = {
    "qwen2_vl": ["model.visual"],
    "qwen2_5_vl": ["model.visual"],
    "qwen3_vl": ["model.visual"],
    "gemma3": ["model.vision_tower", "model.multi_modal_projector"],
    "mistral3": ["model.vision_tower", "model.multi_modal_projector"],
    "llava_next": ["model.image_newline", "model.vision_tower", "model.multi_modal_projector"],
    "smolvlm": ["model.vision_model", "model.connector"],
    "mllama": ["model.vision_model", "model.language_model.layers.1", "model.multi_modal_projector"],
    "llama4": ["vision_model", "multi_modal_projector"],
    "qwen2_audio": ["model.audio_tower", "model.multi_modal_projector"],
}
PADDED = ("llama4",)  # its chunked attention takes no trees
every_architecture = pytest.mark.parametrize("name", CONFIGS)
OPTIONS: dict[str, Any] = {
    "max_steps": 1, "learning_rate": 1e-2, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
    "weight_decay": 0.1, "max_length": 96,
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    auto = hf.AutoModelForMultimodalLM if name == "qwen2_audio" else hf.AutoModelForImageTextToText
    return auto.from_config(config).to(dtype).eval()


def vision_tokenizer() -> Any:
    """The tests' tokenizer with the special tokens of images."""
    special = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    plain = make_tokenizer()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, eos_token=END, bos_token=END, extra_special_tokens=special
    )


def gemma_processor() -> Any:
    images = hf.Gemma3ImageProcessorPil(size={"height": 8, "width": 8})
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    return hf.Gemma3Processor(images, vision_tokenizer(), image_seq_length=4, chat_template=template)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as checkpoints have them: Gemma 3 with its processor; the others' need torchvision, so files alone."""
    root = tmp_path_factory.mktemp("multimodal")
    for name in ("qwen2_5_vl", "gemma3", "mistral3", "llama4"):
        build(name).save_pretrained(root / name)
        vision_tokenizer().save_pretrained(root / name)
    gemma_processor().save_pretrained(root / "gemma3")
    for name, processor in (("qwen2_5_vl", "Qwen2_5_VLProcessor"), ("mistral3", "PixtralProcessor")):
        settings = {"processor_class": processor, "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4}
        (root / name / "preprocessor_config.json").write_text(json.dumps(settings))
    write_jsonl(root / "pairs.jsonl", preference_rows(12))
    return root


# --- statistics -----------------------------------------------------------------------------------------------------


@every_architecture
def test_statistics_and_gradients_are_those_of_the_models_own_logits_on_text(name: str) -> None:
    reference = build(name)
    policy = moved(reference)
    pairs = random_pairs(seed=4, count=3, vocab=400, longest=9)
    plain = plain_pair_stats(policy, reference, pairs)
    theirs = gradients(plain_pair_loss("tdpo1", plain, 0.3).sum(), policy)
    layouts = ["padded"] if name in PADDED else ["padded", "tree"]
    assert packer("auto", [policy]) is pack_trees or name in PADDED
    for layout in layouts:
        scores = score_pairs(policy, reference, pairs, objectives.tdpo1(0.3), layout=layout)  # type: ignore[arg-type]
        for column in ("chosen_logratio", "rejected_logratio", "chosen_kl", "rejected_kl"):
            ours, expected = getattr(scores.stats, column), getattr(plain, column)
            assert expected.abs().min() > 1e-3
            assert ((ours - expected).abs() / expected.abs().max()).max() < 2e-5, (layout, column)
        assert_same_gradients(gradients(scores.loss.sum(), policy), theirs, rtol=1e-3)


def test_logits_that_a_model_writes_into_are_seen() -> None:
    """Chameleon sets the logits of its image tokens to the lowest number, in place."""
    vocabulary = {"<image>": 50, **{f"IMGIMG{letter}Z": number for number, letter in enumerate("ABCD")}}
    vq = {"embed_dim": 8, "num_embeddings": 4, "latent_channels": 8, "resolution": 8, "channel_multiplier": [1]}
    config = hf.ChameleonConfig(
        **{**TEXT, "vocab_size": 53}, vq_config={**vq, "base_channels": 32, "num_res_blocks": 1},
        vocabulary_map=vocabulary,
    )  # fmt: skip
    model = hf.ChameleonForConditionalGeneration(config).eval()
    with pytest.raises(UserError, match=r"differ from the model's own logits by 1\.0e"):
        score_pairs(model, model, random_pairs(vocab=50), objectives.dpo(0.1))


@every_architecture
def test_idle_parts_are_what_no_gradient_of_text_reaches(name: str) -> None:
    model = build(name)
    for number, parameter in enumerate(model.parameters()):  # what is frozen by the user is found too, and stays so
        parameter.requires_grad_(number % 3 != 0)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    parts = idle_parts(model)
    assert list(parts) == IDLE[name]
    assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    idle = {id(parameter) for parameters in parts.values() for parameter in parameters}
    model.requires_grad_(True).train()
    ids = torch.tensor([[7, 8, 9, 10, 11, 12, 13, 14, 15]])
    (body_states(model, input_ids=ids) ** 2).sum().backward()
    head = model.get_output_embeddings().weight
    without = {id(p) for p in model.parameters() if p.grad is None and p is not head}
    assert without == idle


def test_a_model_of_text_has_no_idle_parts(model: nn.Module) -> None:
    assert idle_parts(model) == {}


# --- training -------------------------------------------------------------------------------------------------------


def parted(model: Any, name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Copies of the weights outside and inside the idle parts."""
    text, idle = {}, {}
    for key, parameter in model.named_parameters():
        inside = any(key == part or key.startswith(f"{part}.") for part in IDLE[name])
        (idle if inside else text)[key] = parameter.detach().clone()
    return text, idle


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "mistral3", "mllama"])
def test_a_step_moves_every_text_weight_and_no_other(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(name)
    text, idle = parted(model, name)
    args = TDPOConfig(output_dir=str(tmp_path), max_prompt_length=48, gradient_checkpointing=True, **OPTIONS)
    trainer = TDPOTrainer(model, None, args, None, preference_rows(8), None, vision_tokenizer())
    trainer.train()
    text_after, idle_after = parted(model, name)
    assert idle and all(torch.equal(idle[key], idle_after[key]) for key in idle)
    still = [key for key in text if torch.equal(text[key], text_after[key])]
    assert still == []
    (line,) = [record.message for record in caplog.records if "frozen" in record.message]
    assert all(part in line for part in IDLE[name])


def test_a_processor_as_processing_class_gives_its_tokenizer_and_is_saved(tmp_path: Path) -> None:
    processor, plain = gemma_processor(), vision_tokenizer()
    ids = []
    for number, given in enumerate((processor, plain)):
        args = TDPOConfig(output_dir=str(tmp_path / str(number)), max_prompt_length=48, **OPTIONS)
        trainer = TDPOTrainer(build("gemma3"), None, args, None, preference_rows(8), preference_rows(4), given)
        ids.append([(pair.prompt_ids, pair.chosen_ids) for pair in trainer.train_dataset])
        trainer.train()
        assert trainer.evaluate(preference_rows(4))["eval_loss"] > 0
        trainer.save_model()
    assert ids[0] == ids[1]
    saved = hf.AutoProcessor.from_pretrained(tmp_path / "0")
    assert type(saved).__name__ == "Gemma3Processor" and saved.image_seq_length == 4
    assert saved.tokenizer.get_vocab() == plain.get_vocab()
    assert type(hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "0")).__name__.startswith("Gemma3ForCond")


def test_the_sft_trainer_takes_a_processor_and_freezes_too(tmp_path: Path) -> None:
    model = build("gemma3")
    text, idle = parted(model, "gemma3")
    rows = [{"messages": [{"role": "user", "content": "The river"}, {"role": "assistant", "content": " sees it."}]}] * 4
    args = SFTConfig(output_dir=str(tmp_path), **OPTIONS)
    trainer = SFTTrainer(model, args, rows, None, gemma_processor())  # the chat template is the processor's alone
    trainer.train()
    trainer.save_model()
    text_after, idle_after = parted(model, "gemma3")
    assert all(torch.equal(idle[key], idle_after[key]) for key in idle)
    assert not any(torch.equal(text[key], text_after[key]) for key in text)
    assert (tmp_path / "processor_config.json").is_file()


def test_an_object_without_a_tokenizer_is_refused_by_its_name() -> None:
    with pytest.raises(UserError, match="CLIPImageProcessorPil has no tokenizer"):
        tokenizer_of(hf.CLIPImageProcessorPil())


# --- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exclude", [None, ["layers.0.self_attn.q_proj"], r".*layers\.0\.self_attn\.q_proj"])
def test_an_adapter_leaves_the_vision_tower_out(exclude: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """q_proj is the name of layers in both."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], exclude_modules=exclude)
    args = TDPOConfig(output_dir=str(tmp_path), max_prompt_length=48, **OPTIONS)
    trainer = TDPOTrainer(
        build("gemma3"), None, args, None, preference_rows(8), None, gemma_processor(), peft_config=config
    )
    adapted = sorted({name.split(".lora_")[0] for name, _ in trainer.model.named_parameters() if "lora_A" in name})
    layers = ["0.self_attn.q_proj"] * (exclude is None) + [
        "0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"
    ]  # fmt: skip
    assert adapted == [f"base_model.model.model.language_model.layers.{layer}" for layer in layers]
    assert config.exclude_modules in (exclude, {"layers.0.self_attn.q_proj"})
    assert any("model.vision_tower" in r.message and "no adapter" in r.message for r in caplog.records)
    trainer.train()
    trainer.save_model()
    base = build("gemma3")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    ids = torch.tensor([[7, 8, 9, 10]])
    torch.testing.assert_close(loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


def test_an_adapter_without_default_layers_says_what_to_name(tmp_path: Path) -> None:
    args = TDPOConfig(output_dir=str(tmp_path), max_prompt_length=48, **OPTIONS)
    with pytest.raises(UserError, match=r"type qwen2_5_vl; --lora_target_modules"):
        TDPOTrainer(
            build("qwen2_5_vl"), None, args, None, preference_rows(4), None, vision_tokenizer(),
            peft_config=peft.LoraConfig(r=2),
        )  # fmt: skip


# --- by name --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "mistral3", "llama4"])
def test_a_folder_trained_by_name_loads_again_as_it_was(name: str, folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(train_words(folders / name, folders / "pairs.jsonl", out, "--max_steps", 1, "--save_steps", 1)) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == json.loads((folders / name / "config.json").read_text())["architectures"]
    for folder in (out, out / "checkpoint-1"):
        before, after = weights(folders / name), weights(folder)
        assert before.keys() == after.keys()
        apart = {key for key in before if any(word in key for word in ("vis", "projector"))}
        assert {key for key in before if torch.equal(before[key], after[key])} == apart
        for file in folders.joinpath(name).glob("*processor_config.json"):
            assert (folder / file.name).read_text() == file.read_text()
    _, loading_info = hf.AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(loading_info.values())
    if name == "gemma3":
        assert type(hf.AutoProcessor.from_pretrained(out)).__name__ == "Gemma3Processor"


def test_merge_keeps_class_and_processor_and_equals_the_adapter(folders: Path, tmp_path: Path) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    words = train_words(
        folders / "gemma3", folders / "pairs.jsonl", adapter, "--max_steps", 1, "--use_peft",
        "--lora_target_modules", "all-linear", "--reference", "cached",
    )  # fmt: skip
    assert main(words) == 0
    assert main(["merge", "--model_name_or_path", str(adapter), "--output_dir", str(merged)]) == 0
    assert (merged / "processor_config.json").read_text() == (folders / "gemma3/processor_config.json").read_text()
    assert hf.AutoProcessor.from_pretrained(merged).tokenizer.eos_token == END
    before, after = weights(folders / "gemma3"), weights(merged)
    assert before.keys() == after.keys()
    figures = []
    for number, model in enumerate((adapter, merged)):
        file = tmp_path / f"{number}.json"
        words = ["--ref_model_name_or_path", folders / "gemma3", "--dataset_name", folders / "pairs.jsonl"]
        options = ["eval", "--model_name_or_path", model, *words, "--json", file, "--max_length", 96]
        assert main([str(word) for word in [*options, "--max_prompt_length", 48]]) == 0
        figures.append(json.loads(file.read_text()))
    assert figures[0]["kl/chosen"] > 1e-3
    assert figures[0] == pytest.approx(figures[1], rel=1e-4, abs=1e-5)


def test_generation_runs_on_text(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("qwen2_5_vl", "gemma3"):
        words = [
            "generate",
            "--model_name_or_path",
            str(folders / name),
            "--prompt",
            "The river",
            "--max_new_tokens",
            "4",
        ]
        assert main(words) == 0
        assert "The river" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["t5", "bart", "bert", "reward"])
def test_another_kind_of_model_gets_one_message(kind: str, tmp_path: Path) -> None:
    llama = hf.LlamaConfig(**{**TEXT, "tie_word_embeddings": True})
    models = {
        "t5": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        ),
        "bart": lambda: hf.BartForConditionalGeneration(
            hf.BartConfig(
                vocab_size=50,
                d_model=8,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=8,
                decoder_ffn_dim=8,
            )
        ),
        "bert": lambda: hf.BertForMaskedLM(
            hf.BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        ),
        "reward": lambda: hf.LlamaForSequenceClassification(llama),
    }
    model = models[kind]()
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        load_model(ModelConfig(str(tmp_path)))
    assert str(error.value) == f"model {str(tmp_path)!r} is a {type(model).__name__}, not a causal language model"


def test_an_encoder_decoder_is_refused_as_an_object_too() -> None:
    config = hf.BartConfig(
        vocab_size=50, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8,
    )  # fmt: skip
    model = hf.BartForConditionalGeneration(config).eval()
    with pytest.raises(UserError, match="is an encoder-decoder"):
        score_pairs(model, model, random_pairs(), objectives.dpo(0.1))


def test_a_base_model_whose_head_is_tied_still_loads(tmp_path: Path) -> None:
    whole = hf.LlamaForCausalLM(hf.LlamaConfig(**{**TEXT, "tie_word_embeddings": True})).eval()
    whole.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaModel"]
    ids = torch.tensor([[7, 8, 9]])
    loaded = load_model(ModelConfig(str(tmp_path)))
    torch.testing.assert_close(loaded(input_ids=ids).logits, whole(input_ids=ids).logits)


# --- chat templates of processors -----------------------------------------------------------------------------------

PARTS_ONLY = (
    "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_template_that_renders_parts_alone_loses_no_words(tmp_path: Path, folders: Path) -> None:
    """As those of Idefics and LLaVA do: a content that is a text renders as nothing there."""
    shutil.copytree(folders / "qwen2_5_vl", tmp_path / "m")
    (tmp_path / "m/chat_template.json").write_text(json.dumps({"chat_template": PARTS_ONLY}))
    tokenizer = load_tokenizer(ModelConfig(str(tmp_path / "m")))
    tokeniser = Tokeniser(tokenizer)
    (ids,) = tokeniser.prompts([[{"role": "user", "content": "The <image> river"}]])
    assert tokenizer.decode(ids) == f"[user]The <image> river{END}[assistant]"
    assert tokenizer.convert_tokens_to_ids("<image>") not in ids  # the user's text stays text


# --- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_two_processes_with_gradient_checkpointing_train_as_one(name: str, folders: Path, tmp_path: Path) -> None:
    outcomes = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        words = train_words(
            folders / name, folders / "pairs.jsonl", out, "--max_steps", 3, "--gradient_checkpointing", "--optim",
            "sgd", "--per_device_train_batch_size", 4 // processes, "--save_strategy", "no",
        )  # fmt: skip
        completed(words, processes, timeout=240)
        outcomes.append(weights(out))
    one, two = outcomes
    start = weights(folders / name)
    assert max((one[key] - start[key]).abs().max().item() for key in one) > 1e-3
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-5)
