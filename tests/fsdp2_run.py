"""One process of a run whose policy is sharded by FSDP2 on CPUs, for ``torchrun fsdp2_run.py options.json``.

Accelerate, asked for FSDP on a CPU, trains with plain data parallelism and does not say so. So the policy is sharded
here, as accelerate does it on GPUs: after the trainer is made, every layer and then the whole, in place.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tdpo import TDPOConfig, TDPOTrainer
from tdpo.models import hidden as hidden_states


def main(options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options["model"])
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    rows, held_out = (
        [json.loads(line) for line in Path(options[name]).read_text().splitlines()] for name in ("data", "held_out")
    )
    args = TDPOConfig(**options["args"])
    trainer = TDPOTrainer(model, None, args, None, rows, held_out, tokenizer)
    mesh = init_device_mesh("cpu", (trainer.accelerator.num_processes,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    trainer.is_distributed_loading_by_transformers = True  # the Trainer then leaves the model as it is
    parameters = list(model.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
    held = sum(parameter.to_local().numel() for parameter in parameters)
    whole = sum(parameter.numel() for parameter in parameters)
    seen: set[str] = set()
    head_of = hidden_states.head_of

    def looked_at(lm: Any) -> Any:
        head = head_of(lm)
        if lm is model:
            seen.add(f"{type(head.weight).__name__} {list(head.weight.shape)}")
        return head

    hidden_states.head_of = looked_at
    trainer.train()
    whole_weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    trainer.is_distributed_loading_by_transformers = False  # only the first process writes, what it is given
    trainer._save(args.output_dir, state_dict=whole_weights)
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_state()
    if trainer.is_world_process_zero():
        told = {"held": held, "whole": whole, "heads": sorted(seen)}
        (Path(options["args"]["output_dir"]) / "sharding.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
