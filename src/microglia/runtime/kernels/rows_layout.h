// How a row-sparse convolution lays its input out, so that every entry reads one run of neighbouring floats per tile.
#ifndef MICROGLIA_ROWS_LAYOUT_H
#define MICROGLIA_ROWS_LAYOUT_H

#include "kernels.h"
#include "rows_level.h"

namespace microglia {

constexpr int64_t kMostTaps = 256;  // a tap is one byte

// Per kernel row (or column): which class of input rows it reads, and how many steps into it. A class is every
// stride-th row of the padded input from `origin` on (negative: in the padding).
struct Axis {
  int64_t classes;
  int64_t length;                // rows of a class that are read
  int64_t origin[kMostTaps];     // [classes]
  int64_t class_of[kMostTaps];   // [kernel size]
  int64_t step[kMostTaps];       // [kernel size]
};

// Output pixel (row, column) is pixel row * pitch + column of the run, and a tap reads input at that pixel plus an offset
// of its own, in the plane of its class of rows and class of columns. Where pitch exceeds out_width, the pixels between
// are computed and dropped.
struct Layout {
  bool direct;                   // the input itself serves: a 1x1 kernel, no stride, no padding
  Axis rows, columns;
  int64_t out_height, out_width;
  int64_t pitch, plane_size, channel_size, floats;  // of the copy; channel_size holds all planes of a channel
  int64_t run;                   // pixels from the first output to the last
  uint32_t tap_offset[kMostTaps];
};

// A 1x1 convolution that reads every pixel once does not care about rows: makes one of them all.
void flatten(mg_conv2d& conv);

// MG_BAD_SIZE where a size is out of its range or the copy of one image has 2 ** 31 floats or more. `aligned` asks for a
// copy even where the input itself would serve, but its planes do not begin at cache lines.
int make_layout(const mg_conv2d& conv, bool aligned, Layout& layout);

// Copies the planes of the channels begin .. end of one image.
void copy_planes(const mg_conv2d& conv, const Layout& layout, const RowLevel& level, const float* image, float* planes,
                 int64_t begin, int64_t end);

}  // namespace microglia

#endif
