"""RLHF baselines on a policy's own samples: PPO and RLOO, with the same prompts, reward and KL penalty."""
