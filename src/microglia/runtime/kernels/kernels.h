// The plain C interface of Microglia's sparse kernels: no torch, no exceptions, no allocation visible to the caller.
//
// Every function checks its whole problem, index arrays included, before it reads or writes a single activation (a chain of
// several: before each step), and returns MG_OK or the code of what is wrong (see mg_error_text). Activations and weights are float32, except where a name
// ends in _bf16 or _int8.
#ifndef MICROGLIA_KERNELS_H
#define MICROGLIA_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  MG_OK = 0,
  MG_BAD_SIZE = 1,          // a size, stride or dilation is below 1, padding below 0, or a product overflows
  MG_BAD_BLOCK = 2,         // block_inputs is none of 1, 2, 4, 8 (or rows none of 1, 2, 4)
  MG_BAD_ROW_POINTER = 3,   // not 0 at the start, falling, or not the number of blocks at the end
  MG_BAD_CHANNEL = 4,       // an input channel outside the input
  MG_BAD_TAP = 5,           // a position outside the kernel
  MG_BAD_ACTIVATION = 6,
  MG_BAD_POINTER = 7,       // a null pointer where there must be data
  MG_NO_MEMORY = 8,
  MG_BAD_LIST = 9,          // a list of channels or stripes that is not strictly rising, or leaves its range
  MG_BAD_PAIR = 10,         // a pair of bfloat16 input channels on both sides of a multiple of 32
  MG_BAD_QUAD = 11          // four 8-bit input channels on both sides of a multiple of 64
};

enum { MG_NONE = 0, MG_RELU = 1, MG_RELU6 = 2, MG_SILU = 3 };

// Each runs what the levels before it run, too.
enum { MG_GENERIC = 0, MG_AVX2 = 1, MG_AVX512 = 2, MG_AVX512VNNI = 3, MG_AVX512BF16 = 4, MG_AMX = 5 };

// Runs body over [begin, end) in pieces, as at::parallel_for does; null means: on the calling thread alone.
typedef void (*mg_body)(int64_t begin, int64_t end, void* context);
typedef void (*mg_parallel)(int64_t begin, int64_t end, int64_t grain, mg_body body, void* context);

// A 2-d convolution, cross-correlation as in torch. A linear layer is a 1x1 convolution over width = rows, height = 1.
// Groups need no field: `channel` counts all input channels.
typedef struct {
  int64_t batch, in_channels, height, width, out_channels;
  int64_t kernel_height, kernel_width, stride_height, stride_width;
  int64_t padding_height, padding_width, dilation_height, dilation_width;
  int32_t activation;  // applied last: activation(convolution + bias + residual)
  int32_t threads;     // how many the parallel function has; only a hint for cutting the work
} mg_conv2d;

// Vector block-sparse convolution, NHWC. A stripe is 16 output channels (the last one may be narrower), a block is 16
// outputs x block_inputs consecutive input channels at one tap (kernel position, row major). A block may reach past the
// last input channel: what it holds there must be zero, and nothing is read there.
typedef struct {
  int64_t block_inputs;        // 1, 2, 4 or 8
  int64_t blocks;              // how many
  const float* values;         // [blocks][block_inputs][16]; rows of outputs past out_channels are zero
  const int32_t* row_pointer;  // [ceil(out_channels / 16) + 1]: the blocks of stripe s are row_pointer[s] .. row_pointer[s + 1]
  const int32_t* channel;      // [blocks]: first input channel of the block
  const uint8_t* tap;          // [blocks], or null where the kernel is 1x1
} mg_blocks;

// Activations: element (n, h, w, c) of x lies at x[((n * height + h) * width + w) * x_stride + c]; x_stride >= in_channels.
// y and residual (null for none) likewise with out_channels and the output's height and width. They do not overlap x;
// residual may be y itself. bias has out_channels entries, or is null.
int mg_block_conv2d(const mg_conv2d* conv, const mg_blocks* blocks, const float* x, int64_t x_stride, float* y, int64_t y_stride,
                    const float* residual, int64_t residual_stride, const float* bias, mg_parallel parallel);

// The same in bfloat16 (the upper half of a float32), in pairs of input channels: what one vdpbf16ps multiplies and adds. A
// pair may begin at any channel, odd ones too, but not lie across a multiple of 32, where a line of the working copy ends.
typedef struct {
  int64_t block_inputs;        // 2, 4 or 8; blocks of one input are given as pairs whose other weights are zero
  int64_t blocks;
  const uint16_t* values;      // [blocks][block_inputs / 2][16][2]
  const int32_t* row_pointer;  // these as in mg_blocks
  const int32_t* channel;
  const uint8_t* tap;
} mg_blocks_bf16;

// As mg_block_conv2d. Sums are float32 and begin with the bias; what is stored, after residual and activation, is rounded
// once, to the nearest bfloat16, to the even one in the middle. NaN becomes the quiet NaN 0x7FC0. At every level a pair
// is added odd channel first, as vdpbf16ps does; that instruction alone takes denormal numbers for zero.
int mg_block_conv2d_bf16(const mg_conv2d* conv, const mg_blocks_bf16* blocks, const uint16_t* x, int64_t x_stride, uint16_t* y,
                         int64_t y_stride, const uint16_t* residual, int64_t residual_stride, const float* bias,
                         mg_parallel parallel);

// The same of 8-bit activations (uint8) and weights (int8), in quads: four neighbouring input channels, which one vpdpbusd
// multiplies and adds. A quad may begin at any channel, but not lie across a multiple of 64. Sums are exact at every level: int32.
// At the levels avx2 and avx512 this holds if |a| + |b| <= 128 for the weights a, b of the first two channels of each quad and
// output, and of the last two: 255 * 128 fits 16 bits. Larger weights are given as two blocks whose weights add up.
// In tiles, 16 blocks of a stripe lie as amx multiplies them: values[blocks / 16][16 outputs][16 blocks][4]. Row pointers are
// multiples of 16 then and channels of 4; the last block of a stripe is repeated, with weights of zero. Other levels run tiles, too,
// from a copy.
typedef struct {
  int64_t blocks;
  const int8_t* values;        // [blocks][16][4]
  const int32_t* row_pointer;  // these as in mg_blocks
  const int32_t* channel;
  const uint8_t* tap;
  int32_t tiled;               // whether values are in tiles
} mg_blocks_int8;

// What becomes of the sums, each in float32: y = min(max(sum * scale + bias + residual * other, low), high), the first product and
// addition rounded once, the second too. y in uint8 is rounded to the nearest, to the even one in the middle; there must be
// 0 <= low <= high <= 255. Arrays have ceil(out_channels / 16) * 16 entries.
typedef struct {
  const int32_t* start;  // where a sum begins: minus `zero` times the sum of the output's weights
  const float* scale;
  const float* bias;
  float other, low, high;
  int32_t zero;  // 0 to 255: the activation that stands for 0, which the padding is filled with
  int32_t wide;  // y and residual are float32, not uint8
} mg_rescale;

// Activations as in mg_block_conv2d. conv->activation must be MG_NONE: low and high are the bounds of an activation.
int mg_block_conv2d_int8(const mg_conv2d* conv, const mg_blocks_int8* blocks, const mg_rescale* rescale, const uint8_t* x,
                         int64_t x_stride, void* y, int64_t y_stride, const void* residual, int64_t residual_stride,
                         mg_parallel parallel);

// y = min(max(x * scale + zero, 0), 255), rounded as above; NaN becomes 0.
int mg_quantize(const float* x, int64_t count, float scale, float zero, uint8_t* y, mg_parallel parallel);

// The same of images (images, planes, size) into (images, size, planes), for 1 to 4 planes: what a network is given lies so.
int mg_quantize_planes(const float* x, int64_t images, int64_t planes, int64_t size, float scale, float zero, uint8_t* y,
                       mg_parallel parallel);

// y = (x - zero) * unit.
int mg_dequantize(const uint8_t* x, int64_t count, float unit, float zero, float* y, mg_parallel parallel);

// The maximum over windows of an image in NHWC, pixels in_channels bytes apart. conv says everything but out_channels, which is
// in_channels; dilation must be 1, and a padding at most half of the kernel.
int mg_max_pool_int8(const mg_conv2d* conv, const uint8_t* x, uint8_t* y, mg_parallel parallel);

// Several block-sparse convolutions of float32, one after the other, in one call. Values are numbered: first the images given, then
// the result of each step.
typedef struct {
  mg_conv2d conv;    // of one batch in all steps; threads is read of the first
  mg_blocks blocks;
  const float* bias;
  int64_t input;     // the number of the value that is read
  int64_t residual;  // of the value that is added, or -1
} mg_step;

typedef struct {  // NHWC, pixels `channels` apart
  const float* data;
  int64_t channels, height, width;
} mg_image;

// results[s] is where the result of step s goes, NHWC as the images are, or null where later steps alone read it: then it stays in
// working memory, in the order in which the kernels read, with its padding around it, and images of a batch go through all steps
// a few at a time, so that it stays near. results overlap neither each other nor an image.
// What is wrong with the blocks of a step may be found when the steps before it have run.
int mg_block_chain(const mg_step* steps, int64_t step_count, const mg_image* images, int64_t image_count, float* const* results,
                   mg_parallel parallel);

// The same convolution of all blocks (a dense weight packed as blocks with block_inputs = 1, stripe by stripe, in each
// tap-major: block (tap * in_channels + channel) of a stripe), computed from the input channels in `channels` (rising; the
// others count as zero) for the stripes of outputs in `stripes` (rising) alone: the run-time block list of a dynamic gate.
// What lies in y outside those stripes is set to zero.
int mg_gated_conv2d(const mg_conv2d* conv, const float* values, const int32_t* channels, int64_t channel_count,
                    const int32_t* stripes, int64_t stripe_count, const float* x, int64_t x_stride, float* y, int64_t y_stride,
                    const float* bias, mg_parallel parallel);

// The part of a convolution that an input needs: some outputs, new for every input, from some of the input channels.
typedef struct {
  int64_t inputs, outputs;  // of the whole convolution
  const float* values;      // all its blocks, as mg_gated_conv2d takes them: [ceil(outputs / 16)][taps * inputs][16]
  const int32_t* rows;      // [conv.out_channels], rising: the outputs computed, side by side in y; null for all
  const int32_t* columns;   // [conv.in_channels], rising: the input channels that x holds side by side; null for all
} mg_part;

// `conv` is the problem of the part: in_channels of x, out_channels of y. bias has part->outputs entries, or is null.
int mg_part_conv2d(const mg_conv2d* conv, const mg_part* part, const float* x, int64_t x_stride, float* y, int64_t y_stride,
                   const float* bias, mg_parallel parallel);

// The head of a gate: the mean (or maximum) of each input channel, perhaps its softmax over channels, one affine map.
typedef struct {
  int64_t inputs, outputs;
  const float* weight;  // [outputs][inputs]
  const float* bias;    // [outputs]
  int32_t maximum, softmax;
} mg_gate;

// Which outputs the head of a gate wants for one input: those above 0, rising, in `rows`, which has room for all of them.
// x holds `column_count` channels of `pixels` pixels, x_stride floats apart: the input channels in `columns` (rising; the
// others are pooled to 0), or all of them where that is null.
int mg_gate_rows(const mg_gate* gate, const float* x, int64_t pixels, int64_t x_stride, const int64_t* columns,
                 int64_t column_count, int64_t* rows, int64_t* row_count);

// y = x, and in the channels `rows` (rising) x plus the channels that `part` holds side by side; pixel by pixel. With `relu` what
// is negative then becomes 0.
int mg_add_rows(int64_t pixels, int64_t channels, const float* x, int64_t x_stride, const float* part, int64_t part_stride,
                const int64_t* rows, int64_t row_count, float* y, int64_t y_stride, int32_t relu);

// Row-sparse convolution, NCHW: a row group is `rows` consecutive output channels (the last one may be narrower) that share
// the places of their weights; rows = 1 is unstructured sparsity.
typedef struct {
  int64_t rows;                // 1, 2 or 4
  int64_t entries;             // how many places
  const float* values;         // [entries][rows]
  const int32_t* row_pointer;  // [ceil(out_channels / rows) + 1]
  const int32_t* channel;      // [entries]
  const uint8_t* tap;          // [entries], or null where the kernel is 1x1
} mg_rows;

// Activations are contiguous NCHW; residual (null for none) has the shape of y and may be y itself.
int mg_row_conv2d(const mg_conv2d* conv, const mg_rows* rows, const float* x, float* y, const float* residual, const float* bias,
                  mg_parallel parallel);

// Decodes blocks of `block` Huffman-coded symbols, the last of which may be shorter. Block b is a stream of sizes[b] bytes, high bits
// first; the streams follow each other in `data` and fill it. single[next `longest` bits] = symbol + 256 times the bits of its code.
// MG_BAD_LIST where a stream does not end where its symbols do, with bits of 0 up to a whole byte.
int mg_huffman_decode(const uint8_t* data, int64_t bytes, const uint16_t* sizes, int64_t blocks, int64_t block,
                      const uint16_t* single, int32_t longest, uint8_t* symbols, int64_t count);

// A linear layer from codes of 4 or 8 bits: y[batch, outputs] = table[codes] x + bias (null for none). `inputs` is a multiple of 16;
// a row of codes has inputs * bits / 8 bytes, laid out as in codes.cpp. The table has 2^bits values. `level` is at most mg_level().
int mg_code_linear(const uint8_t* codes, const float* table, const float* x, const float* bias, float* y, int64_t outputs,
                   int64_t inputs, int64_t batch, int32_t bits, int32_t level);

// One pass of a selection over at most 2^31 - 1 values: mask = value >= high; `inside` gets the places of values neither >= high nor
// <= low, NaN among them, in order, and has room for all. counts = {values >= high, values <= low, places}.
int mg_select_pass(const float* values, int64_t length, float low, float high, uint8_t* mask, int32_t* inside, int64_t* counts);

// At the `count` positions of what rounds of pruning left: the products of two values; and which of them stay. `left` gets the positions
// that stay, in order, has room for all and may be `places` (null: all from 0 on); the weights at the others become 0.
int mg_alive_products(const float* first, const float* second, const int32_t* places, int64_t count, float* result);
int mg_alive_keep(const int32_t* places, const uint8_t* stays, int64_t count, float* weights, int32_t* left, int64_t* found);

// A weight (outputs, inputs, taps), its rows in the order inputs, taps or, channels-last, taps, inputs; a factor for each block of
// block_outputs x block_inputs weights at one tap, (outputs / block_outputs, inputs / block_inputs, taps). Sizes divide.
typedef struct {
  int64_t outputs, inputs, taps, block_outputs, block_inputs;
  int32_t channels_last;
} mg_scaled;

// The weight times its factors, and the gradients of both (of_weight may be null) from that of the product.
int mg_scale_blocks(const mg_scaled* blocks, const float* weight, const float* factors, float* result, mg_parallel parallel);
int mg_scale_blocks_backward(const mg_scaled* blocks, const float* weight, const float* gradient, const float* factors,
                             float* of_weight, float* of_factors, mg_parallel parallel);

int mg_level(void);             // the best level of this machine, or MICROGLIA_ISA (generic, avx2, avx512, avx512vnni, avx512bf16, amx) where it can run
const char* mg_level_name(int level);
const char* mg_error_text(int code);

#ifdef __cplusplus
}
#endif
#endif
