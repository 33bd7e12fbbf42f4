"""From a run's checkpoint, or one of EasyR1's, to an ordinary Hugging Face folder."""
