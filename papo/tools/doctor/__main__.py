"""`python -m papo.tools.doctor`: as `papo doctor`, where the installation is too broken for `papo` to start."""

from __future__ import annotations

import argparse
import sys

from papo.tools.doctor.command import add_options, doctor

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m papo.tools.doctor")
    add_options(parser)
    try:
        doctor(parser.parse_intermixed_args())
    except ValueError as error:
        sys.exit(f"error: {error}")
