"""Files in and out: Hugging Face, GGUF and PEFT formats, and the checkpoints of a run."""
