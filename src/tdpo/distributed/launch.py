"""``--accelerate_config``: distributes a run over processes, from a preset or a YAML file of accelerate.

Under a launcher the file's settings become the environment that ``accelerate launch`` would have made of it. Without
one, the command starts itself again under torchrun, one process for each GPU or as many as the file says.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml

from tdpo.config import APPLIED
from tdpo.errors import UserError, nearest

PRESETS = ("ddp", "fsdp2", "zero2", "zero3")
OPTION, PROCESSES = "--accelerate_config", "--num_processes"
KINDS = ("MULTI_GPU", "MULTI_CPU", "NO", "FSDP", "DEEPSPEED")
"""Values of accelerate's ``distributed_type``; the last two have a section in its file, such as ``fsdp_config``."""
VARIABLES = {
    "FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP": "FSDP_TRANSFORMER_CLS_TO_WRAP",
    "DEEPSPEED_CONFIG_FILE": "CONFIG_FILE",
    "ZERO3_INIT_FLAG": "ZERO3_INIT",
}
"""Keys of these sections whose variable has another name."""
KNOWN = (
    "compute_environment", "debug", "distributed_type", "downcast_bf16", "enable_cpu_affinity", "machine_rank",
    "main_training_function", "mixed_precision", "num_machines", "num_processes", "rdzv_backend", "same_network",
    "tpu_env", "tpu_use_cluster", "tpu_use_sudo", "use_cpu", "fsdp_config", "deepspeed_config", "gpu_ids",
)  # fmt: skip
"""Keys of such a file that are honoured here; machines are options of torchrun, not of the file."""


def read_config(name: str) -> dict[str, Any]:
    """Reads the settings of a preset or a file.

    Raises:
        UserError: naming what cannot be read or is not understood.
    """
    if name in PRESETS:
        text = resources.files("tdpo.distributed").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
    else:
        path = Path(name).expanduser()
        if not path.is_file():
            known = ", ".join(PRESETS)
            raise UserError(f"{OPTION} {name}: no such file, nor a preset ({known}).{nearest(name, PRESETS)}")
        text = path.read_text(encoding="utf-8")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{OPTION} {name}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or config.get("distributed_type") not in KINDS:
        raise UserError(f"{OPTION} {name}: distributed_type must be one of {', '.join(KINDS)}")
    unknown = [key for key in config if key not in KNOWN]
    if unknown:
        raise UserError(
            f"{OPTION} {name}: {unknown[0]} is not understood; use accelerate launch with this file instead"
        )
    if config.get("num_machines", 1) != 1:
        raise UserError(f"{OPTION} {name}: num_machines is {config['num_machines']}; start torchrun on every machine")
    return config


def on_cpu(config: Mapping[str, Any]) -> bool:
    """Returns whether such a file asks for CPUs."""
    return bool(config.get("use_cpu")) or config["distributed_type"] == "MULTI_CPU"


def named_gpus(config: Mapping[str, Any]) -> list[str]:
    """Returns the GPUs that such a file names, none where it leaves all of them to the run."""
    named = config.get("gpu_ids", "all")
    devices = named if isinstance(named, list) else str(named).split(",")
    return [word for device in devices if (word := str(device).strip()) not in ("", "all", "None")]


def environment_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the environment variables that ``accelerate launch`` sets for such a file."""
    kind = config["distributed_type"]
    made = {"ACCELERATE_MIXED_PRECISION": config.get("mixed_precision") or "no"}  # an unquoted no is False
    if on_cpu(config):
        made["ACCELERATE_USE_CPU"] = True
    made["CUDA_VISIBLE_DEVICES"] = ",".join(named_gpus(config))
    if kind in ("FSDP", "DEEPSPEED"):
        made[f"ACCELERATE_USE_{kind}"] = True
        prefix = "" if kind == "FSDP" else "ACCELERATE_DEEPSPEED_"
        for key, value in (config.get(f"{kind.lower()}_config") or {}).items():
            made[prefix + VARIABLES.get(key.upper(), key.upper())] = value
    words = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in made.items()}
    return {name: word for name, word in words.items() if word not in ("", "no")}  # what has no value has no variable


def apply(argv: Sequence[str], command: str, check: Callable[[], object]) -> None:
    """Applies ``--accelerate_config`` from a command's words, before options are parsed and models loaded.

    Returns with the environment set, or does not return: the process becomes torchrun's.

    Args:
        argv: The command's words.
        command: Its name.
        check: Parses the words, so that a mistake in them is reported once and not by every process.

    Raises:
        UserError: for a file that is not understood, or an engine that does not run here.
    """
    early = early_options(argv)
    name = early.accelerate_config
    if name is None:
        return
    config = read_config(name)
    launched = "LOCAL_RANK" in os.environ
    if launched:
        os.environ.update(environment_of(config))  # before CUDA is asked for anything, which reads the devices once
    cpu = "--use_cpu" in argv or "--use-cpu" in argv or on_cpu(config) or not torch.cuda.is_available()
    if config["distributed_type"] == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"{OPTION} {name} needs deepspeed: pip install 'tdpo[deepspeed]'")
    devices = 1 if cpu else len(named_gpus(config)) or torch.cuda.device_count()
    processes = early.num_processes or config.get("num_processes") or devices
    if not str(processes).isdecimal() or int(processes) < 1:
        raise UserError(f"{PROCESSES} must be at least 1, got {processes}")
    os.environ[APPLIED] = name
    if not launched:
        try:
            check()
        except BaseException:
            del os.environ[APPLIED]
            raise
    os.environ.update(environment_of(config))
    if config["distributed_type"] == "DEEPSPEED" and cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if launched:
        return
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    sys.stdout.flush()
    os.execv(sys.executable, [*words, "-m", "tdpo", command, *argv])


def early_options(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the options that act before all others are parsed from a command's words; mistakes are reported later."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in (OPTION, PROCESSES):
        parser.add_argument(option, option.replace("_", "-"), nargs="?")
    return parser.parse_known_args(argv)[0]
