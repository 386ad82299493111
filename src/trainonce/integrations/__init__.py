"""Lightning, Hugging Face and torchtitan."""
