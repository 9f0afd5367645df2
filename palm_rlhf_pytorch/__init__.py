"""RLHF end to end on the PaLM architecture."""

from palm_rlhf_pytorch.palm import PaLM
