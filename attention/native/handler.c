/* What XLA calls: buffers into a problem, and what the handlers are. */
#include <string.h>

#include "forward.h"
#include "halves.h"

enum { QUERY, KEY, VALUE, CAPS, FIRST, LAST, QUERY_SEGMENTS, KEY_SEGMENTS, SHOWN, OUTPUT, LEVEL, D_OUTPUT, D_LEVEL };
enum { PAGES = SHOWN + 1, QUERY_SCALE, KEY_SCALE }; /* of a pass that reads some pages */

static XLA_FFI_Error *refused(const XLA_FFI_CallFrame *frame, const char *message) {
  XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, 0, message,
                                    XLA_FFI_Error_Code_INVALID_ARGUMENT};
  return frame->api->XLA_FFI_Error_Create(&args);
}

static const XLA_FFI_Buffer *argument(const XLA_FFI_CallFrame *frame, int n) { return frame->args.args[n]; }
static void *result(const XLA_FFI_CallFrame *frame, int n) { return ((XLA_FFI_Buffer *)frame->rets.rets[n])->data; }
static operand as_operand(const XLA_FFI_Buffer *x) {
  return (operand){x->dtype == XLA_FFI_DataType_F32 ? FLOAT32 : x->dtype == XLA_FFI_DataType_F16 ? FLOAT16 : BFLOAT16,
                   x->data};
}

/* Whether a call has so many operands and results, a query in float32, and keys and values of types that are read. */
static XLA_FFI_Error *misfit(const XLA_FFI_CallFrame *frame, int operands, int results) {
  if (frame->args.size != operands || frame->rets.size != results) return refused(frame, "another number of buffers");
  if (argument(frame, QUERY)->dtype != XLA_FFI_DataType_F32) return refused(frame, "a query that is not float32");
  for (int n = KEY; n <= VALUE; n++) {
    XLA_FFI_DataType type = argument(frame, n)->dtype;
    if (type != XLA_FFI_DataType_F32 && type != XLA_FFI_DataType_BF16 && type != XLA_FFI_DataType_F16)
      return refused(frame, "keys or values that are not float32, bfloat16 or float16");
  }
  return 0;
}

/* XLA asks for the version of the interface before it calls. The type of an extension has another name in each version. */
static int told_version(const XLA_FFI_CallFrame *frame) {
  const XLA_FFI_Metadata_Extension *extension = (const void *)frame->extension_start;
  if (!extension || extension->extension_base.type != XLA_FFI_Extension_Metadata) return 0;
  XLA_FFI_Metadata *metadata = extension->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  return 1;
}

/* As far as there is one; of `batches` elements of a batch, each group has its own. */
static table as_table(const XLA_FFI_Buffer *x, int64_t batches) {
  table found = {0};
  if (x->dims[x->rank - 1] == 0) return found;
  found.data = x->data;
  int64_t step = 1, count = 1;
  for (int axis = 4; axis >= 0; step *= x->dims[x->rank - 5 + axis], axis--)
    found.steps[axis] = axis && x->dims[x->rank - 5 + axis] == 1 ? 0 : step;
  for (int64_t axis = 0; axis < x->rank - 4; axis++) count *= x->dims[axis];
  found.sharing = batches / most(count, 1);
  return found;
}

/* Axes before the last ones are batches. */
static problem described(const XLA_FFI_CallFrame *frame) {
  const XLA_FFI_Buffer *query = argument(frame, QUERY), *key = argument(frame, KEY), *value = argument(frame, VALUE);
  const int64_t *q = query->dims + query->rank - 3, *k = key->dims + key->rank - 3;
  problem p = {.B = 1, .T = q[0], .S = k[0], .K = k[1], .G = q[1] / k[1], .H = q[2],
               .E = value->dims[value->rank - 1]};
  for (const int64_t *dim = query->dims; dim < q; dim++) p.B *= *dim;
  p.query = query->data, p.key = as_operand(key), p.value = as_operand(value);
  const XLA_FFI_Buffer *caps = argument(frame, CAPS);
  if (caps->dims[caps->rank - 1] > 0) p.caps = caps->data;
  p.first = argument(frame, FIRST)->data, p.last = argument(frame, LAST)->data;
  p.shown = as_table(argument(frame, SHOWN), p.B);
  const XLA_FFI_Buffer *segments = argument(frame, QUERY_SEGMENTS);
  if (segments->dims[segments->rank - 1] > 0) {
    p.query_segments = segments->data;
    p.key_segments = argument(frame, KEY_SEGMENTS)->data;
  }
  return p;
}

static void set_partial(problem *p, const XLA_FFI_CallFrame *frame, int n) {
  const XLA_FFI_Buffer *partial = frame->rets.rets[n];
  p->partial = partial->data, p->parts = partial->dims[partial->rank - 1];
}

/* The one attribute: how many keys a page has. */
static void set_pages(problem *p, const XLA_FFI_CallFrame *frame) {
  const XLA_FFI_Buffer *pages = argument(frame, PAGES);
  p->pages = pages->data, p->P = pages->dims[pages->rank - 2];
  p->page = *(const int64_t *)((const XLA_FFI_Scalar *)frame->attrs.attrs[0])->value;
}

static XLA_FFI_Error *forward_pass(const XLA_FFI_CallFrame *frame, int paged) {
  if (told_version(frame)) return 0;
  XLA_FFI_Error *error = misfit(frame, SHOWN + 1 + paged, 3);
  if (error) return error;
  problem p = described(frame);
  if (paged) set_pages(&p, frame);
  p.output = result(frame, 0), p.level = result(frame, 1), p.tiles = result(frame, 2);
  forward(&p, &(threads){frame->api, frame->ctx});
  return 0;
}

__attribute__((visibility("default"))) XLA_FFI_Error *attention_lab_forward(XLA_FFI_CallFrame *frame) {
  return forward_pass(frame, 0);
}

__attribute__((visibility("default"))) XLA_FFI_Error *attention_lab_read(XLA_FFI_CallFrame *frame) {
  return forward_pass(frame, 1);
}

/* Query and key are integers of 16 bits, and values bfloat16. */
__attribute__((visibility("default"))) XLA_FFI_Error *attention_lab_halved(XLA_FFI_CallFrame *frame) {
  if (told_version(frame)) return 0;
  if (frame->args.size != KEY_SCALE + 1 || frame->rets.size != 2) return refused(frame, "another number of buffers");
  if (argument(frame, QUERY)->dtype != XLA_FFI_DataType_S16 || argument(frame, KEY)->dtype != XLA_FFI_DataType_S16)
    return refused(frame, "a query or keys that are not int16");
  if (argument(frame, VALUE)->dtype != XLA_FFI_DataType_BF16) return refused(frame, "values that are not bfloat16");
  problem p = described(frame);
  set_pages(&p, frame);
  p.query = 0, p.key.type = BFLOAT16; /* as wide as its integers, which are asked for ahead */
  p.short_query = argument(frame, QUERY)->data, p.short_key = argument(frame, KEY)->data;
  p.query_scale = argument(frame, QUERY_SCALE)->data, p.key_scale = argument(frame, KEY_SCALE)->data;
  p.output = result(frame, 0), p.level = result(frame, 1);
#if HALVES
  halved(&p, &(threads){frame->api, frame->ctx});
  return 0;
#else
  return refused(frame, "no products of 16-bit numbers on this processor");
#endif
}

__attribute__((visibility("default"))) XLA_FFI_Error *attention_lab_decode(XLA_FFI_CallFrame *frame) {
  if (told_version(frame)) return 0;
  XLA_FFI_Error *error = misfit(frame, SHOWN + 1, 3);
  if (error) return error;
  problem p = described(frame);
  p.output = result(frame, 0), p.level = result(frame, 1);
  set_partial(&p, frame, 2);
  decode(&p, &(threads){frame->api, frame->ctx});
  return 0;
}

/* Operands: query, key, value, caps, first, last, and the list of pages. */
__attribute__((visibility("default"))) XLA_FFI_Error *attention_lab_paged(XLA_FFI_CallFrame *frame) {
  if (told_version(frame)) return 0;
  XLA_FFI_Error *error = misfit(frame, LAST + 2, 3);
  if (error) return error;
  const XLA_FFI_Buffer *key = argument(frame, KEY), *slots = argument(frame, LAST + 1), *caps = argument(frame, CAPS);
  const int64_t *k = key->dims + key->rank - 4, *m = slots->dims + slots->rank - 2;
  paged_problem p = {.B = 1, .K = k[0], .G = m[0], .P = k[1], .C = k[2], .H = k[3], .m = m[1]};
  for (const int64_t *dim = key->dims; dim < k; dim++) p.B *= *dim;
  p.E = argument(frame, VALUE)->dims[key->rank - 1];
  p.query = argument(frame, QUERY)->data, p.key = as_operand(key), p.value = as_operand(argument(frame, VALUE));
  if (caps->dims[caps->rank - 1] > 0) p.caps = caps->data;
  p.first = argument(frame, FIRST)->data, p.last = argument(frame, LAST)->data, p.slots = slots->data;
  p.output = result(frame, 0), p.level = result(frame, 1), p.partial = result(frame, 2);
  paged(&p, &(threads){frame->api, frame->ctx});
  return 0;
}

__attribute__((visibility("default"))) XLA_FFI_Error *attention_lab_backward(XLA_FFI_CallFrame *frame) {
  if (told_version(frame)) return 0;
  XLA_FFI_Error *error = misfit(frame, D_LEVEL + 1, 6);
  if (error) return error;
  problem p = described(frame);
  p.output = argument(frame, OUTPUT)->data, p.level = argument(frame, LEVEL)->data;
  p.d_output = argument(frame, D_OUTPUT)->data, p.d_level = argument(frame, D_LEVEL)->data;
  p.d_query = result(frame, 0), p.d_key = result(frame, 1), p.d_value = result(frame, 2);
  p.ratios = result(frame, 3);
  p.tiles = result(frame, 4);
  set_partial(&p, frame, 5);
  backward(&p, &(threads){frame->api, frame->ctx});
  return 0;
}
