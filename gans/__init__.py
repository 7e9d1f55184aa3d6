"""The classic text-to-image GANs, and the text encoders that they were built on: one file a system.

A system is one file and one line of ``SYSTEMS``: the names under which commands find it, and its paper. Its file is
imported when it is asked for.
"""

from typing import NamedTuple

from dalle.lookup import LazyTable


class System(NamedTuple):
    """Where a system is: the module, and in it the class of its config, its task and its exported network.

    An encoder of captions that GANs may read by also names its :class:`gans.text.TextEncoder`, one that ranks pictures
    for a caption what loads it: (folder, device) -> :class:`dalle.sampling.rerank.Reranker`.
    """

    module: str
    run: str
    task: str
    model: str
    paper: str                 # arXiv id, or the DOI of one that has none
    paints: bool = True        # False: an encoder that others read
    text_encoder: str | None = None
    ranker: str | None = None


SYSTEMS = {
    "ds_sje": System("gans.ds_sje", "DSSJERun", "DSSJETask", "DSSJE", "1605.05395", paints=False,
                     text_encoder="DSSJETextEncoder"),
    "vse": System("gans.vse", "VSERun", "VSETask", "VSE", "1707.05612", paints=False, text_encoder="VSETextEncoder"),
    "damsm": System("gans.damsm", "DamsmRun", "DamsmTask", "Damsm", "1711.10485", paints=False,
                    text_encoder="DAMSMTextEncoder", ranker="load_reranker"),
    "stream": System("gans.stream", "StreamRun", "StreamTask", "StreamNetwork", "1903.05854", paints=False),
    "gan_int_cls": System("gans.gan_int_cls", "GANINTCLSRun", "GANINTCLSTask", "GANINTCLSGenerator", "1605.05396"),
    "style": System("gans.style", "StyleRun", "StyleTask", "StyleTransfer", "1605.05396"),
    "gawwn_keypoints": System("gans.gawwn_keypoints", "GAWWNKeypointsRun", "GAWWNKeypointsTask",
                              "GAWWNKeypointsGenerator", "1610.02454", paints=False),
    "gawwn": System("gans.gawwn", "GAWWNRun", "GAWWNTask", "GAWWNGenerator", "1610.02454"),
    "acgan": System("gans.acgan", "ACGANRun", "ACGANTask", "ACGANGenerator", "1610.09585"),
    "tacgan": System("gans.tacgan", "TACGANRun", "TACGANTask", "TACGANGenerator", "1703.06412"),
    "stackgan1": System("gans.stackgan1", "StackGAN1Run", "StackGAN1Task", "StackGAN1Generator", "1612.03242"),
    "stackgan2": System("gans.stackgan2", "StackGAN2Run", "StackGAN2Task", "StackGAN2Generator", "1612.03242"),
    "stackgan_v2": System("gans.stackgan_v2", "StackGANv2Run", "StackGANv2Task", "StackGANv2Generator", "1710.10916"),
    "sisgan": System("gans.sisgan", "SISGANRun", "SISGANTask", "SISGANGenerator", "1707.06873"),
    "tagan": System("gans.tagan", "TAGANRun", "TAGANTask", "TAGANGenerator", "1810.11919"),
    "ppgn_encoder": System("gans.ppgn_encoder", "PPGNEncoderRun", "PPGNEncoderTask", "PPGNEncoder", "1612.00005",
                           paints=False),
    "ppgn": System("gans.ppgn", "PPGNRun", "PPGNTask", "PPGNGenerator", "1612.00005"),
    "hdgan": System("gans.hdgan", "HDGANRun", "HDGANTask", "HDGANGenerator", "1802.09178"),
    "fusedgan": System("gans.fusedgan", "FusedGANRun", "FusedGANTask", "FusedGANGenerator", "1801.05551"),
    "ppan": System("gans.ppan", "PPANRun", "PPANTask", "PPANGenerator", "10.1609/aaai.v33i01.33018312"),
    "attngan": System("gans.attngan", "AttnGANRun", "AttnGANTask", "AttnGANGenerator", "1711.10485"),
    "mirrorgan": System("gans.mirrorgan", "MirrorGANRun", "MirrorGANTask", "MirrorGANGenerator", "1903.05854"),
    "controlgan": System("gans.controlgan", "ControlGANRun", "ControlGANTask", "ControlGANGenerator", "1909.07083"),
    "dmgan": System("gans.dmgan", "DMGANRun", "DMGANTask", "DMGANGenerator", "1904.01310"),
    "sdgan": System("gans.sdgan", "SDGANRun", "SDGANTask", "SDGANGenerator", "1904.01480"),
}

NETWORKS = LazyTable({name: (system.module, system.model) for name, system in SYSTEMS.items()})


def register() -> None:
    """Let the commands find the systems by name; called at the start of each."""
    from dalle.store import GENERATORS, RERANKERS
    from dalle.tasks import add_tasks

    add_tasks({name: (system.module, system.run, system.task) for name, system in SYSTEMS.items()})
    GENERATORS.add({name: ("gans.generator", "load_gan") for name, system in SYSTEMS.items() if system.paints})
    RERANKERS.add({name: (system.module, system.ranker) for name, system in SYSTEMS.items() if system.ranker})
