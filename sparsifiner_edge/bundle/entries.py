"""Manifest entries with the results of export, for people.

Bundles run without these entries, except for `float16`, which decides `Manifest.float_precision`. Every field has a
default; None means that the manifest does not contain the value.
"""

from __future__ import annotations

from msgspec import Struct


class Check(Struct, frozen=True):
    """Comparison of the exported file with PyTorch.

    Attributes:
        errors: Largest difference per output, relative to the range of the output.
        least_row_cosines: Smallest row cosine per output.
        errors_with_equal_selection: Like `errors`, with PyTorch reading the keys that the file selected.
        selected_indices: Number of key indices selected in all layers and runs.
        differing_indices: Number of these indices that differ from PyTorch's.
        differing_tokens: Number of final patches that PyTorch kept and the file did not, for models that prune tokens.
        batches_run: Batch sizes of the runs; every value is the worst of all runs.
        kernels_run: Implementations of the operators that ran: "portable", and "native" if the library was built.
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
    """Layout of a sparse model that was changed to suit a board.

    Attributes:
        tile: Query tile before the change.
        background_tokens: Number of background tokens before the change.
        cosine: Mean cosine between the final tokens after and before the change, over the images.
        images: Number of images.
        refused: Reason why a GPU did not get the complete layout that suits it.
    """

    tile: int | None = None
    background_tokens: int | None = None
    cosine: float | None = None
    images: int = 0
    refused: str | None = None


class Quantisation(Struct, frozen=True):
    """Accuracy and extent of int8 quantisation.

    Attributes:
        cosines: Mean row cosine to the float32 file per output, over held-out images. If tokens merge, both files use
            the matches of the float32 file.
        own_matches_cosines: Like `cosines`, with the int8 file's own matches; empty if no tokens merge.
        quantised: Number of linear layers in int8.
        kept: Names of the linear layers left in float32.
        calibrated: Number of calibration images.
        held_out: Number of held-out images.
    """

    cosines: dict[str, float] = {}
    own_matches_cosines: dict[str, float] = {}
    quantised: int = 0
    kept: tuple[str, ...] = ()
    calibrated: int = 0
    held_out: int = 0


class Float16(Struct, frozen=True):
    """Accuracy and extent of a file with float16 matrix products and activations.

    Attributes:
        least_row_cosines: Smallest row cosine to the float32 file per output. If tokens merge, both files use the
            matches of the float32 file.
        own_matches_cosines: Mean row cosine per output with the file's own matches; empty if no tokens merge.
        nodes_float16: Number of floating-point nodes that compute in float16.
        nodes_float32: Number of floating-point nodes that compute in float32.
    """

    least_row_cosines: dict[str, float] = {}
    own_matches_cosines: dict[str, float] = {}
    nodes_float16: int = 0
    nodes_float32: int = 0


class BoardKernels(Struct, frozen=True):
    """CUDA kernels compiled for one board; see `bundle.kernels`.

    Attributes:
        board: Board name.
        compute_capability: Compute capability of the board's GPU, such as "8.7".
        launches: Number of kernels.
        nodes: Number of nodes that the kernels replace.
        refused: Reason per node that keeps its ONNX function body.
    """

    board: str | None = None
    compute_capability: str | None = None
    launches: int = 0
    nodes: int = 0
    refused: dict[str, str] = {}
