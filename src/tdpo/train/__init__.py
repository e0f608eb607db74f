"""Training on the transformers Trainer."""
