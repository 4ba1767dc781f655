"""Delta packs: made of an expert and its base, unpacked, loaded as a model. The format: `checkpoint.pack`."""
