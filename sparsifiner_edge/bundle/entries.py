"""What export found, as a manifest says it, for people. Bundles run without it, but for `float16`
(`Manifest.float_precision`): everything has a default, and None means that the manifest does not say.
"""

from __future__ import annotations

from msgspec import Struct


class Check(Struct, frozen=True):
    """The file checked against PyTorch.

    Attributes:
        errors: output -> greatest difference, relative to its range. least_row_cosines: least cosine of its rows.
        errors_with_equal_selection: the same as `errors`, with torch reading the keys that the file selected.
        selected_indices, differing_indices: keys in all layers and runs, and how many of them differ from torch's.
        differing_tokens: final patches that torch kept and the file did not, where tokens are pruned.
        batches_run: batch sizes; figures are the worst of all runs.
        kernels_run: what ran the operators: "portable", and "native" where the library was built.
    """

    errors: dict[str, float] = {}
    least_row_cosines: dict[str, float] = {}
    errors_with_equal_selection: dict[str, float] = {}
    selected_indices: int = 0
    differing_indices: int = 0
    differing_tokens: int = 0
    batches_run: tuple[int, ...] = ()
    kernels_run: tuple[str, ...] = ()


class Retiled(Struct, frozen=True):
    """A board's layout in the place of the student's own, which had `tile` and `cells`.

    Attributes:
        cosine: mean of the final tokens to those before, over `images`.
        refused: why a GPU did not get all that suits it.
    """

    tile: int | None = None
    cells: int | None = None
    cosine: float | None = None
    images: int = 0
    refused: str | None = None


class Quantisation(Struct, frozen=True):
    """int8 linear layers.

    Attributes:
        cosines: per output, mean row cosine to the float32 file over held-out images; where tokens merge, with the
            float32 file's matches.
        own_matches_cosines: the same with its own matches; empty where no tokens merge.
        quantised, kept: linear layers in int8; names of those left in float32.
        calibrated, held_out: numbers of images.
    """

    cosines: dict[str, float] = {}
    own_matches_cosines: dict[str, float] = {}
    quantised: int = 0
    kept: tuple[str, ...] = ()
    calibrated: int = 0
    held_out: int = 0


class Float16(Struct, frozen=True):
    """A file whose products and activations are float16.

    Attributes:
        least_row_cosines: per output, least cosine of a row to the float32 file; where tokens merge, with that file's
            matches.
        own_matches_cosines: per output, mean cosine of its rows with the file's own matches; empty where none merge.
        nodes_float16, nodes_float32: nodes that compute in each, of those that compute in floats.
    """

    least_row_cosines: dict[str, float] = {}
    own_matches_cosines: dict[str, float] = {}
    nodes_float16: int = 0
    nodes_float32: int = 0


class BoardKernels(Struct, frozen=True):
    """CUDA kernels for one board; see `bundle.kernels`.

    Attributes:
        launches, nodes: how many kernels, for how many nodes.
        refused: name of a node that keeps its body -> why.
    """

    board: str | None = None
    compute_capability: str | None = None
    launches: int = 0
    nodes: int = 0
    refused: dict[str, str] = {}
