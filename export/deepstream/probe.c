/* Print the outputs of the model for each frame: `./probe PIPELINE`. README.md shows how to compile it. */
#include "gstnvdsmeta.h"
#include "gstnvdsinfer.h"

static GstPadProbeReturn print_outputs(GstPad *pad, GstPadProbeInfo *info, gpointer unused) {
  NvDsBatchMeta *batch = gst_buffer_get_nvds_batch_meta(GST_PAD_PROBE_INFO_BUFFER(info));
  for (NvDsMetaList *f = batch ? batch->frame_meta_list : NULL; f; f = f->next) {
    NvDsFrameMeta *frame = f->data;
    for (NvDsMetaList *u = frame->frame_user_meta_list; u; u = u->next) {
      NvDsUserMeta *meta = u->data;
      if (meta->base_meta.meta_type != NVDSINFER_TENSOR_OUTPUT_META) continue;
      NvDsInferTensorMeta *tensors = meta->user_meta_data;
      for (guint i = 0; i < tensors->num_output_layers; i++) {
        NvDsInferLayerInfo *layer = &tensors->output_layers_info[i];
        const float *values = tensors->out_buf_ptrs_host[i]; /* Without the batch axis; a map has C, H, W. */
        guint above = 0, all = layer->dataType == FLOAT ? layer->inferDims.numElements : 0;
        for (guint at = 0; at < all; at++) above += values[at] > 0.5f;
        if (all) g_print("%d %s: %.1f%% above one half\n", frame->frame_num, layer->layerName, 100.0 * above / all);
      }
    }
  }
  return GST_PAD_PROBE_OK;
}

int main(int count, char **arguments) {
  gst_init(&count, &arguments);
  GError *error = NULL;
  GstElement *pipeline = gst_parse_launchv((const gchar **)arguments + 1, &error);
  GstElement *model = pipeline ? gst_bin_get_by_name(GST_BIN(pipeline), "model") : NULL;
  if (!model) return g_printerr("%s\n", error ? error->message : "No element is named model. Add name=model to nvinfer."), 2;
  gst_pad_add_probe(gst_element_get_static_pad(model, "src"), GST_PAD_PROBE_TYPE_BUFFER, print_outputs, NULL, NULL);
  gst_element_set_state(pipeline, GST_STATE_PLAYING);
  GstMessageType ends = GST_MESSAGE_EOS | GST_MESSAGE_ERROR;
  GstMessage *last = gst_bus_timed_pop_filtered(gst_element_get_bus(pipeline), GST_CLOCK_TIME_NONE, ends);
  gst_element_set_state(pipeline, GST_STATE_NULL);
  return GST_MESSAGE_TYPE(last) == GST_MESSAGE_ERROR;
}
