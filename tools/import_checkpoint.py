#!/usr/bin/env python
"""Make a model folder of weights that others published.

    python tools/import_checkpoint.py openai-dvae encoder.pkl decoder.pkl --out models/openai-dvae

`openai-dvae`: DALL-E's discrete VAE as OpenAI published it, two pickles of whole modules (or their state dicts). None
of the code that a pickle names is run. The folder is a codec: `codec: models/openai-dvae` in a transformer's config.
"""

import argparse
from pathlib import Path

from torch import Tensor

from dalle.errors import UserError, run_command
from dalle.models.base import CONFIG_FILE
from dalle.models.dvae import DiscreteVAE, DVAEConfig
from dalle.models.dvae_networks import OpenAINetworkConfig
from dalle.models.foreign import ForeignFileError, read_foreign_state
from dalle.models.quantizers import GumbelConfig
from dalle.words import one_line


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    released = commands.add_parser("openai-dvae", help="DALL-E's discrete VAE: encoder.pkl and decoder.pkl")
    released.add_argument("encoder", type=Path, metavar="ENCODER")
    released.add_argument("decoder", type=Path, metavar="DECODER")
    released.add_argument("--out", required=True, type=Path, help="the folder to write")
    released.add_argument("--image-size", type=int, default=256, help="side of the pictures (default 256)")
    return parser.parse_args(arguments)


def read(path: Path) -> dict[str, Tensor]:
    try:
        return read_foreign_state(path)
    except ForeignFileError as error:
        raise UserError(str(error)) from None


def describe(encoder: dict[str, Tensor], decoder: dict[str, Tensor], image_size: int) -> DVAEConfig:
    """The config that the shapes follow from."""
    blocks = sum(name.startswith("blocks.group_1.block_") and name.endswith(".res_path.conv_1.w") for name in encoder)
    network = OpenAINetworkConfig(hidden=len(encoder["blocks.input.w"]), blocks_per_group=blocks,
                                  decoder_input=len(decoder["blocks.input.w"]))
    codes = GumbelConfig(num_codes=len(encoder["blocks.output.conv.w"]))
    return DVAEConfig(image_size=image_size, network=network, quantizer=codes)


def import_openai_dvae(encoder_file: Path, decoder_file: Path, image_size: int, out: Path) -> DiscreteVAE:
    """Write the codec into ``out`` and return it."""
    if (out / CONFIG_FILE).exists():
        raise UserError(f"{out} holds a model; give another --out")
    encoder, decoder = read(encoder_file), read(decoder_file)
    try:
        model = DiscreteVAE(describe(encoder, decoder, image_size))
        model.load_state_dict({f"{part}.{name}": tensor.float() for part, state in
                               (("encoder", encoder), ("decoder", decoder)) for name, tensor in state.items()})
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = one_line(error)[:200]
        raise UserError(f"{encoder_file} and {decoder_file} are not the encoder and the decoder of DALL-E's discrete "
                        f"VAE: {reason}") from None
    try:
        model.save_pretrained(out)
    except OSError as error:
        raise UserError(f"the model cannot be written into {out}: {error.strerror or error}") from None
    return model


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    model = import_openai_dvae(options.encoder, options.decoder, options.image_size, options.out)
    print(f"{options.out}: {model.num_codes} codes, {model.num_parameters:,} parameters")


if __name__ == "__main__":
    run_command(main)
