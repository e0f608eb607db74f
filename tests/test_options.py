"""Options as people write them: YAML's own notation, every spelling of argparse, and all mistakes at once."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from test_cli import TRAIN_OPTIONS, mistake, train

from tdpo.commands.options import parse
from tdpo.config import AdapterOptions, EvalDataConfig, ModelConfig, ReferenceConfig, SFTConfig, TDPOConfig
from tdpo.data.formats import FORMATS
from tdpo.data.sft import SFT_FORMATS
from tdpo.data.templates import TEMPLATES
from tdpo.demo.run import DemoOptions
from tdpo.errors import UserError
from tdpo.evaluate.generate import Sampling

NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", "--use_cpu"]


def parsed(*words: str) -> dict[str, Any]:
    """All options of ``tdpo train`` by name; what several dataclasses have is the first's."""
    options = parse("train", TRAIN_OPTIONS, [*NEEDED, *words])
    return {name: value for part in reversed(options) for name, value in vars(part).items()}


def from_file(folder: Path, text: str) -> dict[str, Any]:
    (folder / "run.yaml").write_text(text)
    return parsed("--config", str(folder / "run.yaml"))


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate: 5e-6", "learning_rate", 5e-6),  # a string in YAML 1.1
        ("learning_rate: '3e-7'", "learning_rate", 3e-7),
        ("adam_epsilon: 1E-9", "adam_epsilon", 1e-9),
        ("max_steps: 1_000", "max_steps", 1000),
        ("seed: 010", "seed", 10),  # octal in YAML 1.1
        ("max_time: 1:30", "max_time", None),  # base 60 in YAML 1.1; here a text, and a mistake
        ("bf16: True", "bf16", True),
        ("logging_first_step: off", "logging_first_step", False),
        ("gradient_checkpointing: on", "gradient_checkpointing", True),
        ("eval_strategy: no", "eval_strategy", "no"),
        ("eval_strategy: False", "eval_strategy", "no"),
        ("save_strategy: off", "save_strategy", "no"),
        ("report_to: none", "report_to", []),
        ("report_to: []", "report_to", []),
        ("report_to: null", "report_to", []),
        ("model_revision: 1.10", "model_revision", "1.10"),  # not 1.1
        ("run_name: 2024-05-01", "run_name", "2024-05-01"),
        ("run_name: two words", "run_name", "two words"),
        ("lr_scheduler_kwargs: {min_lr: 1e-7, n: 2}", "lr_scheduler_kwargs", {"min_lr": 1e-7, "n": 2}),
        ("model_init_kwargs: {a: false, b: -1e+5}", "model_init_kwargs", {"a": False, "b": -1e5}),
        ("lora_target_modules: [q_proj, v_proj]\nuse_peft: yes", "lora_target_modules", ["q_proj", "v_proj"]),
        ("optim_target_modules: all-linear", "optim_target_modules", "all-linear"),
        ("optim_target_modules: [attn, mlp]", "optim_target_modules", ["attn", "mlp"]),
        ("common: &a 0.3\nbeta: *a", "beta", None),  # `common` is no option
        ("<<: {beta: 0.2, seed: 1}\nbeta: 0.7", "beta", 0.7),
    ],
)  # fmt: skip
def test_a_value_means_in_a_file_what_it_means_on_the_command_line(
    tmp_path: Path, line: str, name: str, value: Any
) -> None:
    if value is None:
        with pytest.raises(UserError):
            from_file(tmp_path, line)
        return
    found = from_file(tmp_path, line)[name]
    assert found == value and type(getattr(found, "value", found)) is type(value)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--bf16"], "bf16", True),
        (["--bf16", "false"], "bf16", False),
        (["--bf16=True"], "bf16", True),
        (["--no_logging_first_step"], "logging_first_step", False),
        (["--no-logging-first-step"], "logging_first_step", False),
        (["--no_remove_unused_columns"], "remove_unused_columns", False),  # TRL's own example has it
        (["--bf16", "--no_bf16"], "bf16", False),
        (["--no_gradient_checkpointing"], "gradient_checkpointing", False),
        (["--gradient-checkpointing"], "gradient_checkpointing", True),
        (["--learning-rate", "1e-7"], "learning_rate", 1e-7),
        (["--run_name", "-- two words"], "run_name", "-- two words"),
        (["--save_total_limit", "none"], "save_total_limit", None),
        (["--seed", "-5"], "seed", -5),
        (["--save_total_limit", "3"], "save_total_limit", 3),
        (["--ref_model_name_or_path", "None"], "ref_model_name_or_path", None),  # no model of that name, no folder
        (["--reference_cache=null"], "reference_cache", None),
        (["--lr_scheduler_kwargs", "none"], "lr_scheduler_kwargs", None),
        (["--report_to", "none"], "report_to", []),
        (["--liger_kernel_config", '{"rope": false}'], "liger_kernel_config", {"rope": False}),
    ],
)
def test_spellings_of_the_command_line(words: list[str], name: str, value: Any) -> None:
    assert parsed(*words)[name] == value


def test_what_a_file_has_wrong_is_listed_at_once(tmp_path: Path) -> None:
    text = (
        "torch_dtype: bfloat16\nlerning_rate: 1e-6\nbeta: 0.3\nmax_steps: [3, 4]\nseed: null\n"
        "per_device_train_batch_size: {all: 2}\ndatasets: {a.jsonl: 1.0}\nld_alpha: 0.5\nnonsuch_thing: 1\n"
    )
    with pytest.raises(UserError) as raised:
        from_file(tmp_path, text)
    first, *lines = str(raised.value).splitlines()
    assert first == f"--config {tmp_path / 'run.yaml'}: 8 mistakes"
    assert lines == [
        "  unknown key 'torch_dtype'. Use 'dtype'.",
        "  unknown key 'lerning_rate'. Did you mean 'learning_rate'?",
        "  'max_steps': expected one value, found a list of 2",
        "  'seed': no value; give one, or leave the key out for the default, 42",
        "  'per_device_train_batch_size': expected one value, found a mapping",
        "  'datasets': expected a list, found a mapping",
        "  unknown key 'ld_alpha'. Use 'token_weights': `ld:0.5` for 0.5.",
        "  unknown key 'nonsuch_thing'.",
    ]


def test_unknown_options_of_the_command_line_are_listed_with_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("bta: 1\n")
    words = ["--config", str(file), "--lr", "1e-6", "--epochs=3", "--learning-rat", "1", "--learn", "1", "-lr", "2"]
    with pytest.raises(UserError) as raised:
        parsed(*words)
    assert str(raised.value).splitlines() == [
        f"--config {file}: unknown key 'bta'. Did you mean 'beta'?",
        "command line: 5 mistakes",
        "  unknown option --lr. Use 'learning_rate'.",
        "  unknown option --epochs. Use 'num_train_epochs'.",
        "  unknown option --learning-rat. Did you mean 'learning_rate'?",
        "  unknown option --learn.",
        "  unknown option -lr. Use 'learning_rate'.",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: 0.1\nseed: 1\n\nbeta: 0.2\n", "'beta' stands twice, in line 1 and in line 4"),
        ("datasets:\n- name: a\n  weight: 1\n  name: b\n", "'name' stands twice, in line 2 and in line 4"),
        ("a: 1\n'a': 2\nb: 1\nb: 2\n", "'a' stands twice, in line 1 and in line 2; 'b' stands twice, in line 3"),
        ("beta: 1\n---\nbeta: 2\n", "not valid YAML"),
        ("beta: !!python/name:os.system\n", "could not convert|invalid float"),
        ("columns: !!python/object:os.x {a: 1}\n", "not valid YAML"),
        ("columns: &c {a: *c}\n", "not valid YAML"),
    ],
)
def test_a_file_that_says_two_things_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_file(tmp_path, text)


def test_foreign_fields_of_a_mixture_on_the_command_line_are_named() -> None:
    from tdpo.data.mixture import parse_entry

    with pytest.raises(UserError, match=r"entry 1: unknown field 'path'\. Use 'name'"):
        parse_entry('{"path": "a.jsonl"}', 1)


def test_options_that_act_early_are_found_in_every_spelling() -> None:
    from tdpo.distributed.launch import early_options

    for words in (["--accelerate-config", "ddp"], ["--accelerate_config=ddp"], ["--accelerate-config=ddp"]):
        assert early_options(["--beta", "1", *words]).accelerate_config == "ddp"


def test_the_command_of_trl_is_named(capsys: pytest.CaptureFixture) -> None:
    assert "Use 'train --objective dpo'." in mistake(capsys, "dpo", "--beta", 1)


def test_foreign_fields_of_a_mixture_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        from_file(tmp_path, "datasets:\n- {path: a.jsonl, fraction: 0.5}\n- {name: b.jsonl, wieght: 2}\n")
    output = str(raised.value)
    assert "'datasets', entry 1: unknown field 'path'. Use 'name'" in output
    assert "'datasets', entry 1: unknown field 'fraction'. Use 'weight'" in output
    assert "'datasets', entry 2: unknown field 'wieght'. Did you mean 'weight'?" in output


@pytest.mark.parametrize(
    ("line", "adapted"),
    [
        ("[q_proj, v_proj]", 4),
        ("q_proj", 2),
        ("q_proj,v_proj", 4),  # as LLaMA-Factory has it
        ("all-linear", 14),
        (r"'.*\.1\..*(q|k|v)_proj'", 3),  # one text is a regular expression to peft
    ],
)
def test_target_modules_of_an_adapter(tmp_path: Path, line: str, adapted: int) -> None:
    from peft import get_peft_model

    (tmp_path / "run.yaml").write_text(f"use_peft: true\nlora_target_modules: {line}\n")
    options = parse("train", TRAIN_OPTIONS, [*NEEDED, "--config", str(tmp_path / "run.yaml")])
    model = get_peft_model(make_model(100), options[-3].peft_config())
    assert sum(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters()) == adapted


def test_init_kwargs_reach_the_model_and_refuse_what_has_an_option(
    capsys: pytest.CaptureFixture, tmp_path: Path, pairs_file: Path, model_folder: Path
) -> None:
    from tdpo.config import ModelConfig
    from tdpo.models.load import load_model

    loaded = load_model(ModelConfig(str(model_folder), model_init_kwargs='{"rms_norm_eps": 0.25}'))
    assert loaded.config.rms_norm_eps == 0.25 and loaded.model.norm.variance_epsilon == 0.25
    config = ModelConfig("m", model_init_kwargs={"torch_dtype": torch.bfloat16, "revision": "v2", "use_cache": False})
    assert (config.dtype, config.model_revision, config.model_init_kwargs) == ("bfloat16", "v2", {"use_cache": False})
    with pytest.raises(UserError, match="--dtype float16 and dtype bfloat16 in --model_init_kwargs contradict"):
        ModelConfig("m", dtype="float16", model_init_kwargs={"dtype": "bfloat16"})
    capsys.readouterr()
    for content, message in (
        ('{"dtype": "int8"}', "--dtype int8: there are float32, bfloat16"),
        ('{"device_map": "auto"}', "device_map cannot be in it"),
        ("{", "not valid JSON"),
        ("[1]", "must be a mapping"),
        ('{"nonsense": 1}', "unexpected keyword argument 'nonsense'"),
    ):
        words = train(model_folder, pairs_file, tmp_path / "out", f"--model_init_kwargs={content}")
        assert message in mistake(capsys, *words)


def test_importing_the_options_imports_no_other_stage() -> None:
    code = "import sys, tdpo.config; print(*sorted({m.split('.')[1] for m in sys.modules if m.startswith('tdpo.')}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["config", "errors", "loading", "objectives", "types"]


@pytest.mark.parametrize(
    "kind", [ModelConfig, ReferenceConfig, AdapterOptions, EvalDataConfig, TDPOConfig, SFTConfig, Sampling, DemoOptions]
)
def test_every_field_has_a_help_text_and_docstrings_name_no_other(kind: Any) -> None:
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    assert all(field.metadata.get("help") for field in fields.values())
    for owner in [owner for owner in kind.__mro__ if owner.__module__.startswith("tdpo.")]:
        for name, line in re.findall(r"^        (\w+): (.*)", owner.__doc__.partition("Attributes:")[2], re.M):
            assert name in owner.__annotations__, f"{owner.__name__} documents {name}, which is no field of its own"
            assert owner.__dataclass_fields__[name].metadata["help"].startswith(line)


def test_help_names_every_format_and_template() -> None:
    fields = TDPOConfig.__dataclass_fields__ | ModelConfig.__dataclass_fields__
    for name in (*FORMATS, *SFT_FORMATS):
        assert re.search(rf"\b{name}\b", fields["dataset_format"].metadata["help"]), name
    for name in TEMPLATES:
        assert re.search(rf"\b{name}\b", fields["chat_template_path"].metadata["help"]), name
