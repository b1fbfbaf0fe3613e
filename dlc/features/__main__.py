"""Look at features, check them, and convert other layouts to them.

    python -m dlc.features info FEATURES              what they are, in words; FEATURES/codes.png
    python -m dlc.features check FEATURES             every shard and value; exit 1 with a list of what is wrong
    python -m dlc.features pack OLD NEW --V 256       one .npy per image (the reference scripts' layout) into shards
    python -m dlc.features import-hf DIR NEW --V 256  a Hugging Face dataset saved to disk into shards
"""
from dlc.cli import ArgumentParser, number
from dlc.features.convert import import_hf, pack
from dlc.features.inspection import check, info


def main():
    parser = ArgumentParser(__doc__, prog="python -m dlc.features")
    tools = parser.add_subparsers(required=True, dest="command", metavar="info|check|pack|import-hf")

    def tool(function, name, help):
        one = tools.add_parser(name, doc=help, help=help)
        one.set_defaults(function=function)
        one.add_argument("--V", type=number(int, 2, 65536),
                         help="tokens per code position: needed where there are codes and no manifest")
        one.add_argument("--num-classes", type=number(int, 1), help="classes, where there is no manifest [1000]")
        return one

    for function, help in ((info, "say what features are, and draw how their codes use the tokens, FEATURES/codes.png"),
                           (check, "look at every shard and value; exit 1 with a list of what is wrong")):
        tool(function, function.__name__, help).add_argument("path", help="features directory")
    one = tool(pack, "pack", "one .npy per image, as the reference scripts write them, into shards")
    two = tool(import_hf, "import-hf", "a Hugging Face dataset saved to disk, columns features (latents) and labels "
                                       "(codes, or classes), into shards")
    one.add_argument("old", help="features directory of one .npy per image")
    two.add_argument("directory", help="what Dataset.save_to_disk wrote")
    two.add_argument("--split", default="train", help="of a dataset that has several [%(default)s]")
    two.add_argument("--factor", type=number(int, 1), default=8, help="pixels per latent cell [%(default)s]")
    for packing, dtype in ((one, "as they are"), (two, "float32")):
        packing.add_argument("new", help="features directory to write")
        packing.add_argument("--shard-size", type=number(int, 1), default=1024, help="rows a shard [%(default)s]")
        packing.add_argument("--dtype", choices=["float16", "float32"], help=f"of the stored latents [{dtype}]")
    args = parser.parse_args()
    with parser.one_line_errors():
        args.function(args)


if __name__ == "__main__":
    main()
