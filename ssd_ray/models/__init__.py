"""Running a Hugging Face causal language model over a slot-addressed KV cache."""
