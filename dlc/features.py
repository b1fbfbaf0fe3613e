"""Describe features, check them, and convert other layouts to them.

python -m dlc.features info FEATURES              what they are, in words; draws FEATURES/codes.png
python -m dlc.features check FEATURES             every shard and value; exit 1 with a list of what is wrong
python -m dlc.features pack OLD NEW --V 256       one .npy per image (the reference scripts' layout) to shards
python -m dlc.features import-hf ID NEW --V 256   a Hugging Face dataset, here or on the hub, to shards
"""

from dlc.data.convert import import_hf, pack
from dlc.data.inspection import print_info, print_problems
from dlc.machine.cli import ArgumentParser, number
from dlc.machine.files import check_apart


def main() -> None:
    parser = ArgumentParser(__doc__, prog="python -m dlc.features")
    tools = parser.add_subparsers(required=True, dest="command", metavar="info|check|pack|import-hf")

    def tool(name, function, help):
        added = tools.add_parser(name, doc=help, help=help)
        added.set_defaults(function=function)
        added.add_argument(
            "--V", type=number(int, 2, 65536), help="set the tokens per code position, for codes without a manifest"
        )
        added.add_argument(
            "--num-classes", type=number(int, 1), help="set the number of classes, if there is no manifest [1000]"
        )
        return added

    tool(
        "info", print_info, "describe features, and draw how their codes use the tokens as FEATURES/codes.png"
    ).add_argument("path", help="features directory")
    tool("check", print_problems, "check every shard and value; exit 1 with a list of problems").add_argument(
        "path", help="features directory"
    )
    packing = tool("pack", pack, "convert one .npy per image, as the reference scripts write them, to shards")
    packing.add_argument("old", help="read this features directory of one .npy per image")
    importing = tool(
        "import-hf",
        import_hf,
        "convert a Hugging Face dataset with the columns features (latents) and labels (codes, or classes) to shards",
    )
    importing.add_argument(
        "dataset",
        help="read this dataset: hub id[@revision], folder that Dataset.save_to_disk wrote, or folder or "
        "file of .parquet",
    )
    importing.add_argument("--split", default="train", help="take this split, if there are several [%(default)s]")
    importing.add_argument(
        "--factor", type=number(int, 1), default=8, help="assume this many pixels per latent cell [%(default)s]"
    )
    for converting, dtype in ((packing, "as they are"), (importing, "float32")):
        converting.add_argument("new", help="write this features directory")
        converting.add_argument(
            "--shard-size", type=number(int, 1), default=1024, help="store this many rows per shard [%(default)s]"
        )
        converting.add_argument("--dtype", choices=["float16", "float32"], help=f"store latents in this type [{dtype}]")
    args = parser.parse_args()
    with parser.one_line_errors():
        if "new" in args:
            check_apart(args.new, "NEW", [vars(args).get("old"), vars(args).get("dataset")])
        args.function(args)


if __name__ == "__main__":
    main()
