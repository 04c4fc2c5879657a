// Panels of input channels that fit into the first cache: rows of a sparse matrix read the input at random.
#ifndef MICROGLIA_ROWS_PANELS_H
#define MICROGLIA_ROWS_PANELS_H

#include "kernels.h"
#include "rows_layout.h"

namespace microglia {

struct Panels {
  int64_t count;
  int64_t channels;  // of each but the last
};

// For tiles of so many pixels; one panel where more would not pay.
Panels choose_panels(const mg_conv2d& conv, const mg_rows& rows, const Layout& layout, int64_t pixels);

// Fills bounds, [count + 1][groups], with the entry where each panel begins in each row group. Makes do with one panel
// where the channels of a group do not rise; `falls` says how often they fall from an entry to the next.
void bound_panels(const mg_rows& rows, int64_t groups, int64_t falls, Panels& panels, int32_t* bounds);

}  // namespace microglia

#endif
