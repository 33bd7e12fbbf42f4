"""`papo eval`: models on suites of data sets, and how much of their accuracy comes from the image."""
