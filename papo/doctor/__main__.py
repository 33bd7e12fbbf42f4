"""`python -m papo.doctor`: the same as `papo doctor`, where the installation is too broken for `papo` to start."""

from __future__ import annotations

import argparse
import sys

from papo.doctor.command import add_options, doctor

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m papo.doctor")
    add_options(parser)
    try:
        doctor(parser.parse_intermixed_args())
    except ValueError as error:
        sys.exit(f"error: {error}")
