"""Workers: what runs inside Ray actors, each part usable without Ray."""
