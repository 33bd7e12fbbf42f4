"""Export of a checkpoint, also of EasyR1's, as an ordinary Hugging Face folder."""
