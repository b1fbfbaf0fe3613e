"""Look at an .npz of samples: python -m dlc.sampling check FILE.npz [--grid]"""

import sys

from dlc.machine.cli import ArgumentParser
from dlc.sampling.pictures import check_npz


def main() -> None:
    about = "Say what an .npz of samples holds and whether anything is wrong with it (exit 1)."
    parser = ArgumentParser(about, prog="python -m dlc.sampling")
    parser.add_argument("command", choices=["check"])
    parser.add_argument("path", help="the .npz")
    parser.add_argument("--grid", action="store_true", help="write a contact sheet of the first images beside the .npz")
    args = parser.parse_args()
    with parser.one_line_errors():
        lines, wrong = check_npz(args.path, args.grid)
    print("\n".join(lines + [f"wrong: {line}" for line in wrong]))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
