"""What names of tensors say about a model, as far as files cannot: which one is the head."""

from __future__ import annotations

import re

HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output|output_layer|proj_out)\.weight$")
"""The output matrix of a language model, which many models tie to the embedding."""
