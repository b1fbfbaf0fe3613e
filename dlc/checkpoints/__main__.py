"""Say what a checkpoint is: python -m dlc.checkpoints info CHECKPOINT"""
from dlc.checkpoints.weights import info
from dlc.cli import ArgumentParser


def main():
    parser = ArgumentParser("Say what a checkpoint is.", prog="python -m dlc.checkpoints")
    parser.add_argument("command", choices=["info"])
    parser.add_argument("path", help="checkpoint directory, .pt or .safetensors")
    args = parser.parse_args()
    with parser.one_line_errors():
        print("\n".join(info(args.path)))


if __name__ == "__main__":
    main()
