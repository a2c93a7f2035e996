"""Outputs of the model, frame by frame: `python3 probe.py PIPELINE`, see README.md; needs pyds and NumPy."""

import ctypes
import sys

import gi
import numpy as np
import pyds

gi.require_version("Gst", "1.0")
from gi.repository import Gst  # noqa: E402


def each(entry, kind):
    """The entries of one of DeepStream's lists."""
    while entry is not None:
        yield kind.cast(entry.data)
        try:
            entry = entry.next
        except StopIteration:  # How pyds ends a list.
            return


def print_outputs(_pad, info):
    """Print what the model gave; here is the place for what you make of it."""
    batch = pyds.gst_buffer_get_nvds_batch_meta(hash(info.get_buffer()))
    for frame in each(batch.frame_meta_list, pyds.NvDsFrameMeta):
        for meta in each(frame.frame_user_meta_list, pyds.NvDsUserMeta):
            if meta.base_meta.meta_type != pyds.NvDsMetaType.NVDSINFER_TENSOR_OUTPUT_META:
                continue
            tensors = pyds.NvDsInferTensorMeta.cast(meta.user_meta_data)
            for layer in (pyds.get_nvds_LayerInfo(tensors, number) for number in range(tensors.num_output_layers)):
                if layer.dataType == pyds.NvDsInferDataType.FLOAT:
                    values = ctypes.cast(pyds.get_ptr(layer.buffer), ctypes.POINTER(ctypes.c_float))
                    shape = tuple(layer.inferDims.d[: layer.inferDims.numDims])  # Without the batch: a map's is C,H,W.
                    output = np.ctypeslib.as_array(values, shape)  # Copy what you keep: it is DeepStream's memory.
                    print(frame.frame_num, layer.layerName, shape, f"{(output > 0.5).mean():.1%} above one half")
    return Gst.PadProbeReturn.OK


if __name__ == "__main__":
    Gst.init(None)
    pipeline = Gst.parse_launchv(sys.argv[1:])
    if (model := pipeline.get_by_name("model")) is None:
        sys.exit("No element is named model: name=model")
    model.get_static_pad("src").add_probe(Gst.PadProbeType.BUFFER, print_outputs)
    pipeline.set_state(Gst.State.PLAYING)
    last = pipeline.get_bus().timed_pop_filtered(Gst.CLOCK_TIME_NONE, Gst.MessageType.EOS | Gst.MessageType.ERROR)
    pipeline.set_state(Gst.State.NULL)
    sys.exit(last.parse_error()[0].message if last.type == Gst.MessageType.ERROR else 0)
