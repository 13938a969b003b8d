"""The files this project knows: their sizes, checksums, homes, and what each of them is.

A file is known when it has the size and every checksum of a row. Rows with no
checksum describe files that exist but that nobody has published a hash of;
they are listed, and nothing can be mistaken for them. Those of them that lie on
the Hub are identified by where they lie: a download is held to the SHA-256 that
the Hub states for it, and its model to the architecture of the row.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownFile:
    """One published weight file."""

    #: short name, unique, the one the command line takes
    key: str
    #: file name at its home, and the other names it goes by
    names: tuple[str, ...]
    #: one line: which model, which numbers, which form
    what: str
    #: where the publisher keeps it
    home: str
    size: int | None = None
    md5: str | None = None
    sha256: str | None = None
    #: where in its home, a Hub repository, the file lies; None: as the weights of a
    #: repository lie
    hub_path: str | None = None
    #: branch or commit of that repository; None: its main branch
    revision: str | None = None
    #: further files of that folder that converting needs
    beside: tuple[str, ...] = ()
    #: a key of mlx_contentvec.config.PRESETS
    architecture: str = "base"
    #: whose tensor names it has: a key of sources
    form: str = "fairseq"
    #: whether its users bring the waveform to zero mean and unit variance first,
    #: for a file that does not say it itself; None where that is not known
    normalize: bool | None = None

    @property
    def verifiable(self) -> bool:
        """Whether a file can be proven to be this one."""
        return self.md5 is not None or self.sha256 is not None

    @property
    def fetchable(self) -> bool:
        """Whether it can be downloaded: it lies in a repository of the Hub."""
        return self.home.startswith("https://huggingface.co/")

    def is_file(self, size: int, md5: str, sha256: str) -> bool:
        """Whether a file of this size and these checksums is this one."""
        return (
            self.verifiable
            and self.size in (None, size)
            and self.md5 in (None, md5)
            and self.sha256 in (None, sha256)
        )


#: the file the project is about, and the one a nameless download is measured against
CONTENTVEC = KnownFile(
    key="contentvec",
    names=("hubert_base.pt", "checkpoint_best_legacy_500.pt"),
    what="ContentVec-500, RVC's embedder: HuBERT base with a 256-wide projection, fairseq, float16",
    home="https://huggingface.co/lj1995/VoiceConversionWebUI",
    size=189_507_909,
    md5="b76f784c1958d4e535cd0f6151ca35e4",
    sha256="f54b40fd2802423a5643779c4861af1e9ee9c1564dc9d32f54f20b5ffba7db96",
    hub_path="hubert_base.pt",
    normalize=False,
)

KNOWN_FILES: tuple[KnownFile, ...] = (
    CONTENTVEC,
    KnownFile(
        key="contentvec-hf",
        names=("pytorch_model.bin",),
        what="ContentVec-500 as current RVC loads it: Hugging Face folder hubert_base/, float16",
        home="https://huggingface.co/lj1995/VoiceConversionWebUI",
        sha256="cc8c20f4b90a520757260197a3ff2505705a7adbd20ad9eeaa4e1a9b38442ef5",
        hub_path="hubert_base/pytorch_model.bin",
        beside=("config.json", "preprocessor_config.json"),
        form="transformers",
    ),
    KnownFile(
        key="content-vec-best",
        names=("pytorch_model.bin",),
        what="ContentVec-500 as Applio loads it: Hugging Face names and projection, float32",
        home="https://huggingface.co/lengyue233/content-vec-best",
        size=378_342_945,
        sha256="d8dd400e054ddf4e6be75dab5a2549db748cc99e756a097c496c099f65a4854e",
        hub_path="pytorch_model.bin",
        beside=("config.json",),
        form="transformers",
        normalize=False,
    ),
    KnownFile(
        key="chinese-hubert-base",
        names=("chinese_hubert_base.pt", "chinese-hubert-base-fairseq-ckpt.pt"),
        what="Chinese HuBERT base, fairseq, optimizer state kept",
        home="https://huggingface.co/IAHispano/Applio",
        size=1_136_482_241,
        sha256="8cd5db6302ae2e79b5972cd02ae375a42a76170374d6e1952fa78d1fe4e4f756",
        hub_path="Resources/embedders/chinese_hubert_base.pt",
    ),
    KnownFile(
        key="japanese-hubert-base",
        names=("japanese_hubert_base.pt",),
        what="Japanese HuBERT base, fairseq",
        home="https://huggingface.co/IAHispano/Applio",
        size=378_888_853,
        sha256="dade3cf824ae0d214f7de8b73e70bae7c101e81f12d93577c4760bf516db4063",
        hub_path="Resources/embedders/japanese_hubert_base.pt",
    ),
    KnownFile(
        key="korean-hubert-base",
        names=("korean_hubert_base.pt",),
        what="Korean HuBERT base, fairseq (its card says 8 attention heads)",
        home="https://huggingface.co/IAHispano/Applio",
        size=378_876_997,
        sha256="6b42c8453b96b203198c1c280a8821158ea3fa8dbbc2a6220cad1c1489c3e65e",
        hub_path="Resources/embedders/korean_hubert_base.pt",
    ),
    KnownFile(
        key="chinese-hubert-base-hf",
        names=("pytorch_model.bin",),
        what="Chinese HuBERT base as current Applio loads it: Hugging Face folder",
        home="https://huggingface.co/IAHispano/Applio",
        hub_path="Resources/embedders/chinese_hubert_base/pytorch_model.bin",
        beside=("config.json",),
        form="transformers",
        normalize=False,
    ),
    KnownFile(
        key="japanese-hubert-base-hf",
        names=("pytorch_model.bin",),
        what="Japanese HuBERT base as current Applio loads it: Hugging Face folder",
        home="https://huggingface.co/IAHispano/Applio",
        hub_path="Resources/embedders/japanese_hubert_base/pytorch_model.bin",
        beside=("config.json",),
        form="transformers",
        normalize=False,
    ),
    KnownFile(
        key="korean-hubert-base-hf",
        names=("pytorch_model.bin",),
        what="Korean HuBERT base as current Applio loads it: Hugging Face folder",
        home="https://huggingface.co/IAHispano/Applio",
        hub_path="Resources/embedders/korean_hubert_base/pytorch_model.bin",
        beside=("config.json",),
        form="transformers",
        normalize=False,
    ),
    KnownFile(
        key="contentvec-500-original",
        names=("checkpoint_best_legacy_500.pt",),
        what="IBM's ContentVec-500 with Adam state, fairseq, float32, about 1.33 GB",
        home="https://github.com/auspicious3000/contentvec",
        normalize=False,
    ),
    KnownFile(
        key="hubert-base-ls960",
        names=("hubert_base_ls960.pt",),
        what="HuBERT base trained on LibriSpeech, fairseq (not what RVC uses)",
        home="https://github.com/facebookresearch/fairseq/tree/main/examples/hubert",
        normalize=False,
    ),
    KnownFile(
        key="hubert-large-ll60k",
        names=("hubert_large_ll60k.pt",),
        what="HuBERT large, fairseq: layer-norm extractor, normalised input",
        home="https://github.com/facebookresearch/fairseq/tree/main/examples/hubert",
        architecture="large",
        normalize=True,
    ),
    KnownFile(
        key="hubert-xlarge-ll60k",
        names=("hubert_xtralarge_ll60k.pt",),
        what="HuBERT xlarge, fairseq: layer-norm extractor, normalised input",
        home="https://github.com/facebookresearch/fairseq/tree/main/examples/hubert",
        architecture="xlarge",
        normalize=True,
    ),
    KnownFile(
        key="spin",
        names=("pytorch_model.bin",),
        what="Spin: HuBERT base fine-tuned to forget the speaker, Hugging Face names",
        home="https://huggingface.co/IAHispano/Applio",
        hub_path="Resources/embedders/spin/pytorch_model.bin",
        beside=("config.json",),
        form="transformers",
        normalize=False,
    ),
    KnownFile(
        key="spin-v2",
        names=("pytorch_model.bin",),
        what="Spin, second version trained for RVC, Hugging Face names",
        home="https://huggingface.co/IAHispano/Applio",
        hub_path="Resources/embedders/spin-v2/pytorch_model.bin",
        beside=("config.json",),
        form="transformers",
        normalize=False,
    ),
    KnownFile(
        key="mhubert-147",
        names=("model.safetensors", "pytorch_model.bin"),
        what="mHuBERT-147, 147 languages: batch norm before the positional convolution",
        home="https://huggingface.co/utter-project/mHuBERT-147",
        form="transformers",
    ),
    KnownFile(
        key="mlx-contentvec-0.1",
        names=("contentvec_base.safetensors",),
        what="ContentVec-500 as the first mlx-contentvec release kept it, float32, no projection",
        home="https://huggingface.co/lexandstuff/mlx-contentvec",
        hub_path="contentvec_base.safetensors",
        form="first_release",
        normalize=False,
    ),
)


def known_as(size: int, md5: str, sha256: str) -> KnownFile | None:
    """The known file with this size and these checksums."""
    return next((row for row in KNOWN_FILES if row.is_file(size, md5, sha256)), None)


def named(name: str) -> tuple[KnownFile, ...]:
    """The verifiable files that go by this name and no other kind of file does.

    ``pytorch_model.bin`` is what every Hugging Face model is called, so it
    promises nothing; ``hubert_base.pt`` promises ContentVec.
    """
    return tuple(
        row
        for row in KNOWN_FILES
        if row.verifiable and name in row.names and name != "pytorch_model.bin"
    )
