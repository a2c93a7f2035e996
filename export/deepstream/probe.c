/* Outputs of the model, frame by frame, as probe.py prints them; README.md says how to compile it. */
#include <gst/gst.h>
#include "gstnvdsmeta.h"
#include "gstnvdsinfer.h"

static GstPadProbeReturn told(GstPad *pad, GstPadProbeInfo *info, gpointer unused) {
  NvDsBatchMeta *batch = gst_buffer_get_nvds_batch_meta(GST_PAD_PROBE_INFO_BUFFER(info));
  for (NvDsMetaList *f = batch ? batch->frame_meta_list : NULL; f; f = f->next) {
    NvDsFrameMeta *frame = f->data;
    for (NvDsMetaList *u = frame->frame_user_meta_list; u; u = u->next) {
      NvDsUserMeta *meta = u->data;
      if (meta->base_meta.meta_type != NVDSINFER_TENSOR_OUTPUT_META) continue;
      NvDsInferTensorMeta *tensors = meta->user_meta_data;
      for (guint i = 0; i < tensors->num_output_layers; i++) {
        NvDsInferLayerInfo *layer = &tensors->output_layers_info[i];
        if (layer->dataType != FLOAT) continue;
        const float *values = tensors->out_buf_ptrs_host[i]; /* Without the batch: a map's are C, H, W. */
        guint above = 0, all = layer->inferDims.numElements;
        for (guint at = 0; at < all; at++) above += values[at] > 0.5f;
        g_print("%d %s: %.1f%% above one half\n", frame->frame_num, layer->layerName, 100.0 * above / all);
      }
    }
  }
  return GST_PAD_PROBE_OK;
}

int main(int count, char **arguments) {
  gst_init(&count, &arguments);
  if (count < 2) return 2;
  gchar *line = g_strdup_printf("filesrc location=%s ! qtdemux ! h264parse ! nvv4l2decoder ! mux.sink_0 nvstreammux name=mux "
      "batch-size=1 width=1280 height=720 ! nvinfer name=model config-file-path=config_infer.txt ! fakesink", arguments[1]);
  GstElement *pipeline = gst_parse_launch(line, NULL);
  if (!pipeline) return 1;
  GstElement *model = gst_bin_get_by_name(GST_BIN(pipeline), "model");
  gst_pad_add_probe(gst_element_get_static_pad(model, "src"), GST_PAD_PROBE_TYPE_BUFFER, told, NULL, NULL);
  gst_element_set_state(pipeline, GST_STATE_PLAYING);
  GstMessage *last = gst_bus_timed_pop_filtered(gst_element_get_bus(pipeline), GST_CLOCK_TIME_NONE,
      GST_MESSAGE_EOS | GST_MESSAGE_ERROR);
  gst_element_set_state(pipeline, GST_STATE_NULL);
  return GST_MESSAGE_TYPE(last) == GST_MESSAGE_ERROR;
}
