"""python -m dlc.weights: the commands of `dlc.checkpoints`."""

from dlc.checkpoints import main

if __name__ == "__main__":
    main()
