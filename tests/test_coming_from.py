"""Habits from elsewhere: the tables of counterparts against the TRL that is installed, pages, recipes."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from conftest import REPOSITORY, write_jsonl
from test_cli import TRAIN_OPTIONS, mistake
from transformers import TrainingArguments

from tdpo import TDPOConfig, TDPOTrainer, counterparts, objectives
from tdpo.cli import main
from tdpo.data.formats import to_records
from tdpo.data.mixture import open_mixture
from tdpo.data.sources import ENTRY_FIELDS
from tdpo.errors import UserError

trl = pytest.importorskip("trl", reason="TRL is not installed; make install brings it (the extra 'bench')")

OURS = {field.name for kind in TRAIN_OPTIONS for field in dataclasses.fields(kind) if field.init}
INHERITED = {field.name for field in dataclasses.fields(TrainingArguments)}
TABLES = {
    "DPO_CONFIG": (
        {field.name for field in dataclasses.fields(trl.DPOConfig)} - INHERITED
        | {name for kind in trl.DPOConfig.__mro__[:2] for name in kind.__annotations__},
        OURS,
    ),
    "MODEL_CONFIG": ({field.name for field in dataclasses.fields(trl.ModelConfig)}, OURS),
    "SCRIPT_ARGUMENTS": ({field.name for field in dataclasses.fields(trl.ScriptArguments)}, OURS),
    "DATASET_MIXTURE_CONFIG": ({field.name for field in dataclasses.fields(trl.DatasetMixtureConfig)}, OURS),
    "DATASET_CONFIG": (
        {field.name for field in dataclasses.fields(trl.scripts.utils.DatasetConfig)},
        set(ENTRY_FIELDS),
    ),
    "TRAINER": (
        set(inspect.signature(trl.DPOTrainer.__init__).parameters) - {"self"},
        set(inspect.signature(TDPOTrainer.__init__).parameters),
    ),
}
RECIPE = """\
# Model arguments
model_name_or_path: {model}
torch_dtype: float32
attn_implementation: sdpa
use_peft: true
lora_r: 4
lora_alpha: 8
lora_dropout: 0.0
lora_target_modules:
- q_proj
- v_proj

# Data arguments
dataset_name: {data}
dataset_train_split: train
dataset_test_split: test
dataset_num_proc: 1
dataset_streaming: false

# Training arguments
bf16: true
beta: 0.05
loss_type:
- sigmoid
learning_rate: 5.0e-6
lr_scheduler_type: cosine
warmup_ratio: 0.1
max_length: 100
max_prompt_length: 48
truncation_mode: keep_end
padding_free: false
precompute_ref_log_probs: true
gradient_accumulation_steps: 2
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
per_device_train_batch_size: 4
per_device_eval_batch_size: 4
num_train_epochs: 1
eval_strategy: steps
eval_steps: 2
logging_steps: 1
max_grad_norm: 1.0
output_dir: {out}
overwrite_output_dir: true
push_to_hub: false
report_to:
- none
save_strategy: "no"
seed: 42
use_cpu: yes
"""


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generator", REPOSITORY / "docs" / "generate_counterparts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("table", TABLES)
def test_every_field_of_trl_has_a_verdict_that_holds(table: str) -> None:
    theirs, ours = TABLES[table]
    entries = counterparts.TABLES[table]
    assert set(entries) == theirs, "TRL has other fields: the table needs a verdict for each"
    for name, entry in entries.items():
        if not entry.option:
            assert name not in ours, f"{name} is there now: its verdict is stale"
            assert entry.note, name
        else:
            assert entry.option in ours, f"{name}: there is no {entry.option}"
            assert entry.option == name or name not in ours or table == "DATASET_CONFIG", f"{name} is there now"


def test_other_spellings_lead_to_options_and_hide_none() -> None:
    for name, entry in counterparts.TABLES["OTHER_SPELLINGS"].items():
        assert name not in OURS, f"{name} is an option: its entry is stale"
        assert entry.option in OURS or (not entry.option and entry.note), name
    for name, entry in counterparts.ENTRY_SPELLINGS.items():
        assert name not in ENTRY_FIELDS, name
        assert entry.option in ENTRY_FIELDS or (not entry.option and entry.note), name


def test_an_objective_with_the_name_of_a_loss_of_trl_needs_a_new_note() -> None:
    text = next(field for field in dataclasses.fields(trl.DPOConfig) if field.name == "loss_type").metadata["help"]
    theirs = set(re.findall(r"`'(\w+)'`", text))
    assert {"sigmoid", "ipo", "robust"} < theirs
    assert theirs & set(objectives.OBJECTIVES) == {"ipo", "robust"}, "the note on loss_type names what is available"


@pytest.mark.parametrize(
    ("page", "lines"),
    {
        "trl": ("| `loss_type` | `objective` |", "| `learning_rate` | `1e-06` | `5e-06` |"),
        "llama-factory": ("| `cutoff_len` | `max_length` |", "| `bf16` | the same |", "| `plot_loss` | - |"),
        "axolotl": ("| `micro_batch_size` | `per_device_train_batch_size` |", "| `seed` | the same |  |"),
    }.items(),
)
def test_a_page_is_as_generated(page: str, lines: tuple[str, ...], generator: ModuleType) -> None:
    text = (REPOSITORY / "docs" / f"coming-from-{page}.md").read_text(encoding="utf-8")
    tables = generator.tables()[f"coming-from-{page}.md"]
    assert text == generator.render(text, tables), "run python docs/generate_counterparts.py"
    assert all(line in text for line in lines)


@pytest.mark.parametrize("library", ["llama-factory", "axolotl"])
def test_the_comments_of_an_example_name_what_the_options_replace(library: str) -> None:
    lines = (REPOSITORY / "examples" / f"from-{library}.yaml").read_text().splitlines()
    found = re.findall(r"^ *(?:- )?(\w+): .*?# (\w+)(?:$|[:;])", "\n".join(lines), re.M)
    assert len(found) >= 7
    for option, theirs in found:
        table = counterparts.ENTRY_SPELLINGS if theirs == "path" else counterparts.OPTIONS
        assert theirs == option or table[theirs].option == option, theirs


USER = {"role": "user", "content": "Q"}
CHAT = {name: [USER, {"role": "assistant", "content": text}] for name, text in {"chosen": "A", "rejected": "B"}.items()}
ANSWER = {name: turns[1] for name, turns in CHAT.items()}
TEXTS = {"chosen": "A", "rejected": "B"}
NAMES = {"chosen": "chosen_response", "rejected": "rejected_response"}
AXOLOTL = {
    "argilla": ({"instruction": "Q", "chosen_response": "A", "rejected_response": "B"}, NAMES),
    "argilla_chat": (CHAT, {}),
    "icr": ({"input": "Q", **TEXTS}, {}),
    "intel": ({"question": "Q", **TEXTS}, {}),
    "prompt_pairs": ({"prompt": "Q", **TEXTS}, {"question": "prompt"}),
    "prompt_pairs, system": ({"system": "", "prompt": "Q", **TEXTS}, {}),
    "ultra": ({"prompt": "Q", **CHAT}, {}),
    "nectar": ({"prompt": [USER], "answers": [{"answer": "B", "rank": 2}, {"answer": "A", "rank": 1}]}, {}),
    "default": ({"messages": [USER], **ANSWER}, {}),
    "default, other column": ({"conversation": [USER], **ANSWER}, {}),
}


@pytest.mark.parametrize("kind", AXOLOTL)
def test_rows_of_axolotl_become_the_same_pair(kind: str, tmp_path: Path) -> None:
    row, columns = AXOLOTL[kind]
    write_jsonl(tmp_path / "pairs.jsonl", [row])
    (record,), _ = to_records(open_mixture([{"name": str(tmp_path / "pairs.jsonl"), "columns": columns}], "train", 0))
    assert record.prompt == [USER] and record.chosen == CHAT["chosen"][1:] and record.rejected == CHAT["rejected"][1:]


def test_the_example_has_the_defaults_of_trl(generator: ModuleType) -> None:
    example = yaml.safe_load((REPOSITORY / "examples" / "trl-defaults.yaml").read_text())
    theirs, ours = generator.defaults([trl.DPOConfig]), generator.defaults([TDPOConfig])
    assert example.pop("objective") == "dpo"
    for name, value in example.items():
        assert float(value) == theirs[name] != ours[name], name


def test_arguments_of_dpo_config_are_refused_by_name_all_at_once() -> None:
    with pytest.raises(UserError) as raised:
        TDPOConfig(output_dir="o", loss_type="sigmoid", ld_alpha=0.5, bta=1, padding_free=True)
    lines = str(raised.value).splitlines()
    starts = (
        "TDPOConfig has no 'loss_type'. Use 'objective': `sigmoid` is `dpo`",
        "TDPOConfig has no 'ld_alpha'. Use 'token_weights': `ld:0.5` for 0.5.",
        "TDPOConfig has no 'bta'. Did you mean 'beta'?",
        "TDPOConfig has no 'padding_free'. Use 'layout'",
    )
    assert len(lines) == 4 and all(line.startswith(start) for line, start in zip(lines, starts, strict=True))


def test_a_config_with_an_init_of_its_own_takes_what_that_takes() -> None:
    class Own(TDPOConfig):
        def __init__(self, loss_type: str, **rest: object) -> None:
            super().__init__(**rest)
            self.loss_type = loss_type

    assert Own(loss_type="mine", output_dir="o").loss_type == "mine"


def test_a_recipe_of_trl_trains_once_what_is_listed_is_changed(
    capsys: pytest.CaptureFixture, tmp_path: Path, pairs_file: Path, model_folder: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = RECIPE.format(model=model_folder, data=pairs_file, out=tmp_path / "out")
    recipe.write_text(text)
    output = mistake(capsys, "train", "--config", recipe)
    changes = {
        "torch_dtype: float32": ("dtype", "dtype: float32"),
        "loss_type:\n- sigmoid": ("objective", "objective: dpo"),
        "warmup_ratio: 0.1": ("warmup_steps", "warmup_steps: 0.1"),
        "precompute_ref_log_probs: true": ("reference_cache", f"reference_cache: {tmp_path / 'cache'}"),
        "padding_free: false": ("layout", "layout: auto"),
        "dataset_streaming: false": ("leave it out", ""),
    }
    lines = output.splitlines()
    assert lines[0].endswith(f"{recipe}: {len(changes)} mistakes") and len(lines) == 1 + len(changes)
    for old, (named, new) in changes.items():
        line = next(line for line in lines if f"'{old.partition(':')[0]}'" in line)
        assert named in line
        text = text.replace(old, new)
    recipe.write_text(text)
    output = mistake(capsys, "train", "--config", recipe)
    assert "eval_dataset" in output
    recipe.write_text(text + f"eval_dataset_name: {pairs_file}\n")
    assert main(["train", "--config", str(recipe)]) == 0
    output = capsys.readouterr().out
    assert "objective dpo(beta=0.05)" in output and "24 kept" in output
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_the_script_of_trl_runs_with_two_names_changed(tmp_path: Path, pairs_file: Path, model_folder: Path) -> None:
    made: list[TDPOTrainer] = []

    class Trainer(TDPOTrainer):
        def __init__(self, quantization_config: None, **arguments: object) -> None:  # the script passes None
            super().__init__(**arguments)
            made.append(self)

    script = Path(trl.__file__).with_name("scripts").joinpath("dpo.py").read_text()
    changed = script.replace("DPOConfig", "TDPOConfig").replace("DPOTrainer", "TDPOTrainer")
    names = {"__name__": "script", "TDPOConfig": TDPOConfig, "TDPOTrainer": Trainer}
    changed = re.sub(r"from trl import (.*)TDPO(?:Config|Trainer), ", r"from trl import \1", changed)
    exec(compile(changed, "dpo.py", "exec"), names)
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(pairs_file.read_text())
    words = [
        "--dataset_name", folder, "--model_name_or_path", model_folder, "--output_dir", tmp_path / "out",
        "--learning_rate", "5.0e-3", "--max_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2",
        "--remove_unused_columns", "false", "--use_peft", "--lora_r", "4", "--lora_alpha", "8", "--lora_dropout", "0",
        "--model_init_kwargs", '{"rms_norm_eps": 0.25}', "--attn_implementation", "sdpa", "--objective", "dpo",
        "--max_length", "96", "--max_prompt_length", "48", "--use_cpu", "--disable_tqdm", "true", "--save_strategy",
        "no",
    ]  # fmt: skip
    parser = trl.TrlParser((trl.ScriptArguments, TDPOConfig, trl.ModelConfig, trl.DatasetMixtureConfig))
    parsed = parser.parse_args_and_config([str(word) for word in words])
    names["main"](*parsed)
    first, last = made[0].state.log_history[0], made[0].state.log_history[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6), "the adapter is new"
    assert first["kl/chosen"] == 0 and "train_loss" in last
    assert any("eval_rewards/accuracies" in log for log in made[0].state.log_history)
    assert made[0].model.config.rms_norm_eps == 0.25 and made[0].model.config._attn_implementation == "sdpa"
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4


def test_options_without_a_mistake_do_not_load_the_tables_of_other_libraries():
    """They are long, and nothing but a message or a page needs them."""
    code = "import sys, tdpo.commands.train, tdpo.commands.sft; assert 'tdpo.counterparts' not in sys.modules"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
