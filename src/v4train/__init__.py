"""v4train: pre-training of DeepSeek-V4-class sparse multimodal models with JAX."""
