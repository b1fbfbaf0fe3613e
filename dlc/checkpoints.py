"""Describe weights in any layout, and write them in others.

python -m dlc.checkpoints info PATH                            model, layout, EMA or raw, step, training settings
python -m dlc.checkpoints export PATH OUT --format diffusers   a pipeline folder, or .safetensors, and a model card
python -m dlc.checkpoints ema RUN --length 0.07 --out OUT      the EMA of any length, of a run with --ema-lengths
"""

from dlc.machine.cli import ArgumentParser, number, one_line
from dlc.weights.export import FORMATS, export
from dlc.weights.foreign.dits import DIFFUSERS_TIMES
from dlc.weights.info import info
from dlc.weights.power_ema import LENGTH, rebuild


def main() -> None:
    parser = ArgumentParser(__doc__, prog="python -m dlc.checkpoints")
    tools = parser.add_subparsers(required=True, dest="command", metavar="info|export|ema")

    def tool(name, function, help):
        added = tools.add_parser(name, doc=help, help=help)
        added.set_defaults(function=function)
        added.add_argument("checkpoint", help="read this file, folder or hub id, in any layout of docs/weights.md")
        added.add_argument(
            "--diffusers-time",
            choices=DIFFUSERS_TIMES,
            help="with weights in diffusers' layout: treat them as converted from DiT, or as trained in diffusers "
            "[what the folder says, else dit]",
        )
        return added

    tool("info", lambda args: info(args.checkpoint, args.diffusers_time), "describe weights in words")
    add = tool("export", export, "write weights and a model card to a new folder").add_argument
    add("out", help="write this folder, which must not exist")
    add(
        "--format",
        choices=FORMATS,
        required=True,
        help="write model.safetensors and config.json, or a pipeline folder of diffusers with a file of code",
    )
    add("--no-ema", dest="ema", action="store_false", help="write the raw weights instead of the EMA weights [no]")
    add(
        "--vae",
        help="put this VAE into the pipeline: ema, mse, a local directory or a hub id [the checkpoint's, or ema]",
    )
    add("--license", help="state this licence in the model card, as the hub names it [unknown]")
    averages = tools.add_parser("ema", doc="rebuild an EMA of another length", help="rebuild an EMA of another length")
    averages.set_defaults(function=rebuild)
    add = averages.add_argument
    add("run", help="read the results folder of this run, which was trained with --ema-lengths")
    add("--length", type=LENGTH, required=True, help="make an EMA of this length, a share of the training")
    add(
        "--at",
        type=number(int, 1),
        metavar="IMAGES",
        help="take the EMA at the last snapshot up to this image [the last of all]",
    )
    add("--out", required=True, help="write this folder, for --ckpt; it must not exist")
    args = parser.parse_args()
    with parser.one_line_errors():
        print("\n".join(one_line(line, 2000) for line in args.function(args)))


if __name__ == "__main__":
    main()
