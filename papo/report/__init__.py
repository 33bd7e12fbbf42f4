"""`papo report`: runs as one HTML page: curves, and samples in which each token shows what it owes to the image."""
