"""The lab: trains small, real RLVR experts on an ordinary machine, so that merges can be studied without a GPU.

A base (SmolLM2-135M-Instruct, dequantized from Q4_1) gets a cold start on two answer-only domains, math and code
(`tasks`), then one expert per domain and seed is trained from it by on-policy GRPO (`train`). `measure` scores model
folders on held-out problems without sampling noise. Start each with `python -m rlmerge.lab --help`.

The modules import torch and transformers only where they need them; importing this package loads neither.
"""
