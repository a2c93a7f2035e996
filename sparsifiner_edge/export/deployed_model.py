"""The module that is exported: camera pixels in, named outputs out."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsifiner_edge.errors import ConfigError, SparsifinerError
from sparsifiner_edge.images import Normalisation
from sparsifiner_edge.metrics import POSITIONS
from sparsifiner_edge.sparse.calibrate import observe
from sparsifiner_edge.sparse.hosts import Backbone, backbone_of
from sparsifiner_edge.sparse.outputs import ALONE, outputs_of
from sparsifiner_edge.sparse.student import Student
from sparsifiner_edge.text import one_line


class DeployedModel(nn.Module):
    """A vision transformer, or a module that contains one, that takes uint8 RGB images [B,H,W,3].

    Normalisation is folded into the patch embedding if nothing else reads the pixels, layer scale into the preceding
    linear layers.

    Attributes:
        output_names: A classifier gives "logits" and "features", and "tokens" on request; any other vision transformer
            "features" and "tokens". With pruned tokens, "token_positions" follows "tokens". Other modules give their
            own outputs (see `outputs_of`), then tokens on request.
        folded: True if normalisation is folded in.
    """

    def __init__(
        self, model: nn.Module, pre: Normalisation, tokens: bool = False, names: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval().float()
        backbone = backbone_of(self.model)
        backbone.settle()
        backbone.fold_layer_scale()
        self.names, self.tokens, self.pre = names, tokens, pre
        self.mean, self.std = (nn.Buffer(torch.tensor(x)[:, None, None], persistent=False) for x in (pre.mean, pre.std))
        self.eval()
        alone = backbone.module is self.model
        self.output_names = self._infer_names(backbone)
        if alone:
            order = ALONE[:2] if "logits" in self.output_names and not tokens else (*ALONE, POSITIONS)
            self.output_names = [name for name in order if name in self.output_names]
        self.folded = alone or self._reads_pixels_alone(backbone)
        if self.folded:
            fold_normalisation(backbone, pre)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs of uint8 images [B,H,W,3], in the order of `output_names`."""
        pixels = image.float().permute(0, 3, 1, 2)
        pixels = pixels if self.folded else self._normalise(pixels)
        outputs = self._outputs(pixels)
        if POSITIONS in outputs:
            outputs[POSITIONS] = outputs[POSITIONS].int()
        return tuple(outputs[name] for name in self.output_names)

    def _outputs(self, pixels: Tensor) -> dict[str, Tensor]:
        return outputs_of(self.model, pixels, self.names, tokens=self.tokens)

    def _normalise(self, pixels: Tensor) -> Tensor:
        return (pixels / 255 - self.mean) / self.std

    @torch.no_grad()
    def _infer_names(self, backbone: Backbone) -> list[str]:
        some = torch.zeros(1, 3, *backbone.image_size)
        try:
            return list(self._outputs(some))
        except SparsifinerError:
            raise
        # The module is the user's: any exception is its own failure.
        except Exception as error:
            raise ConfigError(
                f"{type(self.model).__name__} failed when it was called with images {list(some.shape)}: "
                f"{type(error).__name__}: {one_line(error)}.",
                "Give a module that takes only images, in this size.",
            ) from error

    @torch.no_grad()
    def _reads_pixels_alone(self, backbone: Backbone) -> bool:
        """Return True if the backbone gets exactly the module's input and nothing else reads it, as a trial shows."""
        generator = torch.Generator().manual_seed(0)
        some = torch.randint(256, (1, 3, *backbone.image_size), generator=generator).float()
        projection = backbone.embedding
        weight, bias = projection.weight.detach().clone(), projection.bias
        with observe(self.model, lambda *_: None, densely=True):
            expected = self._outputs(self._normalise(some))
            fold_normalisation(backbone, self.pre)
            try:
                got = self._outputs(some)
            finally:
                projection.weight.copy_(weight)
                projection.bias = bias
        return all(torch.allclose(got[name], expected[name], rtol=1e-3, atol=1e-4) for name in expected)


def deploy(student: Student, tokens: bool = False) -> DeployedModel:
    """Return the module of a sparse model in the form that is exported."""
    return DeployedModel(student.model, student.normalisation, tokens, student.outputs)


@torch.no_grad()
def fold_normalisation(backbone: Backbone, pre: Normalisation) -> None:
    """Let the patch embedding take pixels 0 to 255. Its kernel has no padding, so this is exact."""
    projection = backbone.embedding
    weight = projection.weight.double()
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (pre.mean, pre.std))
    shift = (weight * mean / std).sum((1, 2, 3))
    bias = -shift if projection.bias is None else projection.bias.double() - shift
    projection.weight.copy_(weight / (255 * std))
    projection.bias = nn.Parameter(bias.float())
