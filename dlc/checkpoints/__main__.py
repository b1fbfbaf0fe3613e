"""Say what a checkpoint is: python -m dlc.checkpoints info CHECKPOINT"""

from dlc.checkpoints.inspection import info
from dlc.cli import ArgumentParser, one_line


def main():
    parser = ArgumentParser("Say what a checkpoint is.", prog="python -m dlc.checkpoints")
    parser.add_argument("command", choices=["info"])
    parser.add_argument("path", help="checkpoint directory, .pt or .safetensors")
    args = parser.parse_args()
    with parser.one_line_errors():
        print("\n".join(one_line(line, 2000) for line in info(args.path)))


if __name__ == "__main__":
    main()
