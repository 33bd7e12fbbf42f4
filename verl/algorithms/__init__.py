"""The mathematics: torch and nothing else of weight, so that all of it is tested on a laptop in seconds."""
