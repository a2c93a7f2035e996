"""What export found, as a manifest says it, for people. Bundles run without it:
everything has a default, and None means that the manifest does not say.
"""

from __future__ import annotations

from msgspec import Struct, field


class OutputCheck(Struct, frozen=True):
    """An output of the file compared with torch's; the last with torch reading the keys that the file selected."""

    error_relative_to_range: float | None = None
    least_row_cosine: float | None = None
    error_with_equal_selection: float | None = None


class Check(Struct, frozen=True):
    """The file checked against PyTorch.

    Attributes:
        outputs: the worst of all runs.
        selected_indices, differing_indices: keys in all layers and runs, and how many of them differ from torch's.
        differing_tokens: final patches that torch kept and the file did not, where tokens are pruned.
        batches_run: batch sizes.
        kernels_run: what ran the operators: "portable", and "native" where the library was built.
    """

    outputs: dict[str, OutputCheck] = {}
    selected_indices: int = 0
    differing_indices: int = 0
    differing_tokens: int = 0
    batches_run: tuple[int, ...] = ()
    kernels_run: tuple[str, ...] = ()


class Tiling(Struct, frozen=True):
    """Consecutive patches that share one key list (tile), and whose mean query selects it (probe); background cells."""

    tile: int | None = None
    probe: int | None = None
    cells: int | None = None


class Retiled(Struct, frozen=True):
    """Another layout than the student's own. cosine: mean of the final tokens to those before, over `images`.
    refused: why a board's GPU did not get the tile that suits it.
    """

    before: Tiling = field(name="from", default=Tiling())
    after: Tiling = field(name="to", default=Tiling())
    cosine: float | None = None
    images: int = 0
    refused: str | None = None


class LayerChoice(Struct, frozen=True):
    """Layers of equal sizes: medians of one's attention, at batch 1, and whether they were kept dense."""

    layers: tuple[int, ...] = ()
    sparse_ms: float | None = None
    dense_ms: float | None = None
    kept_dense: bool = False


class Measured(Struct, frozen=True):
    """Where sparse attention pays on the machine that exported. kernels: what ran it. backend, precision: in which."""

    kernels: str | None = None
    choices: tuple[LayerChoice, ...] = ()
    sparse_layers_left: int | None = None
    backend: str = "onnxruntime"
    precision: str = "auto"


class Quantisation(Struct, frozen=True):
    """int8 linear layers.

    Attributes:
        recipe: what will run the file.
        cosines: per output, mean row cosine to the float32 file over held-out images; where tokens merge, with the
            float32 file's matches.
        own_matches_cosines: the same with its own matches; empty where no tokens merge.
        quantised, kept: linear layers in int8; names of those left in float32.
        calibrated, held_out: numbers of images.
        method: in words.
    """

    recipe: str | None = None
    cosines: dict[str, float] = {}
    own_matches_cosines: dict[str, float] = {}
    quantised: int = 0
    kept: tuple[str, ...] = ()
    calibrated: int = 0
    held_out: int = 0
    method: str | None = None


class Float16(Struct, frozen=True):
    """A file whose products and activations are float16.

    Attributes:
        least_row_cosines: per output, least cosine of a row to the float32 file; where tokens merge, with that file's
            matches.
        largest_activation, largest_activation_in: magnitude of what is float16 now, and that tensor's name.
        nodes_float16, nodes_float32: nodes that compute in each, of those that compute in floats.
        kernels: what ran the operators in the comparison.
        own_matches_cosines: per output, mean cosine of its rows with the file's own matches; empty where none merge.
    """

    least_row_cosines: dict[str, float] = {}
    largest_activation: float | None = None
    largest_activation_in: str | None = None
    nodes_float16: int = 0
    nodes_float32: int = 0
    kernels: str | None = None
    own_matches_cosines: dict[str, float] = {}


class BoardKernels(Struct, frozen=True, kw_only=True):
    """CUDA kernels for one board; see `bundle.kernels`.

    Attributes:
        table, model: files of the bundle: the table, and the model whose nodes are launches.
        launches, nodes: how many kernels, for how many nodes.
        refused: name of a node that keeps its body -> why.
        triton, ptx_version: what made the code, and for which driver.
        cuda: version that the board runs.
    """

    board: str | None = None
    compute_capability: str | None = None
    table: str | None = None
    model: str | None = None
    launches: int = 0
    nodes: int = 0
    refused: dict[str, str] = {}
    triton: str | None = None
    ptx_version: float | None = None
    cuda: str | None = None
