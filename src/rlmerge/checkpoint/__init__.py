"""Model folders: headers, shards, adapters, Fishers, tokenizers, conversion, and the layout of an output."""
