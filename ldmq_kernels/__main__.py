"""`ldmq`, also as `python -m ldmq_kernels`: says what to install where the command line's libraries are missing."""

from __future__ import annotations

import sys

from ldmq_kernels import extras


def main() -> None:
    """Run the command line."""
    try:
        with extras.explained("the command ldmq"):
            from ldmq_kernels import cli
    except ModuleNotFoundError as error:
        sys.exit(str(error))
    cli.main()


if __name__ == "__main__":
    main()
