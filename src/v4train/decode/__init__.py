"""Inference: caches of compressed attention, prefill in chunks, and step-wise decoding."""
