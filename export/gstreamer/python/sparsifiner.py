"""GStreamer element `sparsifiner`: runs a bundle on every frame that passes.

GStreamer's Python loader finds this file as GST_PLUGIN_PATH/python/sparsifiner.py. Frames pass unchanged. A
classifier's answer is attached as GstAnalytics classification metadata (GStreamer 1.24) and posted on the bus, as a
message of the element with the structure `sparsifiner`: `pts`, `infer-ms`, and `classes`, `labels`, `probabilities`,
best first. A model without classes posts `features` and `change` instead (see docs/camera.md). One that gives a dense
map from 0 to 1 posts `map`, `area` and `centroid` (x, y), and attaches the part above one half as segmentation metadata
(GStreamer 1.26): a GRAY8 mask, 1 where it is, over the part of the frame that the model sees. Where GStreamer has no
GstAnalytics, answers come as messages alone, and a warning says so.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gi  # type: ignore[import-not-found,unused-ignore]

gi.require_version("Gst", "1.0")
gi.require_version("GstBase", "1.0")
gi.require_version("GstVideo", "1.0")
from gi.repository import (  # type: ignore[import-not-found,unused-ignore]  # noqa: E402
    GLib,
    GObject,
    Gst,
    GstBase,
    GstVideo,
)

if TYPE_CHECKING:
    from sparsifiner_edge.camera.answers import Answer, Class, MapSummary

try:
    gi.require_version("GstAnalytics", "1.0")
    from gi.repository import GstAnalytics
except (ImportError, ValueError):
    GstAnalytics = None

_CAPS = Gst.Caps.from_string("video/x-raw,format=RGB")
_FLAGS = GObject.ParamFlags.READWRITE


class Sparsifiner(GstBase.BaseTransform):  # type: ignore[misc]
    """See above. The bundle is opened when the pipeline starts; what is wrong with it becomes the pipeline's error."""

    __gtype_name__ = "GstSparsifiner"
    __gstmetadata__ = ("Sparsifiner", "Filter/Analyzer/Video", "Runs a bundle of sparsifiner-edge", "sparsifiner-edge")
    __gsttemplates__ = tuple(
        Gst.PadTemplate.new(name, direction, Gst.PadPresence.ALWAYS, _CAPS)
        for name, direction in (("sink", Gst.PadDirection.SINK), ("src", Gst.PadDirection.SRC))
    )

    bundle = GObject.Property(type=str, default="", nick="Bundle", blurb="Folder of the bundle", flags=_FLAGS)
    public_key = GObject.Property(
        type=str, default="", nick="Public key", blurb="Refuse a bundle that this key has not signed", flags=_FLAGS
    )
    threads = GObject.Property(
        type=int, default=0, minimum=0, maximum=1024, nick="Threads", blurb="0: every core allowed", flags=_FLAGS
    )
    top_k = GObject.Property(
        type=int, default=5, minimum=1, maximum=100000, nick="Top k", blurb="Most classes per answer", flags=_FLAGS
    )
    threshold = GObject.Property(
        type=float, default=0.0, minimum=0.0, maximum=1.0, nick="Threshold", blurb="Leave out less probable classes",
        flags=_FLAGS,
    )  # fmt: skip
    kernels = GObject.Property(
        type=str, default="auto", nick="Kernels", blurb="auto, native or portable operators", flags=_FLAGS
    )

    def __init__(self) -> None:
        super().__init__()
        self.set_in_place(True)
        self._model: Any = None
        self._info: Any = None

    def do_start(self) -> bool:
        """Open the bundle."""
        try:
            self._model = self._open()
        except Exception as error:  # Whatever it is, the pipeline must hear of it.
            self._model = None
            self._fail(f"{type(error).__name__}: {error}" if isinstance(error, ImportError) else str(error))
            return False
        if GstAnalytics is None:
            self._warn(f"{Gst.version_string()} has no GstAnalytics: answers come as messages alone.")
        return True

    def _open(self) -> Any:
        from sparsifiner_edge.camera.model import Model, ModelOptions
        from sparsifiner_edge.execution import Execution

        key = Path(self.public_key) if self.public_key else None
        execution = Execution(kernels=self.kernels, threads=self.threads or None)
        return Model(Path(self.bundle), ModelOptions(execution, self.top_k, self.threshold, key))

    def do_stop(self) -> bool:
        """Close it."""
        if self._model is not None:
            self._model.session.close()
            self._model = None
        return True

    def do_set_caps(self, caps: Any, _out: Any) -> bool:
        """Remember the size of the frames."""
        self._info = GstVideo.VideoInfo.new_from_caps(caps)
        return self._info is not None

    def do_transform_ip(self, buffer: Any) -> Any:
        """One frame."""
        try:
            image = self._image(buffer)
            begun = time.monotonic()
            outputs = self._model.infer(image)
            elapsed = (time.monotonic() - begun) * 1e3
            answer = self._model.answer(outputs)
            change = self._model.change(outputs) if answer.top is None else None
            if answer.top is not None and GstAnalytics is not None:
                self._attach(buffer, answer.top)
            if answer.maps and hasattr(GstAnalytics, "SegmentationMtd"):
                self._attach_mask(buffer, outputs, answer.maps[0])
            self._post(buffer, answer, change, elapsed)
        except Exception as error:  # It would vanish in the binding.
            self._fail(str(error))
            return Gst.FlowReturn.ERROR
        return Gst.FlowReturn.OK

    def _image(self, buffer: Any) -> Any:
        """The frame as the model takes it, uint8 [H,W,3]."""
        from PIL import Image

        from sparsifiner_edge.camera.prepare import fit_pillow

        meta = GstVideo.buffer_get_video_meta(buffer)
        offset, stride = (meta.offset[0], meta.stride[0]) if meta else (self._info.offset[0], self._info.stride[0])
        size = (self._info.width, self._info.height)
        found, mapped = buffer.map(Gst.MapFlags.READ)
        if not found:
            raise RuntimeError("The frame cannot be read.")
        try:
            frame = Image.frombuffer("RGB", size, bytes(mapped.data[offset:]), "raw", "RGB", stride, 1)
            return fit_pillow(frame, self._model.size)
        finally:
            buffer.unmap(mapped)

    def _attach(self, buffer: Any, top: list[Class]) -> None:
        relations = GstAnalytics.buffer_add_analytics_relation_meta(buffer)
        if relations is None:
            raise RuntimeError("The frame takes no metadata.")
        if top:
            quarks = [GLib.quark_from_string(entry.label) for entry in top]
            relations.add_cls_mtd([entry.probability for entry in top], quarks)

    def _attach_mask(self, buffer: Any, outputs: Any, found: MapSummary) -> None:
        from sparsifiner_edge.camera.model import dense_maps
        from sparsifiner_edge.images import centre_box

        if found.area is None:
            return
        mask = dense_maps(outputs)[found.output] > 0.5
        rows, columns = mask.shape
        # Rows of a video buffer begin at multiples of four bytes.
        stride = -(-columns // 4) * 4
        padded = b"".join(row.tobytes().ljust(stride, b"\0") for row in mask)
        held = Gst.Buffer.new_wrapped(padded)
        GstVideo.buffer_add_video_meta(held, GstVideo.VideoFrameFlags.NONE, GstVideo.VideoFormat.GRAY8, columns, rows)
        left, top, right, bottom = centre_box(self._info.width, self._info.height, self._model.size)
        relations = GstAnalytics.buffer_add_analytics_relation_meta(buffer)
        if relations is None:
            raise RuntimeError("The frame takes no metadata.")
        kind = GstAnalytics.SegmentationType.SEMANTIC
        relations.add_segmentation_mtd(held, kind, [0, 1], left, top, right - left, bottom - top)

    def _post(self, buffer: Any, answer: Answer, change: float | None, elapsed: float) -> None:
        structure = Gst.Structure.new_empty("sparsifiner")
        if buffer.pts != Gst.CLOCK_TIME_NONE:
            structure.set_value("pts", GObject.Value(GObject.TYPE_UINT64, buffer.pts))
        structure.set_value("infer-ms", elapsed)
        if answer.top is not None:
            for field, key in (("classes", "number"), ("labels", "label"), ("probabilities", "probability")):
                structure.set_value(field, Gst.ValueArray([getattr(entry, key) for entry in answer.top]))
        elif answer.maps:
            found = answer.maps[0]
            structure.set_value("map", found.output)
            structure.set_value("area", math.nan if found.area is None else found.area)
            structure.set_value("centroid", Gst.ValueArray(list(found.centroid or ())))
        else:
            features = answer.features or []
            structure.set_value("features", Gst.ValueArray([math.nan if x is None else x for x in features]))
            structure.set_value("change", math.nan if change is None else change)
        if answer.novelty is not None:
            structure.set_value("novelty", answer.novelty)
        self.post_message(Gst.Message.new_element(self, structure))

    def _warn(self, text: str) -> None:
        warning = GLib.Error.new_literal(Gst.LibraryError.quark(), text, Gst.LibraryError.FAILED)
        self.post_message(Gst.Message.new_warning(self, warning, ""))

    def _fail(self, text: str) -> None:
        error = GLib.Error.new_literal(Gst.LibraryError.quark(), text, Gst.LibraryError.SETTINGS)
        self.post_message(Gst.Message.new_error(self, error, f"bundle={self.bundle}"))


GObject.type_register(Sparsifiner)
__gstelementfactory__ = ("sparsifiner", Gst.Rank.NONE, Sparsifiner)
