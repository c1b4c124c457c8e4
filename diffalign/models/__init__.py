"""Model families on top of diffusers pipelines: one file per family, shared pieces in the files with an underscore.

A family file holds only what differs: the pipeline class, how prompts are encoded, the forward call with its
conditioning, the LoRA targets and a tiny twin with random weights. `build("model", spec).load()` gives a `Model`.
"""
