#include "rows_panels.h"

#include <algorithm>

namespace microglia {
namespace {

constexpr int64_t kLineFloats = 16;
constexpr int64_t kNearFloats = 24 * 256;    // what a panel may take of the first cache
constexpr int64_t kMostEntryBytes = 1 << 20;  // more does not stay in the second cache, and wants to be read in one go

// Whether the channels of every row group rise, given how often they fall among all entries: a panel is then a piece of
// each group.
bool channels_rise(const mg_rows& rows, int64_t groups, int64_t falls) {
  for (int64_t group = 1; group < groups; group++) {
    const int64_t begin = rows.row_pointer[group];
    const bool starts = begin > rows.row_pointer[group - 1] && begin < rows.entries;
    falls -= starts && rows.channel[begin] < rows.channel[begin - 1];
  }
  return falls == 0;
}

// The first entry from begin on, before end, of a channel that is not below the bound.
int64_t first_of_panel(const int32_t* channel, int64_t begin, int64_t end, int64_t bound) {
  const int32_t* from = channel + begin;
  int64_t count = end - begin;
  if (count == 0) return begin;
  while (count > 1) {  // without branches that depend on the data
    const int64_t half = count / 2;
    from = from[half - 1] < bound ? from + half : from;
    count -= half;
  }
  return from - channel + (*from < bound);
}

}  // namespace

// A row needs so many entries in each panel to pay for loading and storing its sums.
Panels choose_panels(const mg_conv2d& conv, const mg_rows& rows, const Layout& layout, int64_t pixels) {
  const int64_t groups = (conv.out_channels + rows.rows - 1) / rows.rows;
  const int64_t fewest = rows.rows == 1 ? 16 : 32;
  if (rows.entries * (1 + rows.rows) * int64_t(sizeof(float)) > kMostEntryBytes) return {1, conv.in_channels};
  const int64_t planes = layout.rows.classes * layout.columns.classes;
  const int64_t above = (conv.kernel_height - 1) * conv.dilation_height / conv.stride_height * layout.pitch;
  const int64_t floats = std::min(layout.channel_size, (pixels + above + 2 * kLineFloats) * planes);
  const int64_t wanted = (conv.in_channels * floats + kNearFloats - 1) / kNearFloats;
  const int64_t count = std::max<int64_t>(1, std::min(rows.entries / (groups * fewest), wanted));
  const int64_t channels = (conv.in_channels + count - 1) / count;
  return {(conv.in_channels + channels - 1) / channels, channels};
}

void bound_panels(const mg_rows& rows, int64_t groups, int64_t falls, Panels& panels, int32_t* bounds) {
  if (panels.count > 1 && !channels_rise(rows, groups, falls)) panels.count = 1;
  for (int64_t group = 0; group < groups; group++) {
    int64_t begin = rows.row_pointer[group];
    const int64_t end = rows.row_pointer[group + 1];
    bounds[group] = int32_t(begin);
    for (int64_t panel = 1; panel < panels.count; panel++) {
      begin = first_of_panel(rows.channel, begin, end, panel * panels.channels);
      bounds[panel * groups + group] = int32_t(begin);
    }
    bounds[panels.count * groups + group] = int32_t(end);
  }
}

}  // namespace microglia
