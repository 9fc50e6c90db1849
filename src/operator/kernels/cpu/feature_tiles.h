// Divides a feature map into tiles, the work items of the CPU kernels.
//
// The tiles depend on the shape alone.  Sums are taken per tile and added up in the order of the
// tiles, so they are the same, bit for bit, with any number of threads.
//
// The map is a matrix of rows (outer) and columns (channels) with `inner` contiguous elements in
// each cell.  If these are too few for vector instructions, as with channels last, a column is a
// single element instead: a channel then has `inner` adjacent columns, and short rows are joined to
// longer ones, in which the channels repeat.
//
// A block of channels of a blocked map is a matrix with a row per inner index and a column per
// channel.  A tile is a part of it, or, where it is small, the same block of several outer indices.
#pragma once

#include <algorithm>
#include <cstddef>

#include "kernels/batch_norm_kernels.h"
#include "kernels/cpu/loops.h"

namespace gluon_syncbn {

// Feature maps of more bytes are assumed not to stay in a cache from one pass to the next.
constexpr std::size_t kBeyondCaches = 16 << 20;

class FeatureTiles {
 public:
  explicit FeatureTiles(const FeatureShape& s)
      : channels_(s.channels), elements_(s.channels * s.count()) {
    const std::size_t row = s.channels * s.inner;
    if (s.outer * row == 0) return;
    if (s.block > 1) {
      block_ = s.block;
      outer_ = s.outer;
      outer_stride_ = s.outer_stride();
      rows_ = s.inner;
      columns_ = s.channels;
      tile_columns_ = s.block;
      tile_rows_ = std::min(rows_, std::max<std::size_t>(1, kTileElements / s.block));
      tile_groups_ = std::min(outer_, std::max<std::size_t>(1, kTileElements / (rows_ * s.block)));
      return;
    }
    if (s.inner == 1 || (s.inner < kShortCell && s.outer >= kManyRows)) {
      const bool apart = s.outer_stride() != row;
      const std::size_t joined = apart ? 1 : std::min(s.outer, 1 + (kJoinedRow - 1) / row);
      repeat_ = s.inner;
      rows_ = s.outer / joined;
      columns_ = joined * row;
      cell_ = 1;
      rest_ = s.outer % joined * row;
      stride_ = joined * s.outer_stride();
    } else {
      rows_ = s.outer;
      columns_ = s.channels;
      cell_ = s.inner;
      stride_ = s.outer_stride();
    }
    tile_cell_ = std::min(cell_, kTileElements);
    tile_columns_ = std::min(columns_, std::max<std::size_t>(1, TileRun() / tile_cell_));
    tile_rows_ = std::max<std::size_t>(1, kTileElements / (tile_columns_ * tile_cell_));
  }

  std::size_t count() const {
    if (block_ > 1) return CeilDiv(outer_, tile_groups_) * PerGroup();
    return rows_ == 0 ? 0 : (CeilDiv(rows_, tile_rows_) + (rest_ > 0)) * PerRow();
  }
  std::size_t channels() const { return channels_; }
  std::size_t elements() const { return elements_; }
  std::size_t columns() const { return columns_; }
  std::size_t tile_columns() const { return tile_columns_; }

  FeatureTile operator[](std::size_t index) const {
    if (block_ > 1) return TileOfBlock(index);
    const std::size_t cell_tiles = CeilDiv(cell_, tile_cell_);
    const std::size_t in_cell = index % cell_tiles * tile_cell_;
    const std::size_t column = index % PerRow() / cell_tiles * tile_columns_;
    // After the rows comes the rest, an incomplete row.
    const std::size_t row = std::min(index / PerRow() * tile_rows_, rows_);
    const std::size_t row_columns = row < rows_ ? columns_ : std::max(rest_, column);
    FeatureTile tile;
    tile.groups = 1;
    tile.group_stride = 0;
    tile.stride = stride_;
    tile.offset = row * tile.stride + column * cell_ + in_cell;
    tile.rows = std::min(tile_rows_, std::max<std::size_t>(1, rows_ - row));
    tile.first_column = column;
    tile.columns = std::min(tile_columns_, row_columns - column);
    tile.inner = std::min(tile_cell_, cell_ - in_cell);
    return tile;
  }

  // The offset of a channel's first element.
  std::size_t FirstElement(std::size_t channel) const {
    if (block_ > 1) return (channel - channel % block_) * rows_ + channel % block_;
    return channel * repeat_ * cell_;
  }

  // Calls visit(column, channel) for the columns first ... first + count - 1.
  template <typename Visit>
  void ForEachColumn(std::size_t first, std::size_t count, const Visit& visit) const {
    std::size_t channel = first / repeat_ % channels_;
    std::size_t left = repeat_ - first % repeat_;
    for (std::size_t column = first; column < first + count; ++column) {
      visit(column, channel);
      if (--left > 0) continue;
      left = repeat_;
      if (++channel == channels_) channel = 0;
    }
  }

 private:
  static constexpr std::size_t kShortCell = 16;
  static constexpr std::size_t kManyRows = 8;  // with fewer, entries per column do not pay
  static constexpr std::size_t kJoinedRow = 64;
  static constexpr std::size_t kTileElements = 65536;
  static std::size_t CeilDiv(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

  // Contiguous elements per tile: few, so that a tile has many rows, and a column few partial sums.
  std::size_t TileRun() const { return cell_ == 1 ? 1024 : 8192; }
  std::size_t PerRow() const {
    return CeilDiv(columns_, tile_columns_) * CeilDiv(cell_, tile_cell_);
  }

  // Of a blocked map: tiles of the same outer indices.
  std::size_t PerGroup() const { return columns_ / block_ * CeilDiv(rows_, tile_rows_); }

  FeatureTile TileOfBlock(std::size_t index) const {
    const std::size_t row_tiles = CeilDiv(rows_, tile_rows_);
    const std::size_t row = index % row_tiles * tile_rows_;
    const std::size_t column = index % PerGroup() / row_tiles * block_;
    const std::size_t outer = index / PerGroup() * tile_groups_;
    FeatureTile tile;
    tile.offset = outer * outer_stride_ + column * rows_ + row * block_;
    tile.groups = std::min(tile_groups_, outer_ - outer);
    tile.group_stride = outer_stride_;
    tile.rows = std::min(tile_rows_, rows_ - row);
    tile.stride = block_;
    tile.first_column = column;
    tile.columns = block_;
    tile.inner = 1;
    return tile;
  }

  std::size_t channels_, elements_;
  std::size_t repeat_ = 1;  // adjacent columns of a channel
  std::size_t rows_ = 0, columns_ = 0, cell_ = 0, stride_ = 0;
  std::size_t rest_ = 0;  // columns of an incomplete last row
  std::size_t tile_rows_ = 0, tile_columns_ = 0, tile_cell_ = 0;
  // Of a blocked map, whose rows are those of one block.
  std::size_t block_ = 1, outer_ = 0, outer_stride_ = 0, tile_groups_ = 0;
};

}  // namespace gluon_syncbn
