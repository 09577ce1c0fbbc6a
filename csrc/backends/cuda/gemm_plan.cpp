#include "backends/cuda/gemm_plan.h"

#include <algorithm>
#include <array>
#include <span>

namespace mla::cuda {
namespace {

// A tile shape, the share of its path's peak that it reaches once all multiprocessors are busy
// (larger tiles read less per product), and how many of its blocks one multiprocessor holds.
struct Shape {
  int tile_m, tile_n;
  double efficiency;
  int blocks_per_sm;
};
constexpr std::array<Shape, 3> kMmaShapes = {
    {{128, 128, 1.0, 2}, {64, 128, 0.8, 2}, {64, 64, 0.6, 2}}};
constexpr std::array<Shape, 3> kWgmmaShapes = {
    {{128, 256, 1.0, 1}, {128, 128, 0.75, 1}, {64, 256, 0.7, 1}}};

std::span<const Shape> shapes(GemmPlan::Path path) {
  if (path == GemmPlan::Path::wgmma) return kWgmmaShapes;
  return kMmaShapes;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Work of the busiest multiprocessor, in products per unit of k.
double cost(const Shape& shape, int64_t tiles, int64_t n_sm) {
  const double per_sm = static_cast<double>(ceil_div(tiles, n_sm));
  return per_sm * shape.tile_m * shape.tile_n / shape.efficiency;
}

// Parts of k for a product whose tiles leave multiprocessors idle. A part shorter than 512 costs
// more in partial sums, written and read back, than it saves; more than 8 likewise.
void split_k(GemmPlan& plan, int64_t tiles, int k, int64_t n_sm) {
  const int64_t parts = std::min<int64_t>({n_sm / std::max<int64_t>(tiles, 1), k / 512, 8});
  plan.k_split = std::max(k, 1);
  if (parts < 2) return;
  plan.k_split = static_cast<int>(ceil_div(ceil_div(k, parts), kWgmmaStep) * kWgmmaStep);
  plan.n_split = static_cast<int>(ceil_div(k, plan.k_split));
}

int columns_per_tile(int tile_n, bool fused) { return fused ? tile_n / 2 : tile_n; }

int64_t dense_tiles(const Gemm& g, int tile_m, int tile_n) {
  return ceil_div(g.m, tile_m) * ceil_div(g.n, columns_per_tile(tile_n, g.b_up != nullptr)) *
         g.n_batch;
}

// Expected tiles along m: every expert has one, and its last one is half empty.
int64_t grouped_row_tiles(const GroupedGemm& g, int64_t rows, int tile_m) {
  const int64_t experts = std::min<int64_t>(g.n_experts, rows);
  return std::max(experts, ceil_div(rows, tile_m) + ceil_div(experts, 2));
}

int64_t blocks(int64_t tiles, const Shape& shape, const DeviceInfo& device) {
  return std::min<int64_t>(tiles, int64_t{shape.blocks_per_sm} * device.n_sm);
}

}  // namespace

GemmPlan plan_gemm(const Gemm& g, const DeviceInfo& device, bool wgmma) {
  GemmPlan plan;
  plan.path = wgmma && g.k > 0 ? GemmPlan::Path::wgmma : GemmPlan::Path::mma;
  const Shape* best = nullptr;
  double best_cost = 0;
  for (const Shape& shape : shapes(plan.path)) {
    const double c = cost(shape, dense_tiles(g, shape.tile_m, shape.tile_n), device.n_sm);
    if (best != nullptr && c >= best_cost) continue;
    best = &shape;
    best_cost = c;
  }
  plan.tile_m = best->tile_m;
  plan.tile_n = best->tile_n;
  const int64_t tiles = dense_tiles(g, plan.tile_m, plan.tile_n);
  plan.k_split = std::max(g.k, 1);
  if (g.b_up == nullptr) split_k(plan, tiles, g.k, device.n_sm);
  plan.grid = static_cast<int>(blocks(tiles * plan.n_split, *best, device));
  return plan;
}

GemmPlan plan_grouped_gemm(const GroupedGemm& g, const DeviceInfo& device, bool wgmma) {
  GemmPlan plan;
  // Rows gathered by the threads themselves are built for f16 alone.
  const bool gathers_bf16 = g.operand == Operand::bf16 && g.pairs_per_row != 0;
  plan.path = wgmma && g.k > 0 && !gathers_bf16 ? GemmPlan::Path::wgmma : GemmPlan::Path::mma;
  plan.k_split = std::max(g.k, 1);
  const int64_t rows = ceil_div(int64_t{g.n_rows} * g.n_experts, std::max(g.n_model_experts, 1));
  const Shape* best = nullptr;
  double best_cost = 0;
  for (const Shape& shape : shapes(plan.path)) {
    const int64_t columns = columns_per_tile(shape.tile_n, g.b_up != nullptr);
    const int64_t tiles = grouped_row_tiles(g, rows, shape.tile_m) * ceil_div(g.n, columns);
    const double c = cost(shape, tiles, device.n_sm);
    if (best != nullptr && c >= best_cost) continue;
    best = &shape;
    best_cost = c;
  }
  plan.tile_m = best->tile_m;
  plan.tile_n = best->tile_n;
  // All rows may be these experts'.
  const int64_t columns = columns_per_tile(plan.tile_n, g.b_up != nullptr);
  const int64_t most = (ceil_div(g.n_rows, plan.tile_m) + g.n_experts) * ceil_div(g.n, columns);
  plan.grid = static_cast<int>(blocks(most, *best, device));
  return plan;
}

std::string GemmPlan::str() const {
  std::string text = path == Path::wgmma ? "wgmma " : "mma ";
  text += std::to_string(tile_m) + "x" + std::to_string(tile_n);
  if (n_split > 1) {
    text += ", k in " + std::to_string(n_split) + " parts of " + std::to_string(k_split);
  }
  return text + ", " + std::to_string(grid) + " blocks";
}

}  // namespace mla::cuda
