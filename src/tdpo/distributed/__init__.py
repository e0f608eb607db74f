"""Distributes a run over processes: accelerate, FSDP2 and DeepSpeed, and the commands that start them."""
