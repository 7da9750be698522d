"""Routers: how tokens, or whole sequences, become logits or a choice of experts; one file each."""
