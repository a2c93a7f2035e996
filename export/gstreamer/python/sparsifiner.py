"""GStreamer element `sparsifiner`: runs a bundle on every frame that passes.

GStreamer's Python loader finds this file as GST_PLUGIN_PATH/python/sparsifiner.py. Frames pass unchanged. Each answer
is posted on the bus as an element message with the structure `sparsifiner`. Its fields are `pts`, `infer-ms`, and
`answer`, the JSON that `sparsifiner-edge run` writes for a frame. If GStreamer has GstAnalytics (1.24), a
classifier's answer is also attached as classification metadata, the most probable class first.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import gi  # type: ignore[import-not-found,unused-ignore]

gi.require_version("Gst", "1.0")
gi.require_version("GstBase", "1.0")
gi.require_version("GstVideo", "1.0")
from gi.repository import GLib, GObject, Gst, GstBase, GstVideo  # type: ignore  # noqa: E402

try:
    gi.require_version("GstAnalytics", "1.0")
    from gi.repository import GstAnalytics
except (ImportError, ValueError):
    GstAnalytics = None

_CAPS = Gst.Caps.from_string("video/x-raw,format=RGB")


class Sparsifiner(GstBase.BaseTransform):  # type: ignore[misc]
    """Element that runs a bundle.

    The bundle is opened when the pipeline starts. A failure to open it is reported as an error of the pipeline.
    """

    __gtype_name__ = "GstSparsifiner"
    __gstmetadata__ = ("Sparsifiner", "Filter/Analyzer/Video", "Runs a bundle of sparsifiner-edge", "sparsifiner-edge")
    __gsttemplates__ = tuple(
        Gst.PadTemplate.new(name, direction, Gst.PadPresence.ALWAYS, _CAPS)
        for name, direction in (("sink", Gst.PadDirection.SINK), ("src", Gst.PadDirection.SRC))
    )

    bundle = GObject.Property(type=str, default="", nick="Bundle", blurb="Folder of the bundle")
    public_key = GObject.Property(type=str, default="", nick="Public key", blurb="Key that must have signed it")

    def __init__(self) -> None:
        super().__init__()
        self.set_in_place(True)
        self._model: Any = None
        self._info: Any = None

    def do_start(self) -> bool:
        """Open the bundle."""
        try:
            from sparsifiner_edge.camera.model import Model

            self._model = Model(Path(self.bundle), public_key=Path(self.public_key) if self.public_key else None)
            self._model.follow()
        except Exception as error:  # Report every failure to the pipeline.
            return self._fail(f"{type(error).__name__}: {error}" if isinstance(error, ImportError) else str(error))
        return True

    def do_stop(self) -> bool:
        """Close the bundle."""
        if self._model is not None:
            self._model.session.close()
            self._model = None
        return True

    def do_set_caps(self, caps: Any, _out: Any) -> bool:
        """Store the format of the frames."""
        self._info = GstVideo.VideoInfo.new_from_caps(caps)
        return self._info is not None

    def do_transform_ip(self, buffer: Any) -> Any:
        """Run the model on one frame and post the answer."""
        try:
            image = self._image(buffer)
            begun = time.monotonic()
            fitting = self._model.framing.of(self._info.width, self._info.height)
            follows = not buffer.has_flags(Gst.BufferFlags.DISCONT)
            inferred = self._model.infer_frame(image, follows, fitting)
            elapsed_ms = (time.monotonic() - begun) * 1e3
            self._post(buffer, self._model.frame_answer(inferred.outputs, inferred.fitting), elapsed_ms)
        except Exception as error:  # The Python binding would discard the exception.
            self._fail(str(error))
            return Gst.FlowReturn.ERROR
        return Gst.FlowReturn.OK

    def _image(self, buffer: Any) -> Any:
        """Return the frame as input of the model, uint8 RGB [H,W,3]."""
        import numpy as np
        from PIL import Image

        from sparsifiner_edge.images import fit_image

        meta = GstVideo.buffer_get_video_meta(buffer)
        offset, stride = (meta.offset[0], meta.stride[0]) if meta else (self._info.offset[0], self._info.stride[0])
        readable, mapped = buffer.map(Gst.MapFlags.READ)
        if not readable:
            raise RuntimeError("The frame cannot be read.")
        try:
            size, pixels = (self._info.width, self._info.height), bytes(mapped.data[offset:])
            frame = Image.frombuffer("RGB", size, pixels, "raw", "RGB", stride, 1)
            return np.asarray(fit_image(frame, self._model.framing))
        finally:
            buffer.unmap(mapped)

    def _post(self, buffer: Any, answer: Any, elapsed_ms: float) -> None:
        """Post the answer on the bus, and attach a classifier's classes to the frame."""
        from sparsifiner_edge.records import write_record
        from sparsifiner_edge.text import dump_json, finite

        relations = GstAnalytics and answer.top and GstAnalytics.buffer_add_analytics_relation_meta(buffer)
        if relations:
            quarks = [GLib.quark_from_string(entry.label) for entry in answer.top]
            relations.add_cls_mtd([entry.probability for entry in answer.top], quarks)
        structure = Gst.Structure.new_empty("sparsifiner")
        if buffer.pts != Gst.CLOCK_TIME_NONE:
            structure.set_value("pts", GObject.Value(GObject.TYPE_UINT64, buffer.pts))
        structure.set_value("infer-ms", elapsed_ms)
        structure.set_value("answer", dump_json(finite(write_record(answer))[0], None).strip())
        self.post_message(Gst.Message.new_element(self, structure))

    def _fail(self, text: str) -> bool:
        """Post an error of the pipeline; return False."""
        error = GLib.Error.new_literal(Gst.LibraryError.quark(), text, Gst.LibraryError.SETTINGS)
        self.post_message(Gst.Message.new_error(self, error, f"bundle={self.bundle}"))
        return False


GObject.type_register(Sparsifiner)
__gstelementfactory__ = ("sparsifiner", Gst.Rank.NONE, Sparsifiner)
