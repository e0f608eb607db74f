"""Options of models: which, how they are loaded, and what is trained of them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tdpo.config.checks import check_used, check_values, documented, option
from tdpo.errors import UserError

DTYPES = Literal["float32", "bfloat16", "float16", "float64", "auto"]
INIT_KWARGS = {
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "attn_implementation": "attn_implementation",
    "revision": "model_revision",
    "trust_remote_code": "trust_remote_code",
}
"""Arguments of ``from_pretrained`` that are fields of :class:`ModelConfig`."""
REFUSED_INIT_KWARGS = {
    "quantization_config": "use --load_in_4bit or --load_in_8bit; in Python load the model with it and pass the model",
    "output_loading_info": "missing weights are always reported",
    "device_map": "leave it out: training places the model on its devices",
}


@documented
@dataclass
class ModelConfig:
    """Model and tokenizer, and options of loading them.

    Attributes:
        model_name_or_path: Model to train or evaluate: a hub name or a folder.
        tokenizer_name_or_path: Tokenizer, where it is not kept with the model: a hub name or a folder.
        model_revision: Branch, tag or commit of a hub model.
        dtype: Dtype of the weights; auto takes the checkpoint's. For mixed precision use --bf16 instead.
        attn_implementation: Attention implementation: eager, sdpa, flex_attention, flash_attention_2; default: the
            model's.
        eos_token: End-of-sequence token to use instead of the tokenizer's own.
        chat_template_path: Chat template to use instead of the tokenizer's own: a Jinja file, or one of chatml, zephyr,
            dialogue.
        trust_remote_code: Allow models and tokenizers that bring Python code of their own to run it.
        model_init_kwargs: Further arguments of from_pretrained for model and reference, as JSON or a YAML mapping.
    """

    model_name_or_path: str
    tokenizer_name_or_path: str | None = None
    model_revision: str = "main"
    dtype: DTYPES = "float32"
    attn_implementation: str | None = None
    eos_token: str | None = None
    chat_template_path: str | None = None
    trust_remote_code: bool = False
    model_init_kwargs: dict[str, Any] | str | None = None

    def __post_init__(self) -> None:
        """Moves arguments in ``model_init_kwargs`` that have a field of their own into it.

        Raises:
            UserError: for an argument that contradicts such a field, or is decided elsewhere.
        """
        given: Any = self.model_init_kwargs
        try:
            given = json.loads(given) if isinstance(given, str) else given
        except ValueError as error:
            raise UserError(f"--model_init_kwargs is not valid JSON: {error}") from error
        if not isinstance(given, dict | None):
            raise UserError("--model_init_kwargs must be a mapping of arguments to values")
        rest = dict(given or {})
        for key, name in INIT_KWARGS.items():
            value = rest.pop(key, None)
            if value is None:
                continue
            value = str(value).removeprefix("torch.") if name == "dtype" else value
            own, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if own not in (default, value):
                raise UserError(f"--{name} {own} and {key} {value} in --model_init_kwargs contradict each other")
            setattr(self, name, value)
        for key in rest:
            if key in REFUSED_INIT_KWARGS:
                raise UserError(f"--model_init_kwargs: {key} cannot be in it; {REFUSED_INIT_KWARGS[key]}")
        if self.dtype not in get_args(DTYPES):
            raise UserError(f"--dtype {self.dtype}: there are {', '.join(get_args(DTYPES))}")
        self.model_init_kwargs = rest or None


@documented
@dataclass
class ReferenceConfig:
    """The model that the policy is compared with.

    Attributes:
        ref_model_name_or_path: Reference model: a hub name or a folder; default: the policy as it is loaded.
    """

    ref_model_name_or_path: str | None = None


@documented
@dataclass
class AdapterOptions:
    """Adapters: train a few new weights instead of the model's, under TRL's names.

    Attributes:
        use_peft: Train a LoRA adapter; the model's weights stay.
        lora_r: Rank of the adapter.
        lora_alpha: Scale of the adapter: its change is times alpha / r.
        lora_dropout: Dropout before the adapter; takes --disable_dropout false.
        lora_target_modules: Names of the layers that get an adapter, one regular expression, or all-linear; default:
            peft's for the model.
        lora_target_parameters: Names of parameters outside linear layers that get an adapter, such as
            mlp.experts.down_proj of a mixture-of-experts model.
        lora_modules_to_save: Modules that are trained and saved whole, lm_head for a trained head.
        lora_task_type: Task the adapter is saved for.
        use_rslora: Rank-stabilised scale: alpha / sqrt(r).
        use_dora: DoRA: magnitude and direction of weights apart.
        load_in_4bit: Keep the model in 4 bits under the adapter (QLoRA); needs bitsandbytes.
        load_in_8bit: Keep the model in 8 bits under the adapter; needs bitsandbytes.
        bnb_4bit_quant_type: Kind of 4-bit numbers.
        bnb_4bit_quant_storage: Dtype that holds the packed 4-bit weights; default: bitsandbytes' uint8. FSDP needs that
            of the other weights.
        use_bnb_nested_quant: Quantise the constants of the 4-bit quantisation too.
    """

    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | None = None
    lora_target_parameters: list[str] | None = None
    lora_modules_to_save: list[str] | None = None
    lora_task_type: str = option("CAUSAL_LM", choices=["CAUSAL_LM"])
    use_rslora: bool = False
    use_dora: bool = False
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: str = option("nf4", choices=["nf4", "fp4"])
    bnb_4bit_quant_storage: str | None = option(None, choices=["uint8", "float16", "bfloat16", "float32"])
    use_bnb_nested_quant: bool = False

    def __post_init__(self) -> None:
        check_values(self, lora_r=1, lora_alpha=1)
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout must be in [0, 1), got {self.lora_dropout}")
        check_used(self, "use_peft", "lora_", "use_rslora", "use_dora")
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("--load_in_4bit and --load_in_8bit contradict each other")
        check_used(self, "load_in_4bit", "bnb_", "use_bnb")

    def peft_config(self) -> Any:
        """Returns the ``peft.LoraConfig`` of these options, None without ``use_peft``."""
        if not self.use_peft:
            return None
        from peft import LoraConfig

        # One text is names with commas, all-linear or a regular expression; peft takes the last two as a text.
        targets: Any = self.lora_target_modules
        if targets and len(targets) == 1 and (targets[0] == "all-linear" or not re.fullmatch(r"[\w.,-]+", targets[0])):
            (targets,) = targets
        else:
            targets = _split_names(targets)
        return LoraConfig(
            task_type=self.lora_task_type,
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=targets,
            target_parameters=_split_names(self.lora_target_parameters),
            modules_to_save=_split_names(self.lora_modules_to_save),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )

    def quantization(self) -> dict[str, Any] | None:
        """Returns the arguments of transformers' ``BitsAndBytesConfig``, None for weights as they are."""
        if self.load_in_8bit:
            return {"load_in_8bit": True}
        if not self.load_in_4bit:
            return None
        nested, storage = self.use_bnb_nested_quant, self.bnb_4bit_quant_storage
        chosen = {"bnb_4bit_quant_type": self.bnb_4bit_quant_type, "bnb_4bit_use_double_quant": nested}
        return {"load_in_4bit": True, **chosen} | ({} if storage is None else {"bnb_4bit_quant_storage": storage})


def _split_names(names: list[str] | None) -> list[str] | None:
    """Splits names that are separated by commas too."""
    return [part for name in names for part in name.split(",")] if names else None
