#include "rows_layout.h"

#include <string.h>

#include <algorithm>

namespace microglia {
namespace {

constexpr int64_t kLineFloats = 16;
constexpr int64_t kSmallPlane = 4;  // cache lines

int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t left = size + 2 * padding - (kernel - 1) * dilation - 1;
  return left < 0 ? 0 : left / stride + 1;
}

// One class per remainder of a kernel row's distance by the stride.
void share_classes(Axis& axis, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, int64_t out) {
  axis.classes = 0;
  axis.length = out;
  for (int64_t k = 0; k < kernel; k++) {
    const int64_t origin = k * dilation % stride - padding;
    int64_t found = 0;
    while (found < axis.classes && axis.origin[found] != origin) found++;
    if (found == axis.classes) axis.origin[axis.classes++] = origin;
    axis.class_of[k] = found;
    axis.step[k] = k * dilation / stride;
    axis.length = std::max(axis.length, out + axis.step[k]);
  }
}

// The zeros right of a row may be the ones left of the next: returns how many columns two rows share.
int64_t shared_columns(const mg_conv2d& conv, const Axis& columns) {
  if (conv.stride_width != 1 || columns.classes != 1) return 0;
  const int64_t right = columns.length - conv.padding_width - conv.width;
  return std::max<int64_t>(0, std::min(conv.padding_width, right));
}

bool in_range(int64_t value, int64_t least) { return value >= least && value <= INT32_MAX; }

bool sizes_in_range(const mg_conv2d& conv) {
  for (int64_t size : {conv.batch, conv.in_channels, conv.height, conv.width, conv.out_channels, conv.kernel_height,
                       conv.kernel_width, conv.stride_height, conv.stride_width, conv.dilation_height, conv.dilation_width})
    if (!in_range(size, 1)) return false;
  if (!in_range(conv.padding_height, 0) || !in_range(conv.padding_width, 0)) return false;
  return conv.kernel_height <= kMostTaps && conv.kernel_width <= kMostTaps && conv.kernel_height * conv.kernel_width <= kMostTaps;
}

// Whether a * b * c * d bytes of floats can be addressed.
bool addressable(int64_t a, int64_t b, int64_t c, int64_t d) {
  int64_t product;
  return !__builtin_mul_overflow(a, b, &product) && !__builtin_mul_overflow(product, c, &product) &&
         !__builtin_mul_overflow(product, d, &product) && product <= PTRDIFF_MAX / int64_t(sizeof(float));
}

bool multiply_up_to_int32(int64_t a, int64_t b, int64_t& product) {
  return !__builtin_mul_overflow(a, b, &product) && product <= INT32_MAX;
}

bool size_copy(const mg_conv2d& conv, Layout& layout) {
  const int64_t shared = shared_columns(conv, layout.columns);
  layout.pitch = std::max(layout.out_width, layout.columns.length - shared);
  int64_t pixels;
  if (!multiply_up_to_int32(layout.rows.length, layout.pitch, pixels)) return false;
  int64_t lines = (pixels + shared + kLineFloats - 1) / kLineFloats;
  // An odd number of cache lines: a part of the pixels of all channels then spreads over all sets of a cache. A small
  // plane is read whole, and does so anyway.
  if (lines > kSmallPlane) lines |= 1;
  layout.plane_size = lines * kLineFloats;
  return multiply_up_to_int32(layout.rows.classes * layout.columns.classes, layout.plane_size, layout.channel_size) &&
         multiply_up_to_int32(layout.channel_size, conv.in_channels, layout.floats);
}

void place_taps(const mg_conv2d& conv, Layout& layout) {
  memset(layout.tap_offset, 0, sizeof layout.tap_offset);
  for (int64_t tap = 0; tap < conv.kernel_height * conv.kernel_width; tap++) {
    const int64_t y = tap / conv.kernel_width, x = tap % conv.kernel_width;
    const int64_t plane = layout.rows.class_of[y] * layout.columns.classes + layout.columns.class_of[x];
    layout.tap_offset[tap] = uint32_t(plane * layout.plane_size + layout.rows.step[y] * layout.pitch + layout.columns.step[x]);
  }
}

bool reads_pixels_once(const mg_conv2d& conv) {
  return conv.kernel_height == 1 && conv.kernel_width == 1 && conv.stride_height == 1 && conv.stride_width == 1 &&
         conv.padding_height == 0 && conv.padding_width == 0;
}

}  // namespace

void flatten(mg_conv2d& conv) {
  if (!reads_pixels_once(conv) || !in_range(conv.height, 1) || !in_range(conv.width, 1)) return;
  conv.width *= conv.height;
  conv.height = 1;
}

int make_layout(const mg_conv2d& conv, bool aligned, Layout& layout) {
  if (!sizes_in_range(conv)) return MG_BAD_SIZE;
  layout.out_height =
      output_size(conv.height, conv.kernel_height, conv.stride_height, conv.padding_height, conv.dilation_height);
  layout.out_width = output_size(conv.width, conv.kernel_width, conv.stride_width, conv.padding_width, conv.dilation_width);
  if (layout.out_height < 1 || layout.out_width < 1) return MG_BAD_SIZE;
  if (!addressable(conv.batch, conv.in_channels, conv.height, conv.width)) return MG_BAD_SIZE;
  if (!addressable(conv.batch, conv.out_channels, layout.out_height, layout.out_width)) return MG_BAD_SIZE;

  share_classes(layout.rows, conv.kernel_height, conv.stride_height, conv.padding_height, conv.dilation_height,
                layout.out_height);
  share_classes(layout.columns, conv.kernel_width, conv.stride_width, conv.padding_width, conv.dilation_width, layout.out_width);
  if (!size_copy(conv, layout)) return MG_BAD_SIZE;
  layout.direct = reads_pixels_once(conv) && !(aligned && conv.height * conv.width % kLineFloats != 0);
  if (layout.direct) layout.channel_size = conv.height * conv.width;
  layout.run = (layout.out_height - 1) * layout.pitch + layout.out_width;
  place_taps(conv, layout);
  return MG_OK;
}

namespace {

// How many of `length` positions, from `origin` on in steps, lie before `bound`.
int64_t positions_before(int64_t bound, int64_t origin, int64_t step, int64_t length) {
  if (origin >= bound) return 0;
  return std::min(length, (bound - origin + step - 1) / step);
}

void copy_one_plane(const mg_conv2d& conv, const Layout& layout, const RowLevel& level, const float* channel, float* plane,
                    int64_t top, int64_t left) {
  const int64_t first_row = positions_before(0, top, conv.stride_height, layout.rows.length);
  const int64_t rows = positions_before(conv.height, top, conv.stride_height, layout.rows.length) - first_row;
  const int64_t first_column = positions_before(0, left, conv.stride_width, layout.columns.length);
  const int64_t columns = positions_before(conv.width, left, conv.stride_width, layout.columns.length) - first_column;
  std::fill(plane, plane + first_row * layout.pitch, 0.0f);
  PlaneCopy copy;
  copy.source_pitch = conv.stride_height * conv.width;
  copy.source_step = conv.stride_width;
  copy.rows = columns > 0 ? rows : 0;
  copy.source = channel;
  if (copy.rows > 0)
    copy.source += (top + first_row * conv.stride_height) * conv.width + left + first_column * conv.stride_width;
  copy.target = plane + first_row * layout.pitch;
  copy.pitch = layout.pitch;
  copy.lead = first_column;
  copy.count = columns;
  copy.limit = plane + layout.plane_size;
  level.copy_plane(copy);
}

}  // namespace

void copy_planes(const mg_conv2d& conv, const Layout& layout, const RowLevel& level, const float* image, float* planes,
                 int64_t begin, int64_t end) {
  for (int64_t channel = begin; channel < end; channel++) {
    const float* source = image + channel * conv.height * conv.width;
    float* target = planes + channel * layout.channel_size;
    for (int64_t row = 0; row < layout.rows.classes; row++)
      for (int64_t column = 0; column < layout.columns.classes; column++, target += layout.plane_size)
        copy_one_plane(conv, layout, level, source, target, layout.rows.origin[row], layout.columns.origin[column]);
  }
}

}  // namespace microglia
