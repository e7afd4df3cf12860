"""The V4 model: embedding and stems, attention kinds, hyper-connections, experts, multi-token prediction."""
