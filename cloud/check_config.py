"""`python3 cloud/check_config.py [CONFIG.yaml] [key=value ...]`: prints where the run writes, or says what is wrong.

The scripts call it before they rent anything. Exit codes: 0 fine, 2 wrong, 3 jaxtune's own packages are not installed.
"""

import pathlib
import sys
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # a script: runs from a clone


def main(words: Sequence[str]) -> int:
    """Checks the configuration as `python -m jaxtune.train` would; returns the exit code."""
    try:
        from jaxtune.decode import ConfigError, decode  # pydantic and PyYAML, which a laptop may lack
    except ImportError as error:
        print(f"the configuration is not checked beforehand here ({error}): pip install -e .", file=sys.stderr)
        return 3
    try:
        print(decode(words).output)
    except ConfigError as error:
        print(f"configuration:\n{error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
