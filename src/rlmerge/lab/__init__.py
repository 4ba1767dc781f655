"""The lab: trains small, real experts on an ordinary machine, so that merges can be studied without a GPU.

A base (a Llama of a million parameters from nothing, or SmolLM2-135M) gets a cold start on verifiable tasks; experts
are trained from it by RLVR (`rlvr`, `trl`) or on text (`supervised`: SFT, RFT). `cells` are the pieces of a whole run,
with Fishers, merges and evaluations; `schedule` runs them, `page` shows what came out. The command is `rlmerge lab`.

The modules import torch and transformers only where they need them; importing this package loads neither.
"""
