"""One driver, many workers: starting Ray, placing workers, and calling them as groups."""
