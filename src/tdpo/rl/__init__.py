"""RLHF baselines: PPO and RLOO, with the same prompts, reward and KL penalty."""
