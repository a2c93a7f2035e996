"""Run a pipeline in the system's Python: `out` shows what an element attached, `raw` its input.

    python pipeline.py PIPELINE FOLDER

Prints, as JSON, messages of elements, and for each frame its classes and its tensors by id. FOLDER gets the pixels of
each frame, rows without padding.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstApp", "1.0")
gi.require_version("GstVideo", "1.0")
gi.require_version("GstAnalytics", "1.0")
from gi.repository import GLib, Gst, GstAnalytics, GstApp, GstVideo  # noqa: E402, F401


def classes(buffer):
    relations = GstAnalytics.buffer_get_analytics_relation_meta(buffer)
    if relations is None:
        return None
    found, meta = relations.get_cls_mtd(0)
    if not found:
        return []
    return [[GLib.quark_to_string(meta.get_quark(i)), meta.get_level(i)] for i in range(meta.get_length())]


def tensors(buffer):
    meta = GstAnalytics.buffer_get_tensor_meta(buffer)
    found = {}
    for number in range(meta.num_tensors if meta else 0):
        tensor = meta.get(number)
        _, mapped = tensor.data.map(Gst.MapFlags.READ)
        found[GLib.quark_to_string(tensor.id)] = memoryview(bytes(mapped.data)).cast("f").tolist()
        tensor.data.unmap(mapped)
    return found


def pixels(sample):
    info = GstVideo.VideoInfo.new_from_caps(sample.get_caps())
    buffer = sample.get_buffer()
    _, mapped = buffer.map(Gst.MapFlags.READ)
    data, stride = bytes(mapped.data), info.stride[0]
    buffer.unmap(mapped)
    return b"".join(data[row * stride : row * stride + info.width * 3] for row in range(info.height))


def main():
    Gst.init(None)
    pipeline = Gst.parse_launch(sys.argv[1])
    pipeline.set_state(Gst.State.PLAYING)
    out = pipeline.get_by_name("out")
    frames = []
    while True:
        sample = out.emit("try-pull-sample", 30 * Gst.SECOND)
        if sample is None:
            break
        path = Path(sys.argv[2]) / f"frame{len(frames)}"
        path.write_bytes(pixels(sample))
        buffer = sample.get_buffer()
        frames.append({"classes": classes(buffer), "tensors": tensors(buffer)})
    bus, messages = pipeline.get_bus(), []
    while (message := bus.pop_filtered(Gst.MessageType.ELEMENT)) is not None:
        structure = message.get_structure()
        names = [structure.nth_field_name(i) for i in range(structure.n_fields())]
        messages.append({name: structure.get_value(name) for name in names})
    print(json.dumps([messages, frames]))
    pipeline.set_state(Gst.State.NULL)


main()
