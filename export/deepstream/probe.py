"""Print the outputs of the model for each frame: `python3 probe.py PIPELINE`. Needs pyds and NumPy; see README.md."""

import ctypes
import sys

import gi
import numpy as np
import pyds

gi.require_version("Gst", "1.0")
from gi.repository import Gst  # noqa: E402


def each(entry, kind):
    """Yield the entries of a DeepStream list."""
    while entry is not None:
        yield kind.cast(entry.data)
        try:
            entry = entry.next
        except StopIteration:  # pyds ends a list this way.
            return


def print_outputs(_pad, info):
    """Print the outputs of the model. Put your own processing here."""
    batch = pyds.gst_buffer_get_nvds_batch_meta(hash(info.get_buffer()))
    for frame in each(batch.frame_meta_list, pyds.NvDsFrameMeta):
        for meta in each(frame.frame_user_meta_list, pyds.NvDsUserMeta):
            if meta.base_meta.meta_type != pyds.NvDsMetaType.NVDSINFER_TENSOR_OUTPUT_META:
                continue
            tensors = pyds.NvDsInferTensorMeta.cast(meta.user_meta_data)
            for layer in (pyds.get_nvds_LayerInfo(tensors, number) for number in range(tensors.num_output_layers)):
                if layer.dataType == pyds.NvDsInferDataType.FLOAT:
                    values = ctypes.cast(pyds.get_ptr(layer.buffer), ctypes.POINTER(ctypes.c_float))
                    # Without the batch axis; a map has C,H,W.
                    shape = tuple(layer.inferDims.d[: layer.inferDims.numDims])
                    output = np.ctypeslib.as_array(values, shape)  # DeepStream's memory: copy what you keep.
                    print(frame.frame_num, layer.layerName, shape, f"{(output > 0.5).mean():.1%} above one half")
    return Gst.PadProbeReturn.OK


if __name__ == "__main__":
    Gst.init(None)
    pipeline = Gst.parse_launchv(sys.argv[1:])
    if (model := pipeline.get_by_name("model")) is None:
        sys.exit("No element is named model. Add name=model to nvinfer.")
    model.get_static_pad("src").add_probe(Gst.PadProbeType.BUFFER, print_outputs)
    pipeline.set_state(Gst.State.PLAYING)
    last = pipeline.get_bus().timed_pop_filtered(Gst.CLOCK_TIME_NONE, Gst.MessageType.EOS | Gst.MessageType.ERROR)
    pipeline.set_state(Gst.State.NULL)
    sys.exit(last.parse_error()[0].message if last.type == Gst.MessageType.ERROR else 0)
