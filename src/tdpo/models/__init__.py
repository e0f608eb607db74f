"""Policy and reference: from token ids to hidden states."""
