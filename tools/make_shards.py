#!/usr/bin/env python
"""Make a data set: shards of pictures and captions in OUT/train and OUT/validation, each with its index.

    python tools/make_shards.py shapes --out data/shapes
    python tools/make_shards.py shapes-edits --out data/shapes-edits
    python tools/make_shards.py emoji --out data/emoji --install
    python tools/make_shards.py folder PATH --out data/mine

Run again with the same parameters it does nothing; the number of workers does not change a byte.
"""

import argparse
import os
from pathlib import Path

from dalle.errors import UserError, run_command


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_shapes(commands.add_parser("shapes", help="coloured shapes with captions; nothing is downloaded"))
    _add_shapes(commands.add_parser("shapes-edits", help="(source, instruction, target) triples of shapes"))
    _add_emoji(commands.add_parser("emoji", help="the Noto Color Emoji font, named by Unicode's CLDR"))
    _add_folder(commands.add_parser("folder", help="your own pictures and captions"))
    return parser.parse_args(arguments)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, help="the folder to write")
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--force", action="store_true",
                        help="replace the shards of a set that was made with other parameters; other files stay")


def _add_shapes(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("--count", type=int, default=30_000, help="training pictures (default 30000)")
    parser.add_argument("--validation", type=int, default=1_000, help="held-out pictures (default 1000)")
    parser.add_argument("--size", type=int, default=64, help="side of a picture in pixels (default 64)")
    parser.add_argument("--max-objects", type=int, default=2, help="one to this many objects, at most 3 (default 2)")
    parser.add_argument("--seed", type=int, default=0)


def _add_emoji(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("--size", type=int, default=64, help="side of a picture in pixels (default 64)")
    parser.add_argument("--font", type=Path, default=None, help="NotoColorEmoji.ttf, if not Debian's")
    parser.add_argument("--annotations", type=Path, default=None, help="CLDR's folder common/, if not Debian's")
    parser.add_argument("--install", action="store_true", help="install missing Debian packages (root only)")


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH",
                        help="a folder of pictures with .txt files beside them (every line is one caption), a table "
                             "(csv, tsv, jsonl, parquet) of paths and captions, parquet files that hold the pictures, "
                             "or a folder with metadata.csv|jsonl|parquet; a column class_id and class sub-folders "
                             "are kept")
    _add_common(parser)
    parser.add_argument("--path-column", default=None, help="the table's column of paths (default: by name)")
    parser.add_argument("--caption-column", default=None, help="the table's column of captions (default: by name)")
    parser.add_argument("--absolute-paths", action="store_true",
                        help="let the table name pictures outside its own folder")
    parser.add_argument("--resize", type=int, default=None, metavar="N",
                        help="shrink pictures so that the shorter side is N, stored as JPEG quality 95 (PNG stays PNG)")
    parser.add_argument("--max-size", type=int, default=None, metavar="N",
                        help="keep a file's own bytes up to this shorter side (default: the value of --resize)")
    parser.add_argument("--validation-fraction", type=float, default=None,
                        help="held out, by hash of the path, at least one picture (default: the folders train, "
                             "validation, test of the source, or else 0.05)")


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.workers < 1 or options.samples_per_shard < 1:
        raise UserError("--workers and --samples-per-shard must be at least 1")
    shared = {"out": options.out, "workers": options.workers, "force": options.force}
    if options.command in ("shapes", "shapes-edits"):
        from dalle.data.shapes.making import ShapesConfig, make_shapes

        make_shapes(ShapesConfig(
            count=options.count, validation=options.validation, size=options.size, seed=options.seed,
            max_objects=options.max_objects, edits=options.command == "shapes-edits",
            samples_per_shard=options.samples_per_shard), **shared)
    elif options.command == "emoji":
        from dalle.data.emoji import EmojiConfig, install_packages, make_emoji

        if options.install:
            install_packages()
        make_emoji(EmojiConfig(size=options.size, samples_per_shard=options.samples_per_shard),
                   font=options.font, annotations=options.annotations, **shared)
    else:
        from dalle.data.folder.entries import FolderConfig
        from dalle.data.folder.making import make_folder

        make_folder(FolderConfig(
            path_column=options.path_column, caption_column=options.caption_column,
            absolute_paths=options.absolute_paths, resize=options.resize, max_size=options.max_size,
            validation_fraction=options.validation_fraction, samples_per_shard=options.samples_per_shard),
            options.path, **shared)


if __name__ == "__main__":
    run_command(main)
